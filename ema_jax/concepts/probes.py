"""Logistic probes at every layer: held-out accuracy and AUROC, and the direction they find."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from ema_jax.concepts.rank_agreement import auroc, signs
from ema_jax.concepts.vectors import Activations
from ema_jax.data.domains import BENIGN

_NEWTON_STEPS = 50


class Probe(NamedTuple):
    """One domain against the contrast set, `[L+1]` each; the direction is of all prompts."""

    accuracy: Float[np.ndarray, " layers"]
    auroc: Float[np.ndarray, " layers"]
    direction: Float[np.ndarray, "layers width"]


def logistic_probe(
    activations: Activations,
    domain: str,
    contrast: str = BENIGN,
    *,
    penalty: float = 1.0,
    folds: int = 5,
    seed: int = 0,
) -> Probe:
    """Fits a logistic regression at every layer and scores it on prompts it has not seen.

    Activations are divided by their root mean square (one number a layer), so that one penalty
    means the same at every layer. Minimises Σ log-loss + penalty · ‖w‖² / 2, as scikit-learn does
    with C = 1 / penalty.

    Args:
      activations: `{domain: [prompts, L+1, d]}`.
      domain: the positive class.
      contrast: the negative one.
      penalty: of the squared weights.
      folds: of the cross-validation; each keeps the classes' shares.
      seed: of the folds.
    """
    pair = [np.asarray(activations[name], np.float64) for name in (domain, contrast)]
    rng = np.random.default_rng(seed)
    fold = np.concatenate([rng.permutation(len(x)) % folds for x in pair])
    y = np.repeat([1.0, 0.0], [len(x) for x in pair])
    rows = np.concatenate(pair).swapaxes(0, 1)  # [L+1, N, d]
    # Many small systems: side by side over layers, each on one thread. BLAS's own threads take
    # longer to meet than these systems to solve, a hundred times longer where cores are shared.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor() as pool:
        found = pool.map(functools.partial(_of_layer, y=y, fold=fold, penalty=penalty), rows)
        scores, directions, noise = map(np.stack, zip(*found, strict=True))
    held = []
    for k in range(folds):
        positive, negative = (scores[:, (fold == k) & (y == c)] for c in (1, 0))
        held.append(auroc(positive, negative, noise))
    correct = signs(scores, noise[:, None]) * (2 * y - 1)  # [L+1, N]; an even chance counts half
    return Probe(
        (correct.mean(axis=1) + 1) / 2, np.mean(held, axis=0), directions.astype(np.float32)
    )


def _of_layer(
    x: Float[np.ndarray, "N d"], *, y: np.ndarray, fold: np.ndarray, penalty: float
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " d"], float]:
    """Held-out scores of all prompts, the direction that all of them give, rounding of a score."""
    scale = np.sqrt(np.square(x).mean()) or 1.0
    x = x / scale
    # All fits happen in the span of the prompts, which holds every solution.
    values, vectors = np.linalg.eigh(x @ x.T)
    nonzero = values > 1e-10 * max(values[-1], 1e-30)
    z = vectors[:, nonzero] * np.sqrt(values[nonzero])
    scores = np.zeros(len(y))
    for k in np.unique(fold):
        weights, bias = _fit(z[fold != k], y[fold != k], penalty)
        scores[fold == k] = z[fold == k] @ weights + bias
    weights, _ = _fit(z, y, penalty)
    direction = (vectors[:, nonzero] / np.sqrt(values[nonzero]) @ weights) @ x / scale
    # Scores are sums of inner products of prompts, each known to the rounding of the largest
    # eigenvalue, with weights (y - p) / penalty, at most 1 / penalty each.
    noise = 8 * np.finfo(x.dtype).eps * values[-1] * np.sqrt(len(y)) / penalty
    return scores, direction, noise


def _fit(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Newton's method; the bias is not penalised."""
    design = np.hstack([x, np.ones((len(x), 1))])
    ridge = np.append(np.full(x.shape[1], penalty), 0.0)
    w = np.zeros(design.shape[1])
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ w, -500, 500)))
        gradient = design.T @ (p - y) + ridge * w
        curvature = (design.T * np.maximum(p * (1 - p), 1e-12)) @ design + np.diag(ridge)
        step = np.linalg.solve(curvature + 1e-10 * np.eye(len(w)), gradient)
        w -= step
        if np.abs(step).max() < 1e-8:
            break
    return w[:-1], float(w[-1])
