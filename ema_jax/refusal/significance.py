"""Tests of paired changes: exact p-values, their correction for many domains, and power."""

import math
from collections.abc import Mapping

import numpy as np


def sign_flip_p(differences: np.ndarray) -> float:
    """Exact two-sided p of the sign-flip test on the sum of integer differences.

    The null distribution is a convolution of scaled binomials, one for each absolute difference.
    """
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    null = np.ones(1)  # over sums −m … m in steps of 1
    for size, count in zip(sizes, counts, strict=True):
        flips = np.zeros(2 * size * count + 1)
        flips[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        null = np.convolve(null, flips)
    sums = np.abs(np.arange(null.size) - null.size // 2)
    return float(min(1.0, null[sums >= abs(int(differences.sum()))].sum()))


def detectable_drop(
    n: int, gained: float = 0.0, *, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """The smallest true drop that a paired test of n prompts finds with the given power.

    Connor's sample size formula for McNemar's test (Biometrics 1987), solved for the drop δ; the
    share of discordant pairs is taken as δ + 2·gained.

    Args:
        n: prompts (or clusters).
        gained: share of prompts newly refused, the noise against the drop.
        alpha: two-sided level.
        power: wanted power.

    Returns:
        The drop in (0, 1], or None if n prompts cannot show any.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z_alpha, z_power = norm.isf(alpha / 2), norm.isf(1 - power)

    def shortfall(drop: float) -> float:
        discordant = min(1.0, drop + 2 * gained)
        spread = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(
            max(0.0, discordant - drop**2)
        )
        return spread - drop * math.sqrt(n)

    return float(brentq(shortfall, 1e-9, 1.0)) if shortfall(1.0) <= 0 else None


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values, by name; an empty family gives {}."""
    # Three lines: statsmodels' routine collects garbage on every call and takes 60 ms.
    order = sorted(p, key=lambda name: p[name])
    adjusted = np.maximum.accumulate([(len(p) - i) * p[name] for i, name in enumerate(order)])
    by_name = dict(zip(order, np.minimum(adjusted, 1.0).tolist(), strict=True))
    return {name: by_name[name] for name in p}
