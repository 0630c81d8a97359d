"""Unlearning objectives: the formulas, and one registry row for each.

A formula is a pure function of log-probabilities or activations. A row wires it to the models: it
takes a `LossContext` (the model being trained, the untouched base, the settings) and a batch, and
returns the loss and metrics to log. No row ever makes a second copy of the weights: under adapters
the base is the same arrays with the adapters off.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ema_jax.data.batching import Batch
from ema_jax.models.decoder import Decoder
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.log_probs import (
    sequence_log_probs,
    token_divergences,
    token_log_probs,
)

Metrics = dict[str, Float[Array, ""]]
Scalar = Float[Array, ""]


# The formulas.


def ga_loss(log_probs: Float[Array, "B"]) -> Scalar:
    """Gradient ascent on the responses' likelihood: E[log π].

    The baseline of arXiv 2210.01504 (eq. 1, with the sign of a loss). Unbounded below.
    """
    return jnp.mean(log_probs)


def npo_loss(log_probs: Float[Array, "B"], reference: Float[Array, "B"], beta: float) -> Scalar:
    """Negative preference optimisation: −(2/β) E[log σ(−β (log π − log π_ref))].

    Sequence sums, as in the NPO paper (arXiv 2404.05868, eq. 3) and its code. Equal policies give
    (2/β) ln 2; the gradient with respect to the log-ratio r is 2σ(βr)/B.

    Args:
        log_probs: of the whole responses under the model.
        reference: the same under the frozen reference, precomputed.
        beta: inverse temperature; β → 0 is gradient ascent.
    """
    return -2 / beta * jnp.mean(jax.nn.log_sigmoid(-beta * (log_probs - reference)))


def simnpo_loss(token_means: Float[Array, "B"], beta: float, margin: float) -> Scalar:
    """SimNPO, free of a reference: −(2/β) E[log σ(−β (log π)/|y| − βδ)].

    arXiv 2410.07163, eq. 4, in the form of its code: β multiplies the margin δ too, so that the
    argument is β (NLL/|y| − δ).

    Args:
        token_means: log π of each response over its number of tokens.
        beta: inverse temperature (2.5 to 4.5 in the paper's code).
        margin: δ, in nats a token.
    """
    return -2 / beta * jnp.mean(jax.nn.log_sigmoid(beta * (-token_means - margin)))


def dpo_loss(
    preferred_ratio: Float[Array, "B"], forget_ratio: Float[Array, "B"], beta: float
) -> Scalar:
    """DPO with the forget response as the loser: −(2/β) E[log σ(β (r_w − r_l))].

    arXiv 2305.18290, eq. 7, with the factor 2/β that the NPO paper's code gives all of its losses
    (TRL's has none). With "I don't know" as the winner it is IdkDPO.

    Args:
        preferred_ratio: r_w = log π/π_ref of the preferred responses.
        forget_ratio: r_l, the same of the forget responses.
        beta: inverse temperature.
    """
    return -2 / beta * jnp.mean(jax.nn.log_sigmoid(beta * (preferred_ratio - forget_ratio)))


def token_mean(
    values: Float[Array, "B next"], response: Bool[Array, "B T"], total: Scalar | None = None
) -> Scalar:
    """Mean over the response tokens; `total` is their number if these rows are part of a batch."""
    weights = response[:, 1:]
    if total is None:
        total = jnp.maximum(jnp.sum(weights), 1)
    return jnp.sum(jnp.where(weights, values, 0.0)) / total


def cross_entropy(
    log_probs: Float[Array, "B next"], response: Bool[Array, "B T"], total: Scalar | None = None
) -> Scalar:
    """Mean over response tokens of −log π, in nats a token."""
    return -token_mean(log_probs, response, total)


def square_distance(
    hidden: Float[Array, "B T D"], target: Float[Array, "... D"]
) -> Float[Array, "B T-1"]:
    """Mean over features of (hidden − target)², where a token is about to be predicted.

    The distance of RMU's two terms (arXiv 2403.03218, eq. 1 and 2) and of open-unlearning's
    EMBED_DIFF. Place t holds the state that predicts token t + 1. In float32 at least.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    difference = hidden.astype(wide) - target.astype(wide)
    return jnp.mean(jnp.square(difference), axis=-1)[:, :-1]


# The rows.


class ForgetBatch(NamedTuple):
    """Forget examples of one step, the reference's log-probabilities, and preferred responses."""

    batch: Batch
    reference: Float[Array, "B"]  # log π_ref of the forget responses
    preferred: Batch | None = None
    preferred_reference: Float[Array, "B"] | None = None
    total: Scalar | None = None  # response tokens, if these rows are part of a batch
    preferred_total: Scalar | None = None


class RetainBatch(NamedTuple):
    """Retain examples of one step."""

    batch: Batch
    total: Scalar | None = None


@dataclasses.dataclass(frozen=True)
class LossContext:
    """Everything that an objective may use: the model being trained, the base, the settings."""

    model: Decoder
    base: Callable[[], Decoder]
    config: UnlearnConfig

    def token_log_probs(self, batch: Batch) -> Float[Array, "B next"]:
        """Log-probability of every token under the model being trained, in nats."""
        remat = self.config.recompute
        return token_log_probs(self.model, batch.tokens, batch.mask, remat=remat)

    def scores(
        self, batch: Batch, reference: Float[Array, "B"]
    ) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """log π and log π_ref of the responses, as sums or per token (`forget_norm`)."""
        sums = sequence_log_probs(self.token_log_probs(batch), batch.response)
        if self.config.forget_norm == "sum":
            return sums, reference
        lengths = _lengths(batch)
        return sums / lengths, reference / lengths

    def residuals(self, batch: Batch, *, base: bool = False) -> Float[Array, "B T D"]:
        """Residual stream that enters block `feature_layer`; the base's without a gradient."""
        model = self.base() if base else self.model
        depth = model.config.num_layers
        layer = self.config.feature_layer or max(round(depth / 4), 1)
        out = model(batch.tokens, batch.mask, tap=lambda x: x, remat=self.config.recompute)
        return jax.lax.stop_gradient(out.taps[layer]) if base else out.taps[layer]


def _lengths(batch: Batch) -> Float[Array, "B"]:
    return jnp.maximum(jnp.sum(batch.response[:, 1:], axis=1), 1).astype(jnp.float32)


def _ga(context: LossContext, forget: ForgetBatch) -> tuple[Scalar, Metrics]:
    policy, reference = context.scores(forget.batch, forget.reference)
    return ga_loss(policy), {"log_ratio": jnp.mean(policy - reference)}


def _npo(context: LossContext, forget: ForgetBatch) -> tuple[Scalar, Metrics]:
    policy, reference = context.scores(forget.batch, forget.reference)
    return npo_loss(policy, reference, context.config.beta), {
        "log_ratio": jnp.mean(policy - reference)
    }


def _simnpo(context: LossContext, forget: ForgetBatch) -> tuple[Scalar, Metrics]:
    log_probs = context.token_log_probs(forget.batch)
    sums = sequence_log_probs(log_probs, forget.batch.response)
    means = sums / _lengths(forget.batch)
    loss = simnpo_loss(means, context.config.beta, context.config.margin)
    return loss, {"log_ratio": jnp.mean(sums - forget.reference)}


def _dpo(context: LossContext, forget: ForgetBatch) -> tuple[Scalar, Metrics]:
    assert forget.preferred is not None
    assert forget.preferred_reference is not None
    policy, reference = context.scores(forget.batch, forget.reference)
    winner, reference_winner = context.scores(forget.preferred, forget.preferred_reference)
    loss = dpo_loss(winner - reference_winner, policy - reference, context.config.beta)
    metrics = {"preferred_log_ratio": jnp.mean(winner - reference_winner)}
    return loss, {"log_ratio": jnp.mean(policy - reference)} | metrics


def _sft(context: LossContext, forget: ForgetBatch) -> tuple[Scalar, Metrics]:
    """Cross-entropy on the preferred responses to the forget prompts: plain fine-tuning."""
    assert forget.preferred is not None
    log_probs = context.token_log_probs(forget.preferred)
    return cross_entropy(log_probs, forget.preferred.response, forget.preferred_total), {}


def _rmu(context: LossContext, forget: ForgetBatch) -> tuple[Scalar, Metrics]:
    """RMU: E‖h_l(forget) − c·u‖²/d over response tokens (arXiv 2403.03218, eq. 1).

    u is a unit vector drawn uniformly from the positive orthant, as in its code; the same one for
    every seed. Its retain side is `l2`.
    """
    hidden = context.residuals(forget.batch)
    u = jax.random.uniform(jax.random.key(0), hidden.shape[-1:], jnp.float32)
    u = u.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    distances = square_distance(hidden, context.config.steering * u / jnp.linalg.norm(u))
    return token_mean(distances, forget.batch.response, forget.total), {}


def _ce(context: LossContext, retain: RetainBatch) -> Scalar:
    log_probs = context.token_log_probs(retain.batch)
    return cross_entropy(log_probs, retain.batch.response, retain.total)


def _divergences(context: LossContext, batch: Batch) -> Float[Array, "B T"]:
    base, remat = context.base(), context.config.recompute
    hidden = context.model(batch.tokens, batch.mask, remat=remat).hidden
    reference = jax.lax.stop_gradient(base(batch.tokens, batch.mask).hidden)
    return token_divergences(context.model, base, hidden, reference)


def _kl(context: LossContext, retain: RetainBatch) -> Scalar:
    """KL(base ‖ model), mean over the response tokens, in nats a token."""
    divergences = _divergences(context, retain.batch)[:, :-1]
    return token_mean(divergences, retain.batch.response, retain.total)


def _kl_unmasked(context: LossContext, retain: RetainBatch) -> Scalar:
    """KL(base ‖ model) over all B·T places, prompt and padding too: open-unlearning's.

    For comparison with its figures only.
    """
    return jnp.mean(_divergences(context, retain.batch))


def _l2(context: LossContext, retain: RetainBatch) -> Scalar:
    """E‖h_l − h_l(base)‖²/d over response tokens (arXiv 2403.03218, eq. 2)."""
    batch = retain.batch
    distances = square_distance(context.residuals(batch), context.residuals(batch, base=True))
    return token_mean(distances, batch.response, retain.total)


class Forget(NamedTuple):
    """The forget side of an objective."""

    loss: Callable[[LossContext, ForgetBatch], tuple[Scalar, Metrics]]
    preferred: bool = False  # needs preferred responses to the forget prompts


FORGET: dict[str, Forget] = {
    "ga": Forget(_ga),
    "npo": Forget(_npo),
    "simnpo": Forget(_simnpo),
    "dpo": Forget(_dpo, preferred=True),
    "rmu": Forget(_rmu),
    "sft": Forget(_sft, preferred=True),
}

RETAIN: dict[str, Callable[[LossContext, RetainBatch], Scalar]] = {
    "ce": _ce,
    "kl": _kl,
    "kl_unmasked": _kl_unmasked,
    "l2": _l2,
}


def total_loss(
    context: LossContext,
    forget: ForgetBatch,
    retain: RetainBatch | None,
) -> tuple[Scalar, Metrics]:
    """forget_weight · forget + retain_weight · retain, with each of them as a metric."""
    forget_loss, metrics = FORGET[context.config.objective].loss(context, forget)
    metrics = {"forget_loss": forget_loss} | metrics
    loss = context.config.forget_weight * forget_loss
    if retain is not None:
        metrics["retain_loss"] = RETAIN[context.config.retain_objective](context, retain)
        loss += context.config.retain_weight * metrics["retain_loss"]
    return loss, metrics | {"loss": loss}
