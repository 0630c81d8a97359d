"""Directional ablation, the baseline without training: the refusal direction is projected out.

arXiv 2406.11717: the difference in means between prompts that are refused and prompts that are
not, at the last token, is a direction r; no weight may write along it any more (section 2.4,
W ← W − W r̂ r̂ᵀ for what writes to the residual stream). Of the candidate layers the one that leaves
the fewest refusals on the dev split is taken, as long as responses stay valid.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ema_jax.models.decoder import Decoder
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.unlearning.config import AblationArm
from ema_jax.unlearning.trainer import Trained

# Directions of the last fifth of the layers are about the next word (their section 2.3).
_DEPTH = 0.8


def orthogonalise(base: Decoder, direction: Float[np.ndarray, "D"]) -> Decoder:
    """The model whose embeddings, attention and MLPs write nothing along `direction`.

    With tied embeddings the head, being the same matrix, no longer reads along it either.
    """
    unit = jnp.asarray(direction / np.linalg.norm(direction), jnp.float32)

    def without(kernel: Array) -> nnx.Param:
        # As it lies on the devices: laid out otherwise, the model would need programs of its own.
        return nnx.Param(jax.jit(_without, out_shardings=kernel.sharding)(kernel, unit))

    model = nnx.merge(*nnx.split(base))
    model.embed = without(base.embed[...])
    for name in ("o_proj", "down_proj"):
        getattr(model.blocks, name).kernel = without(getattr(base.blocks, name).kernel[...])
    return model


def _without(kernel: Float[Array, "*stack D"], unit: Float[Array, "D"]) -> Float[Array, "*stack D"]:
    """The kernel without what it writes along `unit`, computed in float32.

    Layer by layer: one stack of a 7B model's MLP would be 7.5 GB in float32, several times.
    """
    if kernel.ndim > 2:
        return jax.lax.map(lambda layer: _without(layer, unit), kernel)
    wide = kernel.astype(jnp.float32)
    along = jnp.matmul(wide, unit, precision=jax.lax.Precision.HIGHEST)
    return (wide - along[:, None] * unit).astype(kernel.dtype)


def ablate(
    base: Decoder,
    directions: Float[np.ndarray, "L1 D"],
    arm: AblationArm,
    *,
    target: str,
    evaluate: Callable[[Decoder], Evaluation],
) -> Trained:
    """The ablation of the candidate layer that leaves the fewest refusals of the target.

    Args:
        base: the untouched model.
        directions: the target's concept vector at every layer.
        arm: the candidate layers, and what counts as damaged.
        target: the domain whose refusals are to be removed.
        evaluate: dev rates of a model.

    Returns:
        The model; its trajectory has a point for the base and one for each candidate.
    """
    first, last = arm.layers or (1, max(math.floor(_DEPTH * (len(directions) - 1)), 1))
    trajectory: list[dict[str, Any]] = []

    def measured(step: int, model: Decoder, layer: int | None) -> Evaluation:
        rates = evaluate(model)
        trajectory.append(rates.point(step) | ({} if layer is None else {"layer": layer}))
        return rates

    measured(0, base, None)
    best: tuple[tuple, int] | None = None
    for step, layer in enumerate(range(first, last + 1), start=1):
        rates = measured(step, orthogonalise(base, directions[layer]), layer)
        rate = rates.refusal[target]
        # Degenerate output is no success: undamaged candidates first, then the lowest rate.
        damaged = rates.damaged(target, arm.max_invalid)
        order = (damaged, math.isnan(rate), rate, layer)
        if best is None or order < best[0]:
            best = (order, layer)
    assert best is not None
    (invalid, _, rate, layer), _ = best
    stopped = "invalid" if invalid else "target" if rate <= arm.stop_at else "limit"
    model = orthogonalise(base, directions[layer])
    candidates = len(trajectory) - 1
    return Trained(model, candidates, stopped, math.nan, trajectory, candidates)
