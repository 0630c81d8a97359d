"""Refusal shares corrected for the judge's errors, as a person's labels on a sample show them.

Rogan and Gladen (American Journal of Epidemiology, 1978): with a share p of responses judged
refused, by a judge of known sensitivity and specificity, the share truly refused is
(p + specificity − 1) / (sensitivity + specificity − 1).

The sample is stratified by the judge's verdict, so it estimates directly the share of refusals
among responses judged refused (the positive predictive value) and among the others. Sensitivity and
specificity follow from these two and the share judged refused among all responses sampled from. The
intervals cover the sampling error of responses and labels; they account for the sample's strata,
and for the labels being of the very responses whose share is corrected (`rogan_gladen.py`). Their
coverage is simulated in `tests/refusal/test_sheet.py`.

One pair of error rates is used for every arm and domain: there are too few labels for one each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ema_jax.refusal.rogan_gladen import Errors, Triples, effective, ends, jeffreys, rogan_gladen
from ema_jax.refusal.verdicts import LABELS


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
        `apparent`, `share` (cut to [0, 1]) and `ci95`; None and [0, 1] where the judge may do no
        better than chance (sensitivity + specificity ≤ 1 in over 2.5 % of the draws).
    """
    rng = np.random.default_rng(seed)
    apparent = refused / total if total else None
    unknown = {"apparent": apparent, "share": None, "ci95": [0.0, 1.0]}
    rates = errors.rates()
    if apparent is None or None in rates:
        return unknown
    point = rogan_gladen(np.array([apparent]), *(np.array([x]) for x in rates))[0]
    if np.isnan(point):
        return unknown
    share = float(np.clip(point, 0, 1))
    less = errors.shrinkage(share, total)
    drawn = rogan_gladen(jeffreys(rng, refused / less, total / less), *errors.draw(rng))
    if np.isnan(drawn).mean() > 0.025:
        return unknown
    return unknown | {"share": share, "ci95": ends(np.clip(drawn, 0, 1))}


def corrected_drop(
    base: Sequence[float], arm: Sequence[float], errors: Errors, *, seed: int = 0
) -> dict[str, Any]:
    """The drop of the truly refused share from base to arm, `(refused, total)` each.

    The interval treats base and arm as unpaired and the labels as of other responses, which makes
    it wider than necessary.

    Returns:
        `drop` and `ci95`; None and [-1, 1] as in `corrected_share`.
    """
    rng = np.random.default_rng(seed)
    before, after = (jeffreys(rng, *counts) for counts in (base, arm))
    sensitivity, specificity = errors.draw(rng)
    shown = [rogan_gladen(p, sensitivity, specificity) for p in (before, after)]
    drawn = np.clip(shown[0], 0, 1) - np.clip(shown[1], 0, 1)
    shares = [corrected_share(x, n, errors, seed=seed)["share"] for x, n in (base, arm)]
    if None in shares:
        return {"drop": None, "ci95": [-1.0, 1.0]}
    return {"drop": shares[0] - shares[1], "ci95": ends(drawn)}


def judge_errors(labelled: Triples, judged_refused: float, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy and error rates of the judge over all responses, estimated from the labelled ones.

    Args:
        labelled: `(judge's share, label, sampling weight)` each.
        judged_refused: share of all responses.
        seed: of the draws.

    Returns:
        `labelled` (their number); `accuracy` and Cohen's `kappa` over the four shares;
        `sensitivity` and `specificity` of refused against all else, each `{"value", "ci95"}`; and
        `confusion`: judge's share → label → `{"n", "share", "ci95"}`, the share of responses
        with this verdict that a person gives this label.
    """
    rng, errors = np.random.default_rng(seed), Errors.of(labelled, judged_refused)
    sensitivity, specificity = errors.rates()
    known = [ends(x) for x in errors.draw(rng)]
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
    n = effective(all_)
    share = sum(some) / sum(all_)
    return {"share": share, "ci95": ends(jeffreys(rng, n * share, n))}


def _kappa(labelled: Triples) -> float | None:
    table = np.zeros((len(LABELS), len(LABELS)))
    for judged, label, weight in labelled:
        table[LABELS.index(judged), LABELS.index(label)] += weight
    table /= table.sum()
    chance = float(table.sum(0) @ table.sum(1))
    return (float(np.trace(table)) - chance) / (1 - chance) if chance < 1 - 1e-12 else None


def summary(
    labelled: Mapping[str, Triples],
    judged: Mapping[str, Mapping[str, Sequence[float]]],
    judged_refused: float,
) -> dict[str, Any]:
    """`labels` and `corrected` of `results.json`.

    Args:
        labelled: arm → `(judge's share, label, sampling weight)` each.
        judged: arm → domain → `(refused, total)` of one seed's prompts; `base` among the arms. A
            domain is absent where no response was judged.
        judged_refused: share of all responses that the sample is of.
    """
    together = [triple for triples in labelled.values() for triple in triples]
    errors = Errors.of(together, judged_refused)
    by_arm = {
        arm: {"labelled": len(triples), "accuracy": _accuracy(triples)}
        for arm, triples in labelled.items()
    }
    corrected: dict[str, Any] = {}
    base = judged.get("base", {})
    for arm, domains in judged.items():
        corrected[arm] = {d: corrected_share(x, n, errors) for d, (x, n) in domains.items()}
        if arm != "base":
            for d, counts in domains.items():
                drop = corrected_drop(base.get(d, (0, 0)), counts, errors)
                corrected[arm][d] |= {"drop": drop["drop"], "drop_ci95": drop["ci95"]}
    return {
        "labels": judge_errors(together, judged_refused) | {"by_arm": by_arm},
        "corrected": corrected,
    }
