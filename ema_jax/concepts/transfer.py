"""Does one domain's probe find another? Cross-fitted AUROC for all pairs, from Gram matrices.

The probe of a domain is its difference in means against the contrast set, taken on one half of the
prompts; it is scored on the other half of every domain against the other half of the contrast set.
Scores are inner products of prompts, so a redrawn probe costs no more for a wide model.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ema_jax.concepts.resampling import PairFigures, gram_matrix

_CHUNK = 16


@partial(jax.jit, static_argnames="sizes")
def _aurocs(
    gram: Float[jax.Array, "N N"], order: Int[jax.Array, "R N"], *, sizes: tuple[int, ...]
) -> Float[jax.Array, "R D D"]:
    """AUROC of the probe of each domain (rows) on each (columns), halves swapped and averaged.

    `order[r]` says which prompt takes each place; the first half of a group's places is one fold.
    """
    starts = np.cumsum((0, *sizes))
    D = len(sizes) - 1
    folds = []
    for flip in (False, True):
        fit, held = [], []
        for start, n in zip(starts, sizes, strict=False):
            halves = [np.arange(start, start + n // 2), np.arange(start + n // 2, start + n)]
            fit.append(halves[flip])
            held.append(halves[not flip])
        folds.append((fit, held))

    def one(places: Int[jax.Array, "N"]) -> Float[jax.Array, "D D"]:
        def fold(fit: list[np.ndarray], held: list[np.ndarray]) -> Float[jax.Array, "D D"]:
            weights = jnp.stack(
                [jnp.zeros(gram.shape[0]).at[places[rows]].add(1 / len(rows)) for rows in fit]
            )
            scores = (weights[:D] - weights[D]) @ gram  # [D, N]
            negative = scores[:, places[held[D]]]

            def against(rows: np.ndarray) -> Float[jax.Array, "D"]:
                difference = scores[:, places[rows], None] - negative[:, None]
                return (jnp.sign(difference).mean(axis=(1, 2)) + 1) / 2

            return jnp.stack([against(rows) for rows in held[:D]], axis=1)

        return jnp.stack([fold(*each) for each in folds]).mean(axis=0)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(one, order, batch_size=min(_CHUNK, len(order)))


def probe_transfer(
    layers: Iterable[Float[np.ndarray, "N d"]],
    sizes: Sequence[int],
    *,
    permutations: int,
    splits: int,
    bootstraps: int,
    seed: int,
) -> PairFigures:
    """Probe transfer between all pairs of domains at every layer, both ways averaged.

    Observed: the mean over random halves. Null: labels shuffled among all prompts. Ceiling: the
    geometric mean of the two domains' own held-out AUROCs. Disattenuated: the share of the
    ceiling's distance from one half. Interval: from redrawing prompts inside each half, so that no
    prompt is both fitted and scored.

    Args:
      layers: rows by layer, near the origin.
      sizes: rows of each of the D domains, which come in this order, and of the contrast set.
      permutations: behind the null.
      splits: random halves behind the observed value.
      bootstraps: behind the interval.
      seed: of all of them.
    """
    sizes = tuple(sizes)
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.tile(np.arange(sum(sizes)), (permutations, 1)), axis=1)
    halves = _within(rng, splits, sizes)
    redrawn = _redrawn(rng, _within(rng, bootstraps, sizes), sizes)
    found = []
    for x in layers:
        gram = gram_matrix(x)
        split, null, again = (
            np.asarray(_aurocs(gram, order.astype(np.int32), sizes=sizes), np.float64)
            for order in (halves, shuffled, redrawn)
        )
        mean = split.mean(axis=0)
        ceiling = np.sqrt(np.outer(np.diag(mean), np.diag(mean)))
        observed, null, again = (_symmetric(each) for each in (mean, null, again))
        spread = again.std(axis=0, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(ceiling > 0.5, (observed - 0.5) / (ceiling - 0.5), np.nan)
        interval = np.stack([observed - 1.96 * spread, observed + 1.96 * spread], axis=-1)
        found.append(
            PairFigures(
                observed,
                np.quantile(null, 0.95, axis=0),
                null.mean(axis=0),
                ceiling,
                share,
                np.clip(interval, 0, 1),
            )
        )
    return PairFigures(*map(np.stack, zip(*found, strict=True)))


def _symmetric(x: np.ndarray) -> np.ndarray:
    return (x + x.swapaxes(-1, -2)) / 2


def _within(rng: np.random.Generator, repeats: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Prompts shuffled inside each group."""
    starts = np.cumsum((0, *sizes))
    return np.concatenate(
        [
            rng.permuted(np.tile(np.arange(start, start + n), (repeats, 1)), axis=1)
            for start, n in zip(starts, sizes, strict=False)
        ],
        axis=1,
    )


def _redrawn(rng: np.random.Generator, order: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Inside each half of each group of every row of `order`, prompts drawn with replacement."""
    columns, start = [], 0
    for n in sizes:
        for size in (n // 2, n - n // 2):
            drawn = rng.integers(0, size, size=(len(order), size))
            columns.append(np.take_along_axis(order[:, start : start + size], drawn, axis=1))
            start += size
    return np.concatenate(columns, axis=1)
