"""Rogan and Gladen's formula with intervals, for a judge whose errors are estimated from labels.

The formula's three proportions are drawn from Jeffreys posteriors with effective numbers (after
Lang and Reiczigel, Preventive Veterinary Medicine, 2014, who adjust the counts instead): see
`Errors` and its `shrinkage`. `corrected.py` applies them to a study.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ema_jax.refusal.verdicts import REFUSED

DRAWS = 4000

Triples = Sequence[tuple[str, str, float]]


class Errors(NamedTuple):
    """Error rates of a judge, as far as labels show them.

    Attributes:
        judged_refused: share of all responses.
        refused_if_judged: labels among responses judged refused: `(refused, all)`, as effective
            numbers.
        refused_if_not: the same among the others.
        responses: number that the labels stand for, including those whose share is corrected;
            infinite if the labels are of other responses.
    """

    judged_refused: float
    refused_if_judged: tuple[float, float]
    refused_if_not: tuple[float, float]
    responses: float = math.inf

    @classmethod
    def of(cls, labelled: Triples, judged_refused: float) -> "Errors":
        """From `(judge's share, label, sampling weight)` of every labelled response.

        A weight is the number of responses that the labelled one stands for.
        """
        refused, others = (
            _stratified([(y == REFUSED, w) for x, y, w in labelled if (x == REFUSED) == judged])
            for judged in (True, False)
        )
        return cls(judged_refused, refused, others, sum(w for *_, w in labelled))

    def rates(self) -> tuple[float | None, float | None]:
        """Sensitivity and specificity; None without a label that bears on them."""
        values = [x / n if n else np.nan for x, n in (self.refused_if_judged, self.refused_if_not)]
        rates = _rates(self.judged_refused, *(np.array([value]) for value in values))
        return tuple(None if np.isnan(x[0]) else float(x[0]) for x in rates)  # type: ignore[return-value]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Posterior draws of sensitivity and specificity, `[DRAWS]` each."""
        values = (jeffreys(rng, *x) for x in (self.refused_if_judged, self.refused_if_not))
        return _rates(self.judged_refused, *values)

    def shrinkage(self, share: float, total: float) -> float:
        """Fraction of a judged share's variance over studies that remains after correction.

        Of the variance q (1 − q) of a verdict a part r is due to the judge's errors. Where more
        responses than usual are misjudged, the labels show it as far as they are of the same
        responses, and it is corrected away. By the delta method, with one pair of error rates and
        about equal shares everywhere, 1 − f (2 r − r²) stays, f being the part that the corrected
        responses are of all that the labels are of: all of it at f = 0, (1 − r)² at f = 1.

        Args:
            share: truly refused, of the responses to be corrected.
            total: their number, of one seed; counted against the rows of all seeds it makes f
                too small, and the interval too wide rather than too narrow.
        """
        sensitivity, specificity = self.rates()
        q = self.judged_refused
        if sensitivity is None or specificity is None or not 0 < q < 1:
            return 1.0
        of_refused, of_others = (x * (1 - x) for x in (sensitivity, specificity))
        r = min((share * of_refused + (1 - share) * of_others) / (q * (1 - q)), 1.0)
        part = min(total / self.responses, 1.0)
        return max(1 - part * (2 * r - r * r), 0.05)  # not zero: it divides


def _stratified(labels: Sequence[tuple[bool, float]]) -> tuple[float, float]:
    """Weighted share refused, as `(refused, all)` of the effective number of independent labels.

    Strata are distinguished by their weights, which a sheet draws by size; equally large ones count
    as one. A stratum's own share is mixed with the overall one, at the weight of one label, since
    most have few; a stratum of one label so counts as it would without strata. Where all labels
    agree, Kish's number.
    """
    total = sum(w for _, w in labels)
    if not total:
        return 0.0, 0.0
    share = sum(w for y, w in labels if y) / total
    strata: dict[float, list[bool]] = {}
    for y, w in labels:
        strata.setdefault(w, []).append(y)
    variance = 0.0
    for weight, ys in strata.items():
        n = len(ys)
        p = (sum(ys) + share) / (n + 1)
        # The last factor takes out what mixing does to p (1 - p) where strata do not differ.
        variance += n * (weight / total) ** 2 * p * (1 - p) * (n + 1) ** 2 / ((n + 1) ** 2 - n)
    n_effective = share * (1 - share) / variance if variance else effective([w for _, w in labels])
    return n_effective * share, n_effective


def effective(weights: Sequence[float]) -> float:
    """Kish's effective sample size: the number of equally weighted draws worth as much."""
    return sum(weights) ** 2 / sum(w * w for w in weights) if weights else 0.0


def jeffreys(rng: np.random.Generator, x: float, n: float) -> np.ndarray:
    """Draws from the Jeffreys posterior of a proportion seen as x of n, `[DRAWS]`."""
    return rng.beta(x + 0.5, max(n - x, 0.0) + 0.5, DRAWS)


def _rates(q: float, hit: np.ndarray, missed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivity and specificity, from the share refused of those judged refused and of others."""
    with np.errstate(invalid="ignore"):
        sensitivity = q * hit / (q * hit + (1 - q) * missed)
        others = (1 - q) * (1 - missed)
        return sensitivity, others / (others + q * (1 - hit))


def rogan_gladen(p: np.ndarray, sensitivity: np.ndarray, specificity: np.ndarray) -> np.ndarray:
    """The share truly refused; NaN where the judge does no better than chance."""
    youden = sensitivity + specificity - 1
    return np.where(youden > 0, (p + specificity - 1) / np.where(youden > 0, youden, 1), np.nan)


def ends(draws: np.ndarray) -> list[float]:
    """The middle 95 % of the draws, without NaN."""
    return [float(x) for x in np.nanpercentile(draws, [2.5, 97.5])]
