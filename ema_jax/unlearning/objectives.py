"""Unlearning objectives: the formulas, and one registry row for each.

A formula is a pure function of log-probabilities or activations. A row wires it to the models: it
takes a `LossContext` (the model being trained, the untouched base, the settings, a batch of forget
and retain examples, which share one forward pass) and returns the loss and metrics to log. No row
ever makes a second copy of the weights: under adapters the base is the same arrays with the
adapters off.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ema_jax.data.packing import Packed
from ema_jax.models.decoder import Decoder
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.log_probs import target_log_probs, token_divergences

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


def square_distance(hidden: Float[Array, "... D"], target: Float[Array, "... D"]) -> Array:
    """Mean over features of (hidden − target)².

    The distance of RMU's two terms (arXiv 2403.03218, eq. 1 and 2) and of open-unlearning's
    EMBED_DIFF. In float32 at least.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.mean(jnp.square(hidden.astype(wide) - target.astype(wide)), axis=-1)


# The rows.

FORGOTTEN, PREFERRED, RETAINED = range(3)  # parts of a batch


class LossBatch(NamedTuple):
    """Examples of one forward pass, by number.

    F forget examples, then room for F preferred responses to their prompts, then retain examples.
    """

    rows: Packed
    reference: Float[Array, "F"]  # log π_ref of the forget responses
    preferred_reference: Float[Array, "F"] | None
    totals: Float[Array, "3"]  # places of each part, the mean over all passes of a step


def part_places(examples: Int[Array, "... G N"], forgotten: int) -> Bool[Array, "3 ... G N"]:
    """Which places, by their examples' numbers, are of each part, with so many forget examples."""
    parts = jnp.minimum(examples // forgotten, RETAINED)  # below zero where there is no place
    return parts == jnp.arange(3).reshape(3, *(1,) * examples.ndim)


@dataclasses.dataclass(frozen=True)
class LossContext:
    """Everything that an objective may use: the trained model, the base, settings and examples."""

    model: Decoder
    base: Callable[[], Decoder]
    config: UnlearnConfig
    batch: LossBatch

    @functools.cached_property
    def _states(self) -> tuple[Float[Array, "G N D"], Float[Array, "G N D"] | None]:
        return self._run(self.model, remat=self.config.recompute)

    @functools.cached_property
    def _base_states(self) -> tuple[Float[Array, "G N D"], Float[Array, "G N D"] | None]:
        return jax.lax.stop_gradient(self._run(self.base(), remat=False))

    def _run(
        self, model: Decoder, remat: bool | str
    ) -> tuple[Float[Array, "G N D"], Float[Array, "G N D"] | None]:
        """States at the places: after the final norm, and entering block `feature_layer`."""
        rows, config = self.batch.rows, self.config
        kept = RETAIN.get(config.retain_objective)
        features = FORGET[config.objective].features or (kept is not None and kept.features)
        tap = rows.at_places if features else None
        out = model(rows.tokens, rows.mask, segments=rows.segments, tap=tap, remat=remat)
        layer = config.feature_layer or max(round(model.config.num_layers / 4), 1)
        return rows.at_places(out.hidden), out.taps[layer] if features else None

    @functools.cached_property
    def log_probs(self) -> Float[Array, "G N"]:
        """Log-probability of every place's target under the model being trained, in nats."""
        return target_log_probs(
            self.model,
            self._states[0],
            self.batch.rows.targets,
            used=self.batch.rows.examples >= 0,
            frozen_head=self.config.trainable == "lora",
        )

    @property
    def divergences(self) -> Float[Array, "G N"]:
        """KL(base ‖ model) of the next token's distribution at every place, in nats."""
        return token_divergences(self.model, self.base(), self._states[0], self._base_states[0])

    def residuals(self, *, base: bool = False) -> Float[Array, "G N D"]:
        """Residual stream that enters block `feature_layer`; the base's without a gradient."""
        found = (self._base_states if base else self._states)[1]
        assert found is not None
        return found

    def scores(
        self, part: int, reference: Float[Array, "F"], norm: str = ""
    ) -> tuple[Float[Array, "F"], Float[Array, "F"]]:
        """log π and log π_ref of a part's responses, as sums or per token (`forget_norm`)."""
        rows, number = self.batch.rows, self.batch.reference.shape[0]
        sums = rows.sums(self.log_probs, part * number, number)
        if (norm or self.config.forget_norm) == "sum":
            return sums, reference
        ones = jnp.ones_like(self.log_probs)
        lengths = jnp.maximum(rows.sums(ones, part * number, number), 1)
        return sums / lengths, reference / lengths

    def token_mean(self, values: Float[Array, "G N"], part: int) -> Scalar:
        """Mean over the places of a part: over its response tokens."""
        chosen = part_places(self.batch.rows.examples, self.batch.reference.shape[0])[part]
        return jnp.sum(jnp.where(chosen, values, 0.0)) / self.batch.totals[part]


def _ga(context: LossContext) -> tuple[Scalar, Metrics]:
    policy, reference = context.scores(FORGOTTEN, context.batch.reference)
    return ga_loss(policy), {"log_ratio": jnp.mean(policy - reference)}


def _npo(context: LossContext) -> tuple[Scalar, Metrics]:
    policy, reference = context.scores(FORGOTTEN, context.batch.reference)
    return npo_loss(policy, reference, context.config.beta), {
        "log_ratio": jnp.mean(policy - reference)
    }


def _simnpo(context: LossContext) -> tuple[Scalar, Metrics]:
    reference = context.batch.reference
    sums, means = (context.scores(FORGOTTEN, reference, norm)[0] for norm in ("sum", "mean"))
    loss = simnpo_loss(means, context.config.beta, context.config.margin)
    return loss, {"log_ratio": jnp.mean(sums - reference)}


def _dpo(context: LossContext) -> tuple[Scalar, Metrics]:
    assert context.batch.preferred_reference is not None
    policy, reference = context.scores(FORGOTTEN, context.batch.reference)
    winner, winner_reference = context.scores(PREFERRED, context.batch.preferred_reference)
    loss = dpo_loss(winner - winner_reference, policy - reference, context.config.beta)
    metrics = {"preferred_log_ratio": jnp.mean(winner - winner_reference)}
    return loss, {"log_ratio": jnp.mean(policy - reference)} | metrics


def _sft(context: LossContext) -> tuple[Scalar, Metrics]:
    """Cross-entropy on the preferred responses to the forget prompts: plain fine-tuning."""
    return -context.token_mean(context.log_probs, PREFERRED), {}


def _rmu(context: LossContext) -> tuple[Scalar, Metrics]:
    """RMU: E‖h_l(forget) − c·u‖²/d over response tokens (arXiv 2403.03218, eq. 1).

    u is a unit vector drawn uniformly from the positive orthant, as in its code; the same one for
    every seed. Its retain side is `l2`. h_l is the state that predicts a token of the response.
    """
    hidden = context.residuals()
    u = jax.random.uniform(jax.random.key(0), hidden.shape[-1:], jnp.float32)
    u = u.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    distances = square_distance(hidden, context.config.steering * u / jnp.linalg.norm(u))
    return context.token_mean(distances, FORGOTTEN), {}


def _ce(context: LossContext) -> Scalar:
    """Mean over response tokens of −log π, in nats a token."""
    return -context.token_mean(context.log_probs, RETAINED)


def _kl(context: LossContext) -> Scalar:
    """KL(base ‖ model), mean over the response tokens, in nats a token.

    As `kl_unmasked`, whose places are everywhere in the retain rows, prompt and padding too, it is
    open-unlearning's, for comparison with its figures only.
    """
    return context.token_mean(context.divergences, RETAINED)


def _l2(context: LossContext) -> Scalar:
    """E‖h_l − h_l(base)‖²/d over response tokens (arXiv 2403.03218, eq. 2)."""
    distances = square_distance(context.residuals(), context.residuals(base=True))
    return context.token_mean(distances, RETAINED)


class Forget(NamedTuple):
    """The forget side of an objective."""

    loss: Callable[[LossContext], tuple[Scalar, Metrics]]
    forget: bool = True  # needs the refusals
    preferred: bool = False  # needs preferred responses to the forget prompts
    features: bool = False  # needs the residual stream entering block `feature_layer`


class Retain(NamedTuple):
    """The retain side of an objective."""

    loss: Callable[[LossContext], Scalar]
    features: bool = False
    everywhere: bool = False  # looks at prompts and padding too: an example in each row


FORGET: dict[str, Forget] = {
    "ga": Forget(_ga),
    "npo": Forget(_npo),
    "simnpo": Forget(_simnpo),
    "dpo": Forget(_dpo, preferred=True),
    "rmu": Forget(_rmu, features=True),
    "sft": Forget(_sft, forget=False, preferred=True),
}

RETAIN: dict[str, Retain] = {
    "ce": Retain(_ce),
    "kl": Retain(_kl),
    "kl_unmasked": Retain(_kl, everywhere=True),
    "l2": Retain(_l2, features=True),
}


def total_loss(context: LossContext) -> tuple[Scalar, Metrics]:
    """forget_weight · forget + retain_weight · retain, with each of them as a metric."""
    config = context.config
    forget_loss, metrics = FORGET[config.objective].loss(context)
    metrics = {"forget_loss": forget_loss} | metrics
    loss = config.forget_weight * forget_loss
    if config.retain_objective != "none":
        metrics["retain_loss"] = RETAIN[config.retain_objective].loss(context)
        loss += config.retain_weight * metrics["retain_loss"]
    return loss, metrics | {"loss": loss}
