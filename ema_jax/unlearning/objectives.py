"""Unlearning objectives: pure functions of log-probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ema_jax.models.decoder import Decoder

_CHUNK = 128


def token_log_probs(
    model: Decoder, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], *, remat: bool = False
) -> Float[Array, "B T-1"]:
    """log π(token t | tokens before t) in nats, float32, for t = 1 … T−1.

    The head runs over time in checkpointed chunks, so `[B, T, vocabulary]` never exists whole.
    """
    hidden = model(tokens, mask, remat=remat).hidden[:, :-1]
    targets = tokens[:, 1:]
    length = targets.shape[1]
    size = min(_CHUNK, length)
    padding = -length % size
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))

    @jax.checkpoint
    def chunk(start: Int[Array, ""]) -> Float[Array, "B C"]:
        h = jax.lax.dynamic_slice_in_dim(hidden, start, size, axis=1)
        target = jax.lax.dynamic_slice_in_dim(targets, start, size, axis=1)
        logits = model.logits(h)
        # A comparison with iota in place of a gather: it partitions over the vocabulary.
        hit = jnp.arange(logits.shape[-1]) == target[..., None]
        chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    starts = jnp.arange(0, length + padding, size)
    chunks = jax.lax.map(chunk, starts)  # [chunks, B, C]
    joined = jnp.moveaxis(chunks, 0, 1).reshape(tokens.shape[0], -1)
    return joined[:, :length]


def sequence_log_probs(
    log_probs: Float[Array, "B T-1"], response: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Sum of the response tokens' log-probabilities, in nats."""
    return jnp.sum(jnp.where(response[:, 1:], log_probs, 0.0), axis=1)


def npo_loss(
    log_probs: Float[Array, "B"], reference: Float[Array, "B"], beta: float
) -> Float[Array, ""]:
    """Negative preference optimisation: −(2/β) E[log σ(−β (log π − log π_ref))].

    Sequence sums, as in the NPO paper (arXiv 2404.05868, eq. 3) and its code. Equal policies give
    (2/β) ln 2; the gradient with respect to the log-ratio r is 2σ(βr)/B.

    Args:
        log_probs: of the whole responses under the model.
        reference: the same under the frozen reference, precomputed.
        beta: inverse temperature; β → 0 is gradient ascent.
    """
    return -2 / beta * jnp.mean(jax.nn.log_sigmoid(-beta * (log_probs - reference)))


def cross_entropy(
    log_probs: Float[Array, "B T-1"], response: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean over response tokens of −log π, in nats a token."""
    weights = response[:, 1:]
    total = jnp.sum(jnp.where(weights, log_probs, 0.0))
    return -total / jnp.maximum(jnp.sum(weights), 1)
