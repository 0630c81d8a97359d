"""Loss of each domain's concept through an intervention: projection, length, angle and probe."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ema_jax.concepts.rank_agreement import auroc
from ema_jax.concepts.vectors import Activations, LayerVectors
from ema_jax.data.domains import BENIGN
from ema_jax.errors import UserError

_BOOTSTRAPS = 1000

ByDomain = dict[str, np.ndarray]


def erasure(base_vectors: LayerVectors, arm_vectors: LayerVectors) -> ByDomain:
    """Share of each base concept that is gone: 1 - ⟨v', v⟩ / ⟨v, v⟩, `[L+1]` per domain.

    0: untouched; 1: nothing left along the base vector; above 1: reversed; negative: grown. What
    the arm added in other directions does not count. NaN where the base vector is zero.
    """
    with np.errstate(invalid="ignore"):
        return {
            d: 1 - _dot(arm, v) / _dot(v, v) for d, v, arm in _paired(base_vectors, arm_vectors)
        }


def norm_ratio(base_vectors: LayerVectors, arm_vectors: LayerVectors) -> ByDomain:
    """Length of the arm's concept vector over the base's, `[L+1]` per domain."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            d: np.sqrt(_dot(arm, arm) / _dot(v, v))
            for d, v, arm in _paired(base_vectors, arm_vectors)
        }


def angle_degrees(base_vectors: LayerVectors, arm_vectors: LayerVectors) -> ByDomain:
    """Angle between the arm's concept vector and the base's, `[L+1]` per domain, 0 to 180."""

    def angle(v: np.ndarray, arm: np.ndarray) -> np.ndarray:
        # Kahan's form: the arc cosine loses half the digits of small angles.
        v, arm = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, arm))
        return np.degrees(
            2 * np.arctan2(np.linalg.norm(v - arm, axis=1), np.linalg.norm(v + arm, axis=1))
        )

    with np.errstate(invalid="ignore"):
        return {d: angle(v, arm) for d, v, arm in _paired(base_vectors, arm_vectors)}


def _paired(base: LayerVectors, arm: LayerVectors) -> list[tuple[str, np.ndarray, np.ndarray]]:
    missing = set(base) ^ set(arm)
    if missing:
        raise UserError(
            f"erasure: {', '.join(sorted(missing))} only in one of base and arm: "
            "take both from the same prompts"
        )
    return [(d, v.astype(np.float64), arm[d].astype(np.float64)) for d, v in base.items()]


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner product per layer."""
    return np.einsum("ld,ld->l", a, b)


def probe_auroc(
    base_activations: Activations,
    arm_activations: Activations,
    domain: str,
    contrast: str = BENIGN,
    *,
    seed: int = 0,
) -> Float[np.ndarray, " layers"]:
    """AUROC of the base model's concept direction, domain against contrast, in the arm.

    The direction is the base's difference in means on one half of the prompts; the other half's
    arm activations are projected on it; AUROC of the projections, halves swapped and averaged
    (cross-fitted), `[L+1]`. 1: the base probe still separates them; 0.5: chance. With the base as
    the arm it gives the value to compare with. Rows of base and arm are the same prompts in one
    order.

    Raises:
      UserError: if the prompts of base and arm differ in number or are fewer than four.
    """
    rng = np.random.default_rng(seed)
    halves = {}
    for name in (domain, contrast):
        n = len(base_activations[name])
        if n != len(arm_activations[name]) or n < 4:
            raise UserError(
                f"probe of {domain!r}: {n} base and {len(arm_activations[name])} arm prompts of "
                f"{name!r}: needs the same prompts in both, at least four"
            )
        halves[name] = np.array_split(rng.permutation(n), 2)
    folds = []
    for fit, held_out in ((0, 1), (1, 0)):
        mean = {
            name: base_activations[name][halves[name][fit]].mean(axis=0, dtype=np.float64)
            for name in (domain, contrast)
        }
        direction = mean[domain] - mean[contrast]
        rows = {name: arm_activations[name][halves[name][held_out]] for name in mean}
        scores = {name: np.einsum("nld,ld->ln", x, direction) for name, x in rows.items()}
        noise = np.max([_score_noise(x, direction, mean.values()) for x in rows.values()], axis=0)
        folds.append(auroc(scores[domain], scores[contrast], noise))
    return np.mean(folds, axis=0)


def _score_noise(
    x: Float[np.ndarray, "n layers d"],
    direction: Float[np.ndarray, "layers d"],
    means: Iterable[Float[np.ndarray, "layers d"]],
) -> Float[np.ndarray, " layers"]:
    """Largest effect of rounding on a projection of rows on a direction, a difference of means.

    The rows are known to the precision of their type; the direction to that of its means, which may
    be all that it consists of where they are equal.
    """
    known = np.finfo(np.result_type(x, np.float32)).eps * np.abs(direction)
    known += 8 * np.finfo(np.float64).eps * np.sum([np.abs(mean) for mean in means], axis=0)
    return np.einsum("nld,ld->ln", np.abs(x), known).max(axis=1)


class RankedErasure(NamedTuple):
    """A domain's erasure, mean over layers, with its 95 % interval where prompts were given."""

    domain: str
    mean: float
    ci95: tuple[float, float] | None = None


def ranking(
    erasure: Mapping[str, Float[np.ndarray, " layers"]],
    base_activations: Activations | None = None,
    arm_activations: Activations | None = None,
    contrast: str = BENIGN,
    *,
    seed: int = 0,
) -> list[RankedErasure]:
    """Domains by mean erasure over layers, most erased first; layers without a vector left out.

    With both models' activations on the same prompts, each mean gets a normal interval from a
    bootstrap over prompts, redrawn alike in base and arm.
    """
    ranked = []
    for domain, values in erasure.items():
        mean, ci95 = float(np.nanmean(values)), None
        if base_activations is not None and arm_activations is not None:
            spread = _bootstrap_sd(
                base_activations, arm_activations, domain, contrast, np.random.default_rng(seed)
            )
            ci95 = (mean - 1.96 * spread, mean + 1.96 * spread)
        ranked.append(RankedErasure(domain, mean, ci95))
    return sorted(ranked, key=lambda row: -row.mean)


def _bootstrap_sd(
    base: Activations,
    arm: Activations,
    domain: str,
    contrast: str,
    rng: np.random.Generator,
) -> float:
    """Bootstrap standard deviation of the mean erasure over layers."""
    sizes = [len(base[domain]), len(base[contrast])]
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=_BOOTSTRAPS) / n for n in sizes]
    weights = np.hstack([counts[0], -counts[1]])  # [R, n + m], each row adding to zero
    per_layer = []
    for layer in range(base[domain].shape[1]):
        v, arm_v = (
            np.concatenate([x[domain][:, layer], x[contrast][:, layer]]).astype(np.float64)
            for x in (base, arm)
        )
        # Weights add to zero, so moving the origin changes nothing but the rounding.
        v, arm_v = v - v.mean(axis=0), arm_v - arm_v.mean(axis=0)
        along = ((weights @ (arm_v @ v.T)) * weights).sum(axis=1)
        length = ((weights @ (v @ v.T)) * weights).sum(axis=1)
        if length.any():
            per_layer.append(1 - along / length)
    return float(np.mean(per_layer, axis=0).std(ddof=1))
