"""Refusal corrected for the judge's errors, which a person's labels on a sample reveal.

Rogan and Gladen (American Journal of Epidemiology, 1978): with a share p of responses judged
refused, by a judge of known sensitivity and specificity, the share truly refused is
(p + specificity − 1) / (sensitivity + specificity − 1).

The sample is drawn by what the judge said, so what it estimates directly is how often a response
judged refused is one (the positive predictive value) and how often one judged otherwise is one all
the same. Sensitivity and specificity follow from these two and the share judged refused among all
responses sampled from. For intervals the three proportions behind a corrected share are drawn from
their Jeffreys posteriors, with Kish's effective number of labels where sampling weights differ.
That the sample is stratified by arm and domain as well is not used, so the intervals are a little
wide where domains differ. Their coverage is simulated in `tests/test_sheet.py`.

One pair of error rates holds for every arm and domain: too few labels are made to have one each.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ema_jax.refusal.verdicts import REFUSED, SHARES, UNJUDGED

LABELS = tuple(share for share in SHARES if share != UNJUDGED)
DRAWS = 4000

Triples = Sequence[tuple[str, str, float]]


class Errors(NamedTuple):
    """What is known of a judge.

    Attributes:
        judged_refused: share of all responses.
        refused_if_judged: labels among responses judged refused: `(refused, all)`, as effective
            numbers.
        refused_if_not: the same among the others.
    """

    judged_refused: float
    refused_if_judged: tuple[float, float]
    refused_if_not: tuple[float, float]

    @classmethod
    def of(cls, labelled: Triples, judged_refused: float) -> "Errors":
        """From `(judge's share, label, sampling weight)` of every labelled response."""
        counts = []
        for judged in (True, False):
            here = [(y, w) for x, y, w in labelled if (x == REFUSED) == judged]
            n = _effective([w for _, w in here])
            total = sum(w for _, w in here) or 1.0
            counts.append((n * sum(w for y, w in here if y == REFUSED) / total, n))
        return cls(judged_refused, *counts)

    def rates(self) -> tuple[float | None, float | None]:
        """Sensitivity and specificity; None where no label speaks of them."""
        values = [x / n if n else np.nan for x, n in (self.refused_if_judged, self.refused_if_not)]
        rates = _rates(self.judged_refused, *(np.array([value]) for value in values))
        return tuple(None if np.isnan(x[0]) else float(x[0]) for x in rates)  # type: ignore[return-value]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Sensitivity and specificity as far as they are known, `[DRAWS]` each."""
        values = (_jeffreys(rng, *x) for x in (self.refused_if_judged, self.refused_if_not))
        return _rates(self.judged_refused, *values)


def corrected_share(
    refused: float, total: float, errors: Errors, *, seed: int = 0
) -> dict[str, Any]:
    """The share of responses that are truly refusals.

    Args:
        refused: judged so.
        total: all that were judged, refused or not, valid or not.
        errors: of the judge.
        seed: of the draws.

    Returns:
        `apparent`, `share` (cut to [0, 1]) and `ci95`; where the judge may know nothing
        (sensitivity + specificity ≤ 1 in over 2.5 % of the draws): None and [0, 1].
    """
    rng = np.random.default_rng(seed)
    drawn = _rogan_gladen(_jeffreys(rng, refused, total), *errors.draw(rng))
    apparent = refused / total if total else None
    unknown = {"apparent": apparent, "share": None, "ci95": [0.0, 1.0]}
    if apparent is None or np.isnan(drawn).mean() > 0.025 or None in (rates := errors.rates()):
        return unknown
    point = _rogan_gladen(np.array([apparent]), *(np.array([x]) for x in rates))[0]
    return unknown | {"share": _number(np.clip(point, 0, 1)), "ci95": _ends(np.clip(drawn, 0, 1))}


def corrected_drop(
    base: Sequence[float], arm: Sequence[float], errors: Errors, *, seed: int = 0
) -> dict[str, Any]:
    """The drop of the truly refused share from base to arm, `(refused, total)` each.

    The interval takes base and arm as unpaired, which is wider than paired figures need.

    Returns:
        `drop` and `ci95`; None and [-1, 1] as in `corrected_share`.
    """
    rng = np.random.default_rng(seed)
    before, after = (_jeffreys(rng, *counts) for counts in (base, arm))
    sensitivity, specificity = errors.draw(rng)
    ends = [_rogan_gladen(p, sensitivity, specificity) for p in (before, after)]
    drawn = np.clip(ends[0], 0, 1) - np.clip(ends[1], 0, 1)
    shares = [corrected_share(x, n, errors, seed=seed)["share"] for x, n in (base, arm)]
    if None in shares:
        return {"drop": None, "ci95": [-1.0, 1.0]}
    return {"drop": shares[0] - shares[1], "ci95": _ends(drawn)}


def judge_errors(labelled: Triples, judged_refused: float, *, seed: int = 0) -> dict[str, Any]:
    """How often the judge is right: figures over all responses, estimated from the labelled ones.

    Args:
        labelled: `(judge's share, label, sampling weight)` each.
        judged_refused: share of all responses.
        seed: of the draws.

    Returns:
        `labelled` (their number); `accuracy` and Cohen's `kappa` over the four shares;
        `sensitivity` and `specificity` of refused against all else, each `{"value", "ci95"}`; and
        `confusion`: judge's share → label → `{"n", "share", "ci95"}`, the share of responses so
        judged that a person labels so.
    """
    rng, errors = np.random.default_rng(seed), Errors.of(labelled, judged_refused)
    sensitivity, specificity = errors.rates()
    known = [_ends(x) for x in errors.draw(rng)]
    right = [w for x, y, w in labelled if x == y]
    confusion = {}
    for judged in LABELS:
        here = [(y, w) for x, y, w in labelled if x == judged]
        if here:
            confusion[judged] = {
                label: {"n": sum(y == label for y, _ in here)}
                | _share([w for y, w in here if y == label], [w for _, w in here], rng)
                for label in LABELS
            }
    found = _share(right, [w for *_, w in labelled], rng)
    return {
        "labelled": len(labelled),
        "accuracy": {"value": found["share"], "ci95": found["ci95"]},
        "kappa": _kappa(labelled),
        "sensitivity": {"value": sensitivity, "ci95": known[0]},
        "specificity": {"value": specificity, "ci95": known[1]},
        "confusion": confusion,
    }


def _accuracy(labelled: Triples) -> float:
    return sum(w for x, y, w in labelled if x == y) / sum(w for *_, w in labelled)


def _share(some: Sequence[float], all_: Sequence[float], rng: np.random.Generator) -> dict:
    n = _effective(all_)
    share = sum(some) / sum(all_)
    return {"share": share, "ci95": _ends(_jeffreys(rng, n * share, n))}


def _kappa(labelled: Triples) -> float | None:
    table = np.zeros((len(LABELS), len(LABELS)))
    for judged, label, weight in labelled:
        table[LABELS.index(judged), LABELS.index(label)] += weight
    table /= table.sum()
    chance = float(table.sum(0) @ table.sum(1))
    return (float(np.trace(table)) - chance) / (1 - chance) if chance < 1 - 1e-12 else None


def _effective(weights: Sequence[float]) -> float:
    """Kish's number of equally weighted draws that would be worth as much."""
    return sum(weights) ** 2 / sum(w * w for w in weights) if weights else 0.0


def _jeffreys(rng: np.random.Generator, x: float, n: float) -> np.ndarray:
    return rng.beta(x + 0.5, max(n - x, 0.0) + 0.5, DRAWS)


def _rates(q: float, hit: np.ndarray, missed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sensitivity and specificity, from how many of those judged refused, and not, are refused."""
    with np.errstate(invalid="ignore"):
        sensitivity = q * hit / (q * hit + (1 - q) * missed)
        others = (1 - q) * (1 - missed)
        return sensitivity, others / (others + q * (1 - hit))


def _rogan_gladen(p: np.ndarray, sensitivity: np.ndarray, specificity: np.ndarray) -> np.ndarray:
    youden = sensitivity + specificity - 1
    return np.where(youden > 0, (p + specificity - 1) / np.where(youden > 0, youden, 1), np.nan)


def _number(x: Any) -> float | None:
    return None if np.isnan(x) else float(x)


def _ends(draws: np.ndarray) -> list[float]:
    return [float(x) for x in np.nanpercentile(draws, [2.5, 97.5])]


def summary(
    labelled: Mapping[str, Triples],
    judged: Mapping[str, Mapping[str, Sequence[float]]],
    judged_refused: float,
) -> dict[str, Any]:
    """`labels` and `corrected` of `results.json`.

    Args:
        labelled: arm → `(judge's share, label, sampling weight)` each.
        judged: arm → domain → `(refused, total)` of one seed's prompts; `base` among the arms.
        judged_refused: share of all responses that the sample is of.
    """
    together = [triple for triples in labelled.values() for triple in triples]
    errors = Errors.of(together, judged_refused)
    by_arm = {
        arm: {"labelled": len(triples), "accuracy": _accuracy(triples)}
        for arm, triples in labelled.items()
    }
    corrected: dict[str, Any] = {}
    for arm, domains in judged.items():
        corrected[arm] = {d: corrected_share(x, n, errors) for d, (x, n) in domains.items()}
        if arm != "base":
            for d, counts in domains.items():
                drop = corrected_drop(judged["base"][d], counts, errors)
                corrected[arm][d] |= {"drop": drop["drop"], "drop_ci95": drop["ci95"]}
    return {
        "labels": judge_errors(together, judged_refused) | {"by_arm": by_arm},
        "corrected": corrected,
    }
