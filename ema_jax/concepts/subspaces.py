"""Overlap of the subspaces of two domains' top directions, at every layer."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from ema_jax.concepts.resampling import PairFigures

# Coordinates of each domain: its own leading directions, far more than are compared.
_COORDINATES = 32


class Subspaces(NamedTuple):
    """Overlap ‖UᵀV‖²/k of top-k subspaces with null, ceiling and interval, and the angles."""

    overlap: PairFigures
    angles_degrees: Float[np.ndarray, "L1 D D k"]  # principal angles, smallest first


def principal_angles(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], k: int
) -> Float[np.ndarray, " k"]:
    """Angles in degrees between the spans of the k top right singular vectors, smallest first."""
    bases = [np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)[2][:k] for x in (a, b)]
    return _angles(np.linalg.svd(bases[0] @ bases[1].T, compute_uv=False))


# Thousands of small systems, as in `probes`.
@threadpool_limits.wrap(limits=1, user_api="blas")
def subspaces(
    layers: Iterable[Float[np.ndarray, "N d"]],
    sizes: Sequence[int],
    *,
    k: int = 4,
    splits: int,
    bootstraps: int,
    seed: int,
) -> Subspaces:
    """Overlap of the domains' top-k subspaces around the mean of the contrast set.

    Around the contrast set, so that the concept vector is among a domain's directions. Null: two
    random k-dimensional subspaces, in expectation k/d (labels cannot be permuted here: mixing two
    domains makes them alike). Ceiling: the geometric mean of the two domains' split-half overlaps,
    not stepped up by Spearman-Brown, so that it is below that of all prompts.

    Args:
      layers: rows by layer.
      sizes: rows of each of the D domains, which come in this order, and of the contrast set.
      k: dimensions compared; fewer where half a domain has fewer prompts.
      splits: random halves behind the ceiling.
      bootstraps: redrawings of the prompts behind the interval.
      seed: of all of them.
    """
    k = min(k, min(sizes[:-1]) // 2)
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=bootstraps) for n in sizes[:-1]]
    first = [rng.permuted(np.tile(np.arange(n) < n // 2, (splits, 1)), axis=1) for n in sizes[:-1]]
    figures, angles = [], []
    null = None
    for x in layers:
        rows = np.split(x.astype(np.float32), np.cumsum(sizes)[:-1])
        centre = rows.pop().mean(axis=0)
        if null is None:
            null = _random_overlaps(rng, x.shape[1], k)
        # Everything below happens in each domain's own leading coordinates.
        bases, coordinates = zip(*(_leading(each - centre) for each in rows), strict=True)
        cross = [[a @ b.T for b in bases] for a in bases]
        full = [_top(z, np.ones((1, len(z))), k) for z in coordinates]
        redrawn = [_top(z, c, k) for z, c in zip(coordinates, counts, strict=True)]
        halves = [
            (_top(z, chosen, k), _top(z, ~chosen, k))
            for z, chosen in zip(coordinates, first, strict=True)
        ]
        same = np.array([_overlaps(a, b)[1].mean() for a, b in halves])
        cosines, observed = _table(full, cross)
        ceiling = np.sqrt(np.outer(same, same))
        spread = _table(redrawn, cross)[1].std(axis=0, ddof=1)
        observed = observed[0]
        interval = np.stack([observed - 1.96 * spread, observed + 1.96 * spread], axis=-1)
        figures.append(
            PairFigures(
                observed,
                np.full_like(observed, np.quantile(null, 0.95)),
                np.full_like(observed, null.mean()),
                ceiling,
                observed / np.where(ceiling > 0, ceiling, np.nan),
                np.clip(interval, 0, 1),
            )
        )
        angles.append(_angles(cosines[0]))
    return Subspaces(PairFigures(*map(np.stack, zip(*figures, strict=True))), np.stack(angles))


def _leading(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The leading right singular vectors of rows `[r, d]`, and the rows in them `[n, r]`."""
    values, vectors = np.linalg.eigh((x @ x.T).astype(np.float64))
    leading = slice(None, -min(_COORDINATES, len(x)) - 1, -1)
    scale = np.sqrt(np.maximum(values[leading], 1e-12 * max(values[-1], 1e-30)))
    return ((vectors[:, leading] / scale).T @ x), vectors[:, leading] * scale


def _top(z: np.ndarray, counts: np.ndarray, k: int) -> Float[np.ndarray, "R r k"]:
    """Top-k directions in coordinates, of the rows counted so often."""
    moments = np.einsum("rn,ni,nj->rij", counts.astype(np.float64), z, z, optimize=True)
    return np.linalg.eigh(moments)[1][..., -k:]


def _overlaps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the principal angles of two orthonormal bases, and the mean of their squares."""
    products = a.swapaxes(-1, -2) @ b
    return products, np.square(products).sum(axis=(-1, -2)) / a.shape[-1]


def _table(
    tops: Sequence[np.ndarray], cross: Sequence[Sequence[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """For all pairs `[R, D, D, …]`: cosines of principal angles, and overlaps."""
    pairs = [
        [_overlaps(a, cross[i][j] @ b) for j, b in enumerate(tops)] for i, a in enumerate(tops)
    ]
    products = np.stack([np.stack([p for p, _ in row], 1) for row in pairs], 1)
    overlaps = np.stack([np.stack([o for _, o in row], 1) for row in pairs], 1)
    return np.linalg.svd(products, compute_uv=False), overlaps


def _angles(cosines: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(cosines, 0, 1)))


def _random_overlaps(rng: np.random.Generator, d: int, k: int) -> np.ndarray:
    """Overlaps of random subspaces with a fixed one, which is as random as can be."""
    drawn = (np.linalg.qr(rng.normal(size=(d, k)))[0] for _ in range(100))
    return np.array([np.square(basis[:k]).sum() / k for basis in drawn])
