"""Log-probabilities and divergences of responses, over time in checkpointed chunks.

So `[B, T, vocabulary]` never exists whole, forwards or backwards.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ema_jax.models.decoder import Decoder

T = TypeVar("T")

_CHUNK = 128
# Largest number of a model's logits at once, for each device that shares them: 128 MiB in float32,
# 220 tokens at 152,064 words.
_LOGITS = 1 << 25


def token_log_probs(
    model: Decoder,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    remat: bool | str = False,
) -> Float[Array, "B T-1"]:
    """log π(token t | tokens before t) in nats, float32, for t = 1 … T−1."""
    hidden = model(tokens, mask, remat=remat).hidden[:, :-1]
    return target_log_probs(model, hidden, tokens[:, 1:])


def target_log_probs(
    model: Decoder, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Log-probability of each target given its final hidden state, in nats."""

    def chunk(h: Float[Array, "B C D"], target: Int[Array, "B C"]) -> Float[Array, "B C"]:
        logits = model.logits(h)
        # A comparison with iota in place of a gather: it partitions over the vocabulary.
        hit = jnp.arange(logits.shape[-1]) == target[..., None]
        chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    return _over_time(chunk, model.config.vocab_size, hidden, targets)


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


def sequence_log_probs(
    log_probs: Float[Array, "B next"], response: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Sum of the response tokens' log-probabilities, in nats."""
    return jnp.sum(jnp.where(response[:, 1:], log_probs, 0.0), axis=1)


def _over_time(
    function: Callable[..., Float[Array, "B C"]], vocabulary: int, *arrays: Array
) -> Float[Array, "B T"]:
    """`function` of `[B, T, …]` arrays, token by token, computed in chunks of time."""
    rows, length = arrays[0].shape[:2]
    chunks = map_chunks(function, vocabulary, *arrays)  # [chunks, B, C]
    return jnp.moveaxis(chunks, 0, 1).reshape(rows, -1)[:, :length]


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
    logits = _LOGITS * max(jax.typeof(arrays[0]).sharding.mesh.size, 1)
    size = min(longest or _CHUNK, length, max(logits // (rows * vocabulary), 1))
    padding = -length % size
    padded = [jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) for x in arrays]

    @jax.checkpoint
    def chunk(start: Int[Array, ""]) -> T:
        return function(*(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in padded))

    return jax.lax.map(chunk, jnp.arange(0, length + padding, size))
