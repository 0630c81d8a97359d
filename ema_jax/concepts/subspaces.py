"""Overlap of the subspaces of two domains' top directions, at every layer."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from ema_jax.concepts.resampling import PairFigures, central

# Coordinates of each domain: its own leading directions, far more than are compared.
_COORDINATES = 32


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
) -> PairFigures:
    """Overlap ‖UᵀV‖²/k of the domains' top-k subspaces around the mean of the contrast set.

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
    figures, null = [], None
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
        same = np.array([_overlaps(a, b).mean() for a, b in halves])
        observed = _table(full, cross)[0]
        ceiling = np.sqrt(np.outer(same, same))
        spread = _table(redrawn, cross).std(axis=0, ddof=1)
        interval = np.stack([observed - 1.96 * spread, observed + 1.96 * spread], axis=-1)
        figures.append(
            PairFigures(
                observed,
                np.full_like(observed, np.quantile(null, 0.95)),
                np.full_like(observed, null.mean()),
                ceiling,
                observed / np.where(ceiling > 0, ceiling, np.nan),
                np.clip(interval, 0, 1),
                np.broadcast_to(central(np.ravel(null)), (*observed.shape, 2)),
            )
        )
    return PairFigures(*map(np.stack, zip(*figures, strict=True)))


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


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared cosine of the principal angles of two orthonormal bases."""
    return np.square(a.swapaxes(-1, -2) @ b).sum(axis=(-1, -2)) / a.shape[-1]


def _table(
    tops: Sequence[np.ndarray], cross: Sequence[Sequence[np.ndarray]]
) -> Float[np.ndarray, "R D D"]:
    """Overlaps of all pairs of domains."""
    pairs = [
        [_overlaps(a, cross[i][j] @ b) for j, b in enumerate(tops)] for i, a in enumerate(tops)
    ]
    return np.stack([np.stack(row, 1) for row in pairs], 1)


def _random_overlaps(rng: np.random.Generator, d: int, k: int) -> np.ndarray:
    """Overlaps of random subspaces with a fixed one, which is as random as can be."""
    drawn = (np.linalg.qr(rng.normal(size=(d, k)))[0] for _ in range(100))
    return np.array([np.square(basis[:k]).sum() / k for basis in drawn])
