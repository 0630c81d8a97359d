"""Log-probabilities and divergences of responses, over time in checkpointed chunks.

So `[B, T, vocabulary]` never exists whole, forwards or backwards.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Bool, Float, Int

from ema_jax.models.decoder import Decoder
from ema_jax.runtime.devices import find_accelerator

T = TypeVar("T")

# Largest number of a model's logits at once, for each device that shares them. A chunk reads the
# whole head, so on accelerators that have the memory it is 1 GiB in float32: the head of a 7B model
# took 69 ms in place of 107 (with 2²⁵) on one H100 (32 × 255 tokens). On a CPU it is 16 MiB, whose
# passes stay in its caches: 2.7 s in place of 3.6 (with 2²⁵) for 1,008 tokens and 49,152 words.
_LOGITS = 1 << 25
_LOGITS_LARGE, _LARGE_GIB = 1 << 28, 40
_LOGITS_CPU, _LEAST_TOKENS = 1 << 22, 64


def token_log_probs(
    model: Decoder,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    remat: bool | str = False,
) -> Float[Array, "B T-1"]:
    """log π(token t | tokens before t) in nats, float32, for t = 1 … T−1; padding on the right."""
    out = model(tokens, mask, right_padded=True, remat=remat)
    return target_log_probs(model, out.hidden[:, :-1], tokens[:, 1:])


def target_log_probs(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    used: Bool[Array, "B T"] | None = None,
    frozen_head: bool = False,
) -> Float[Array, "B T"]:
    """Log-probability of each target given its final hidden state, in nats.

    Args:
        model: whose head is used.
        hidden: states after the final norm.
        targets: ids.
        used: which of them are looked at: the others may be zero. All by default.
        frozen_head: gradients are taken for `hidden` alone. Its slopes are then computed with the
            log-probabilities, as the logits are there; the backward pass would compute those again.
    """

    def chunk(h: Float[Array, "B C D"], target: Int[Array, "B C"]) -> Float[Array, "B C"]:
        logits = model.logits(h)
        # A comparison with iota in place of a gather: it partitions over the vocabulary.
        hit = jnp.arange(logits.shape[-1]) == target[..., None]
        chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    def with_slopes(h: Float[Array, "B C D"], target: Int[Array, "B C"]) -> tuple[Array, Array]:
        values, pull = jax.vjp(lambda h: chunk(h, target), h)
        return values, pull(jnp.ones_like(values))[0]

    if not frozen_head:
        return _over_time(chunk, model.config.vocab_size, hidden, targets)
    arrays: tuple[Array, ...] = (jax.lax.stop_gradient(hidden), targets)
    function: Callable[..., tuple[Array, Array]] = with_slopes
    if used is not None and jax.typeof(hidden).sharding.mesh.size <= 1:
        function, arrays = _where_used(with_slopes), (*arrays, used)
    values, slopes = _over_time(function, model.config.vocab_size, *arrays)
    own = hidden.astype(jnp.float32)
    return values + jnp.sum(slopes * (own - jax.lax.stop_gradient(own)), axis=-1)


def _where_used(function: Callable[..., T]) -> Callable[..., T]:
    """`function` of chunks that are used anywhere, and zeros for the others."""

    def chunk(*arrays: Array) -> T:
        *own, used = arrays
        shapes = jax.eval_shape(function, *own)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(jnp.any(used), function, lambda *_: zeros, *own)

    return chunk


def token_divergences(
    model: Decoder,
    base: Decoder,
    hidden: Float[Array, "B T D"],
    base_hidden: Float[Array, "B T D"],
) -> Float[Array, "B T"]:
    """KL(base ‖ model) of the next token's distribution after each hidden state, in nats."""

    def chunk(h: Float[Array, "B C D"], base_h: Float[Array, "B C D"]) -> Float[Array, "B C"]:
        policy = jax.nn.log_softmax(model.logits(h))
        reference = jax.nn.log_softmax(base.logits(base_h))
        return jnp.sum(jnp.exp(reference) * (reference - policy), axis=-1)

    return _over_time(chunk, model.config.vocab_size, hidden, base_hidden)


def cross_entropy(
    log_probs: Float[Array, "B next"], response: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean over response tokens of −log π, in nats a token; 0 where there are none."""
    chosen = response[:, 1:]
    return -jnp.sum(jnp.where(chosen, log_probs, 0.0)) / jnp.maximum(jnp.sum(chosen), 1)


def _over_time(function: Callable[..., T], vocabulary: int, *arrays: Array) -> T:
    """`function` of `[B, T, …]` arrays, token by token, computed in chunks of time."""
    rows, length = arrays[0].shape[:2]

    def joined(chunks: Float[Array, "chunks B C ..."]) -> Float[Array, "B T ..."]:
        return jnp.moveaxis(chunks, 0, 1).reshape(rows, -1, *chunks.shape[3:])[:, :length]

    return jax.tree.map(joined, map_chunks(function, vocabulary, *arrays))


def map_chunks(
    function: Callable[..., T], vocabulary: int, *arrays: Array, longest: int | None = None
) -> T:
    """Results of `function` on chunks of time of `[B, T, …]` arrays, stacked along a first axis.

    Of `function`'s logits only those of one chunk exist at a time, forwards and backwards, and of
    one chunk no more than fit the memory.

    Args:
        function: takes one chunk of each array; it may compute logits of all their tokens.
        vocabulary: words in those logits.
        arrays: padded at the end, with zeros, to a multiple of the chunk.
        longest: most tokens of a row in a chunk.
    """
    rows, length = arrays[0].shape[:2]
    mesh = jax.typeof(arrays[0]).sharding.mesh
    logits = _logits_at_once(mesh, vocabulary) * max(mesh.size, 1)
    most = min(longest or length, length, max(logits // (rows * vocabulary), 1))
    size = -(-length // -(-length // most))  # of as many chunks, of much the same length
    padding = -length % size
    padded = [jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) for x in arrays]

    @jax.checkpoint
    def chunk(start: Int[Array, ""]) -> T:
        return function(*(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in padded))

    return jax.lax.map(chunk, jnp.arange(0, length + padding, size))


def _logits_at_once(mesh: AbstractMesh, vocabulary: int) -> int:
    """Largest number of logits of a chunk on each device of the mesh, by the device's memory."""
    device = mesh.abstract_device or jax.devices()[0]  # None outside a mesh
    if device.device_kind == "cpu":
        return max(_LOGITS_CPU, _LEAST_TOKENS * vocabulary)
    accelerator = find_accelerator(device.device_kind)
    return _LOGITS_LARGE if accelerator and accelerator.hbm_gib >= _LARGE_GIB else _LOGITS
