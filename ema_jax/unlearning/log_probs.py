"""Log-probabilities and divergences of responses, over time in chunks.

So `[B, T, vocabulary]` never exists whole, forwards or backwards.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import product, row_splits

# Tokens at once on a device: enough rows of a product to be worth reading the head for.
_TOKENS = 256
# Largest number of logits at once on a device: 128 MiB in float32, 220 tokens at 152,064 words.
_LOGITS = 1 << 25


def token_log_probs(
    model: Decoder,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    wanted: Bool[Array, "B T"] | None = None,
    *,
    remat: bool | str = False,
) -> Float[Array, "B T-1"]:
    """log π(token t | tokens before t) in nats, float32, for t = 1 … T−1.

    Of the `wanted` tokens alone, where they are given; of the others it is 0.
    """
    hidden = model(tokens, mask, remat=remat).hidden[:, :-1]
    head = model.embed[...].T if model.head is None else model.head[...]
    wanted = jnp.ones_like(mask) if wanted is None else wanted
    return target_log_probs(head, hidden, tokens[:, 1:], wanted[:, 1:])


@jax.custom_vjp
def target_log_probs(
    head: Float[Array, "D V"],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    wanted: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Log-probability of each wanted target under the head's reading of its hidden state, in nats.

    The slope ∂ log p / ∂h = W (one-hot − softmax) needs no cotangent, so it is made where the
    logits are, in the forward pass. They are made again for the gradient of a head that is
    trained; where none is asked for, the compiler drops that loop.
    """
    return _read(head, hidden, targets, wanted, slopes=False)[0]


def _forward(
    head: Float[Array, "D V"],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    wanted: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T"], tuple]:
    log_probs, slopes = _read(head, hidden, targets, wanted, slopes=True)
    return log_probs, (head, hidden, targets, wanted, slopes)


def _backward(saved: tuple, cotangent: Float[Array, "B T"]) -> tuple:
    head, hidden, targets, wanted, slopes = saved
    cotangent = jnp.where(wanted, cotangent, 0.0)

    def chunk(
        total: Float[Array, "D V"], start: Int[Array, ""]
    ) -> tuple[Float[Array, "D V"], None]:
        h, target, weight = pieces(start)
        residue = _residue(*_logits(head, h, target)) * weight[..., None]
        added = jnp.einsum(
            "bcd,bcv->dv", h, residue.astype(h.dtype), preferred_element_type=jnp.float32
        )
        return total + added, None

    starts, _, pieces = _chunks(head.shape[1], hidden, targets, cotangent)
    of_head, _ = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), starts)
    of_hidden = (cotangent[..., None] * slopes).astype(hidden.dtype)
    return of_head.astype(head.dtype), of_hidden, None, None


target_log_probs.defvjp(_forward, _backward)


def _read(
    head: Float[Array, "D V"],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    wanted: Bool[Array, "B T"],
    *,
    slopes: bool,
) -> tuple[Float[Array, "B T"], Float[Array, "B T D"] | None]:
    """Log-probabilities, and their slopes along the hidden states; zero where not wanted."""
    rows, length = targets.shape
    # Every row is moved to begin with its first wanted token: then the loop ends early. (Chunks
    # passed over by a conditional would all be computed where runs are trained together.)
    first = jnp.argmax(wanted, axis=1)
    last = length - jnp.argmax(wanted[:, ::-1], axis=1)
    used = jnp.max(jnp.where(jnp.any(wanted, axis=1), last - first, 0))
    starts, size, pieces = _chunks(head.shape[1], _moved(hidden, first), _moved(targets, first))

    def chunk(i: Int[Array, ""], made: tuple) -> tuple:
        h, target = pieces(starts[i])
        logits, hit, total = _logits(head, h, target)
        got = [jnp.sum(jnp.where(hit, logits, 0.0), axis=-1) - total]
        if slopes:
            got.append(product(_residue(logits, hit, total).astype(head.dtype), head.T))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, starts[i], axis=1)
            for whole, part in zip(made, got, strict=True)
        )

    room = (rows, len(starts) * size)
    empty = [jnp.zeros(room, jnp.float32)]
    if slopes:
        empty.append(jnp.zeros((*room, hidden.shape[-1]), hidden.dtype))
    made = jax.lax.fori_loop(0, -(-used // size), chunk, tuple(empty))
    back = [_moved(x[:, :length], -first) for x in made]
    log_probs = jnp.where(wanted, back[0], 0.0)
    return log_probs, jnp.where(wanted[..., None], back[1], 0) if slopes else None


def _logits(
    head: Float[Array, "D V"], h: Float[Array, "B C D"], target: Int[Array, "B C"]
) -> tuple[Float[Array, "B C V"], Bool[Array, "B C V"], Float[Array, "B C"]]:
    """Logits in float32, where the targets are, and the log of the normaliser."""
    logits = product(h, head, jnp.float32)
    # A comparison with iota in place of a gather: it partitions over the vocabulary.
    hit = jnp.arange(logits.shape[-1]) == target[..., None]
    return logits, hit, jax.nn.logsumexp(logits, axis=-1)


def _residue(
    logits: Float[Array, "B C V"], hit: Bool[Array, "B C V"], total: Float[Array, "B C"]
) -> Float[Array, "B C V"]:
    """One-hot − softmax: the gradient of log p by the logits."""
    return hit - jnp.exp(logits - total[..., None])


def _moved(x: Float[Array, "B T ..."], by: Int[Array, "B"]) -> Float[Array, "B T ..."]:
    """Place t of every row from its place t + `by`; anything where there is none."""
    length = x.shape[1]
    index = jnp.clip(by[:, None] + jnp.arange(length), 0, length - 1)
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def token_divergences(
    model: Decoder,
    base: Decoder,
    hidden: Float[Array, "B T D"],
    base_hidden: Float[Array, "B T D"],
) -> Float[Array, "B T"]:
    """KL(base ‖ model) of the next token's distribution after each hidden state, in nats."""

    def chunk(h: Float[Array, "B C D"], base_h: Float[Array, "B C D"]) -> Float[Array, "B C"]:
        ours, kept = jax.nn.log_softmax(model.logits(h)), jax.nn.log_softmax(base.logits(base_h))
        return jnp.sum(jnp.exp(kept) * (kept - ours), axis=-1)

    return _over_time(chunk, model.config.vocab_size, hidden, base_hidden)


def sequence_log_probs(
    log_probs: Float[Array, "B T-1"], response: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Sum of the response tokens' log-probabilities, in nats."""
    return jnp.sum(jnp.where(response[:, 1:], log_probs, 0.0), axis=1)


def _over_time(
    function: Callable[..., Float[Array, "B C"]], vocabulary: int, *arrays: Array
) -> Float[Array, "B T"]:
    """What `function` makes of `[B, T, …]` arrays, a chunk of time after the other."""
    rows, length = arrays[0].shape[:2]
    starts, _, pieces = _chunks(vocabulary, *arrays)
    chunks = jax.lax.map(jax.checkpoint(lambda start: function(*pieces(start))), starts)
    return jnp.moveaxis(chunks, 0, 1).reshape(rows, -1)[:, :length]  # of [chunks, B, C]


def _chunks(
    vocabulary: int, *arrays: Array
) -> tuple[Int[Array, "N"], int, Callable[[Int[Array, ""]], list[Array]]]:
    """Where the chunks begin, how long they are, and what gives the arrays' part from there."""
    rows, length = arrays[0].shape[:2]
    rows = -(-rows // row_splits(arrays[0]))
    size = min(length, max(min(_TOKENS, _LOGITS // vocabulary) // rows, 1))
    padding = -length % size
    padded = [jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) for x in arrays]

    def pieces(start: Int[Array, ""]) -> list[Array]:
        return [jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in padded]

    return jnp.arange(0, length + padding, size), size, pieces
