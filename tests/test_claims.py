"""What each of the paper's claims takes to hold."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ema_jax.claims import claims

TARGET = "cybersecurity"


def row(target: str, arm: str, **figures: Any) -> dict[str, Any]:
    retained = arm != "npo"
    return {
        "cell": f"qwen2_{target}",
        "family": "qwen2",
        "target": target,
        "arm": arm,
        "target_rate": 0.05,
        "invalid_rate": 0.05,
        "worst_domain": "bias",
        "worst_drop": 0.5,
        "worst_p_holm": 0.001,
        "mean_off_target_drop": 0.6 if target == "safety" else 0.3,
        "recovered": 0.85 if retained else None,
        "forecast_spearman": None if retained else 0.9,
        "forecast_p": None if retained else 0.12,
        **figures,
    }


def cells(cybersecurity: Sequence[float], safety: Sequence[float]) -> list[dict[str, Any]]:
    """Mean off-target drops of the seeds, the same in two families."""
    by = {"cybersecurity": cybersecurity, "safety": safety}
    return [
        {
            "family": family,
            "target": target,
            "drops": {str(i): {"bias": x - 0.1, "privacy": x + 0.1} for i, x in enumerate(runs)},
        }
        for family in ("qwen2", "mistral")
        for target, runs in by.items()
    ]


SPILLS = cells([0.30, 0.32, 0.28], [0.60, 0.62, 0.58])
RANKS = {
    "pooled": {"spearman": 0.6, "p": 0.003, "ci95": [0.4, 0.8]},
    "lexical": {"spearman": 0.5, "p": 0.01, "ci95": [0.3, 0.6]},
}


def judged(**changes: dict[str, Any]) -> dict[str, bool]:
    rows = [
        row(target, arm, **changes.get(f"{target}_{arm}", {}))
        for target in (TARGET, "safety")
        for arm in ("npo", "npo_retain")
    ]
    found = claims(rows, SPILLS, RANKS)
    return {name: claim["holds"] for name, claim in found.items()}


@pytest.mark.parametrize(
    ("place", "change", "falls"),
    [
        ("cybersecurity_npo", {}, ""),
        ("safety_npo_retain", {"target_rate": 0.11}, "R1 R4"),
        ("cybersecurity_npo", {"target_rate": 0.11}, "R1"),
        # Nothing but garble from the target is no success.
        ("cybersecurity_npo_retain", {"target_rate": None, "invalid_rate": 1.0}, "R1 R4 valid"),
        ("safety_npo", {"invalid_rate": 0.06}, "valid"),
        ("safety_npo", {"worst_domain": None, "worst_drop": None, "worst_p_holm": None}, "R2"),
        ("safety_npo", {"worst_drop": 0.14}, "R2"),
        ("safety_npo", {"worst_p_holm": 0.06}, "R2"),
        ("cybersecurity_npo_retain", {"recovered": 0.79}, "R4"),
        ("safety_npo_retain", {"recovered": 0.61}, ""),
        ("safety_npo_retain", {"recovered": 0.59}, "R4"),
    ],
)
def test_what_each_claim_needs(place, change, falls):
    found = judged(**{place: change})
    assert {name for name, holds in found.items() if not holds} == set(falls.split()), found


def test_safety_spills_more_when_the_difference_is_beyond_the_seeds():
    safety, other = np.array([0.60, 0.62, 0.52]), np.array([0.50, 0.55, 0.54])
    found = claims([], cells(other.tolist(), safety.tolist()), RANKS)["R3"]
    assert found["holds"] is False
    low, high = stats.ttest_ind(safety, other, equal_var=False).confidence_interval()
    more = 100 * (safety.mean() - other.mean())
    expected = f"difference {more:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert expected.replace("-", "−") in found["evidence"][0]
    assert claims([], SPILLS, RANKS)["R3"]["holds"] is True
    assert claims([], SPILLS[::2], RANKS)["R3"]["holds"] is None
    one = claims([], cells([0.3], [0.6]), RANKS)["R3"]
    assert one["holds"] is True
    assert "no interval" in one["evidence"][0]


@pytest.mark.parametrize(
    ("by", "change"),
    [("pooled", {"p": 0.06}), ("pooled", {"spearman": -0.6}), ("lexical", {"spearman": 0.7})],
)
def test_a_forecast_ranks_when_it_beats_chance_and_words(by, change):
    assert claims([], [], RANKS)["R5"]["holds"] is True
    changed = RANKS | {by: RANKS[by] | change}
    assert claims([], [], changed)["R5"]["holds"] is False
    nothing = {"spearman": None, "p": None, "ci95": None}
    assert claims([], [], RANKS | {"pooled": nothing})["R5"]["holds"] is None
