"""Transfer of one domain's probe to another: cross-fitted AUROC for all pairs.

The probe of a domain is its difference in means against the contrast set, taken on one half of the
prompts; it is scored on the other half of every domain against the other half of the contrast set.
Scores are inner products of prompts, read off Gram matrices, so a redrawn probe costs no more for a
wide model.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from ema_jax.concepts.resampling import PairFigures, central, gram_matrix

_ULPS = 4


@partial(jax.jit, static_argnames="sizes")
def _aurocs(
    gram: Float[jax.Array, "N N"], order: Int[jax.Array, "R N"], *, sizes: tuple[int, ...]
) -> Float[jax.Array, "R D D"]:
    """AUROC of the probe of each domain (rows) on each (columns), halves swapped and averaged.

    `order[r]` holds the prompt at each place; the first half of a group's places is one fold.
    """
    group = np.repeat(np.arange(len(sizes)), sizes)
    first = np.concatenate([np.arange(n) < n // 2 for n in sizes])
    D = len(sizes) - 1

    def means(places: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "G N"]:
        """Each group's mean over some places, as weights of all of them."""
        chosen = (group == np.arange(D + 1)[:, None]) & places
        return chosen / chosen.sum(axis=1, keepdims=True)

    fits = np.concatenate([(m := means(half))[:D] - m[D] for half in (first, ~first)])  # [2D, N]

    length = jnp.sqrt(_ULPS * jnp.finfo(gram.dtype).eps * jnp.diagonal(gram))  # [N]

    def one(places: Int[jax.Array, "N"]) -> Float[jax.Array, "D D"]:
        probes = jnp.zeros((len(gram), 2 * D)).at[places].add(fits.T)
        scores = (probes.T @ gram)[:, places]
        # Inner products are known to the rounding of the lengths: closer scores are ties.
        noise = (jnp.abs(probes).T @ length)[:, None] * length[places]
        bounds = jnp.stack([scores - noise, scores + noise])
        found = jnp.zeros((D, D))
        for each, held in zip(jnp.split(bounds, 2, axis=1), (~first, first), strict=True):
            low, high = each[..., None, held & (group < D)]
            contrast_low, contrast_high = each[..., held & (group == D), None]
            # Counted in integers: compilers may vectorise their sums, but not those of floats.
            above = (low > contrast_high).astype(jnp.int32) + (high >= contrast_low)
            share = above.sum(axis=1) / (2 * above.shape[1])
            found += share @ means(held)[:D, held & (group < D)].T / 2
        return found

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(one, order)


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
    order = np.concatenate([halves, shuffled, redrawn]).astype(np.int32)
    found = []
    for x in layers:
        drawn = np.asarray(_aurocs(gram_matrix(x), order, sizes=sizes), np.float64)
        split, null, again = np.split(drawn, [splits, splits + permutations])
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
                central(null),
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
