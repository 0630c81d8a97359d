"""95 % intervals: closed forms for few outcomes, and percentiles over prompts and seeds."""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

_PAIR = Field(min_length=2, max_length=2)

Interval = Annotated[list[float], _PAIR]
"""`[low, high]`."""

PartialInterval = Annotated[Sequence[float | None], _PAIR]
"""`[low, high]`, null where nothing is known."""

_Z95 = 1.959964


def wilson(successes: int, trials: int) -> list[float]:
    """Wilson's score interval of a share; [0, 1] without trials."""
    if trials == 0:
        return [0.0, 1.0]
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def bonett_price(lost: float, gained: float, n: int) -> list[float]:
    """Adjusted Wald interval of a paired difference (Bonett and Price, 2012): a pair more each."""
    lost, gained = (lost * n + 1) / (n + 2), (gained * n + 1) / (n + 2)
    centre = lost - gained
    half = _Z95 * math.sqrt((lost + gained - centre**2) / (n + 2))
    return [max(-1.0, centre - half), min(1.0, centre + half)]


def cluster_sums(values: np.ndarray, clusters: Sequence[str] | None) -> np.ndarray:
    """Sums of values over each cluster of prompts, [S, prompts] to [S, clusters].

    Without clusters each prompt is its own, as where no two of them share one.

    Raises:
        ValueError: another number of ids than of prompts.
    """
    if clusters is None:
        return values
    if len(clusters) != values.shape[1]:
        raise ValueError(f"{len(clusters)} cluster ids for {values.shape[1]} prompts")
    found, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = [np.bincount(index, weights=row, minlength=len(found)) for row in values]
    return np.stack(sums)


def resample(rng: np.random.Generator, resamples: int, size: int) -> np.ndarray:
    """Counts of each unit in each bootstrap resample, float32 [resamples, size]."""
    drawn = rng.integers(size, size=(resamples, size), dtype=np.int32)
    drawn += size * np.arange(resamples, dtype=np.int32)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * size)
    return counts.reshape(resamples, size).astype(np.float32)


def percentiles(draws: np.ndarray) -> list[float]:
    """The middle 95 % of bootstrap draws."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return [float(low), float(high)]


def two_way(
    draws: np.ndarray,
    estimate: float,
    residuals: np.ndarray,
    bounds: tuple[float, float],
    spread: float | None = None,
) -> list[float]:
    """95 % interval of a mean over seeds and prompts, from bootstrap draws over both.

    Drawing both ways counts the noise of a single response three times (Owen, Annals of Applied
    Statistics 2007), and percentiles do not know how badly few seeds estimate their own spread. So
    the percentiles' distances from the estimate are scaled, to a half width whose square is

        (t²_{K−1}·MS_prompts + t²_{S−1}·max(MS_seeds − MS_rest, 0)) / (S·K)

    with the mean squares of a two-way analysis of variance: one Student quantile for each source.
    With one seed the second term is unknown and left out.

    Args:
        draws: of the bootstrap, `[resamples]`.
        estimate: of the quantity that they are draws of.
        residuals: `[S, K]` over seeds and prompts (or clusters), with mean zero; the estimate's
            error is their mean's.
        bounds: of the quantity.
        spread: standard deviation of the draws; given where theirs may not be finite, as of a
            ratio, from draws of its linear approximation.
    """
    from scipy.stats import t

    seeds, units = residuals.shape
    low, high = percentiles(draws)
    spread = float(draws.std()) if spread is None else spread
    if units < 2 or spread == 0:
        return [low, high]
    by_seed, by_unit = residuals.mean(1, keepdims=True), residuals.mean(0, keepdims=True)
    of_units = seeds * (by_unit**2).sum() / (units - 1)
    square = t.isf(0.025, units - 1) ** 2 * of_units
    if seeds > 1:
        rest = ((residuals - by_seed - by_unit) ** 2).sum() / ((seeds - 1) * (units - 1))
        of_seeds = units * (by_seed**2).sum() / (seeds - 1)
        square += t.isf(0.025, seeds - 1) ** 2 * max(of_seeds - rest, 0.0)
    scale = math.sqrt(square / (seeds * units)) / (_Z95 * spread)
    low, high = (estimate + scale * (end - estimate) for end in (low, high))
    return [float(max(bounds[0], low)), float(min(bounds[1], high))]


def hull(a: list[float], b: list[float]) -> list[float]:
    """The smallest interval that holds both."""
    return [min(a[0], b[0]), max(a[1], b[1])]
