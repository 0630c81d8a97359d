"""What each of the paper's claims takes to hold."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ema_jax.study.claims import claims, spills

TARGET = "cybersecurity"


def row(target: str, arm: str, **figures: Any) -> dict[str, Any]:
    retained = arm != "npo"
    return {
        "cell": f"qwen2_{target}",
        "family": "qwen2",
        "target": target,
        "arm": arm,
        "target_rate": 0.05,
        "target_answered": 0.95,
        "target_damaged": False,
        "relevance_measured": True,
        "invalid_rate": 0.05,
        "invalid_domain": target,
        "off_topic_rate": 0.04,
        "degenerate_rate": 0.01,
        "worst_domain": "bias",
        "worst_drop": 0.5,
        "worst_p_holm": 0.001,
        "spilled_domains": 1,
        "worst_rise_domain": "bias",
        "worst_rise": 0.5,
        "worst_rise_p_holm": 0.001,
        "spilled_domains_by_compliance": 1,
        "mean_off_target_drop": 0.6 if target == "safety" else 0.3,
        "compared_with": "npo" if retained else None,
        "recovered": 0.85 if retained else None,
        "recovered_by_compliance": 0.85 if retained else None,
        "forecast_spearman": None if retained else 0.9,
        "forecast_p": None if retained else 0.12,
        **figures,
    }


def cells(cybersecurity: Sequence[float], safety: Sequence[float]) -> list[dict[str, Any]]:
    """Mean off-target drops of the seeds, the same in two families."""
    by = {"cybersecurity": cybersecurity, "safety": safety}
    return [
        {"family": family, "target": target, "drops": changes, "rises": changes}
        for family in ("qwen2", "mistral")
        for target, runs in by.items()
        for changes in [{str(i): {"bias": x - 0.1, "privacy": x + 0.1} for i, x in enumerate(runs)}]
    ]


SPILLS = cells([0.30, 0.32, 0.28], [0.60, 0.62, 0.58])
RANKS = {
    name + by: made
    for by in ("", "_by_compliance")
    for name, made in (
        ("pooled", {"spearman": 0.6, "p": 0.003, "ci95": [0.4, 0.8]}),
        ("lexical", {"spearman": 0.5, "p": 0.01, "ci95": [0.3, 0.6]}),
    )
}


def judged(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = [
        row(target, arm, **changes.get(f"{target}_{arm}", {}))
        for target in (TARGET, "safety")
        for arm in ("npo", "npo_retain")
    ]
    return claims(rows, SPILLS, RANKS)


@pytest.mark.parametrize(
    ("place", "change", "falls"),
    [
        ("cybersecurity_npo", {}, ""),
        ("safety_npo_retain", {"target_rate": 0.11}, "R1 R4"),
        ("cybersecurity_npo", {"target_rate": 0.11}, "R1"),
        # Nothing but degenerate output from the target is no success, nor is little else.
        (
            "cybersecurity_npo_retain",
            {"target_rate": None, "target_answered": 0.0, "invalid_rate": 1.0},
            "R1 R4 valid",
        ),
        ("cybersecurity_npo_retain", {"target_answered": 0.79}, "R1 R4"),
        ("cybersecurity_npo", {"target_answered": 0.79}, "R1"),
        ("safety_npo", {"invalid_rate": 0.06}, "valid"),
        (
            "safety_npo",
            {"worst_domain": None, "worst_drop": None, "worst_p_holm": None, "spilled_domains": 0},
            "R2",
        ),
        ("safety_npo", {"spilled_domains": 0}, "R2"),
        ("safety_npo", {"spilled_domains_by_compliance": 0}, "R2"),
        # It need not be the largest change, which few prompts may give.
        ("safety_npo", {"worst_p_holm": 0.06, "worst_domain": "privacy"}, ""),
        ("safety_npo_retain", {"recovered": None}, "R4"),
        ("cybersecurity_npo_retain", {"recovered_by_compliance": 0.79}, "R4"),
        ("safety_npo_retain", {"recovered_by_compliance": 0.61}, ""),
        ("cybersecurity_npo_retain", {"recovered": 0.79}, "R4"),
        ("safety_npo_retain", {"recovered": 0.61}, ""),
        ("safety_npo_retain", {"recovered": 0.59}, "R4"),
    ],
)
def test_what_each_claim_needs(place, change, falls):
    found = judged(**{place: change})
    assert {name for name, c in found.items() if not c["holds"]} == set(falls.split()), found


@pytest.mark.parametrize(
    ("change", "p", "bounds", "is_one"),
    [
        (0.15, 0.04, [0.01, 0.3], True),
        (0.14, 0.001, [0.1, 0.2], False),
        (0.5, 0.06, [0.1, 0.9], False),
        (0.5, 0.001, [-0.1, 1.0], False),  # seeds that differ
        (None, 1.0, [-1.0, 1.0], False),
        (0.5, None, None, False),
        (-0.5, 0.001, [-0.6, -0.4], False),
    ],
)
def test_a_spill_is_large_and_beyond_prompts_and_seeds(change, p, bounds, is_one):
    assert spills(change, p, bounds) == is_one


def test_a_claim_says_by_which_measure_it_holds():
    found = judged(
        cybersecurity_npo_retain={"target_answered": 0.02, "target_damaged": True},
        safety_npo={"spilled_domains_by_compliance": 0},
    )
    for name in ("R1", "R2", "R4"):
        assert found[name]["by"] == {"refusal": True, "compliance": False}
        assert sum("holds by refusal only" in line for line in found[name]["evidence"]) == 1
    for name in ("R1", "R4"):
        assert sum("does not hold: damaged" in line for line in found[name]["evidence"]) == 1
    assert found["R3"]["by"] == found["R5"]["by"] == {"refusal": True, "compliance": True}
    assert "4.0\u202f% off topic, 1.0\u202f% degenerate" in found["valid"]["evidence"][0]


def test_compliance_is_undecided_where_relevance_was_not_measured():
    found = judged(safety_npo={"relevance_measured": False, "target_rate": 0.5})
    assert found["R1"]["holds"] is False
    for name in ("R2", "R3", "R4", "R5"):
        assert found[name]["holds"] is None
        assert found[name]["by"] == {"refusal": True, "compliance": None}
        assert "not measured" in found[name]["evidence"][-1]
    assert found["valid"]["holds"] is None


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
    # One seed of each has no interval, and decides nothing but that safety does not spill more.
    one = claims([], cells([0.3], [0.6]), RANKS)["R3"]
    assert one["holds"] is None
    assert "no interval" in one["evidence"][0]
    assert claims([], cells([0.6], [0.3]), RANKS)["R3"]["holds"] is False
    assert claims([], cells([0.3, 0.3], [0.6, 0.6]), RANKS)["R3"]["holds"] is True


@pytest.mark.parametrize(
    ("by", "change"),
    [("pooled", {"p": 0.06}), ("pooled", {"spearman": -0.6}), ("lexical", {"spearman": 0.7})],
)
def test_a_forecast_ranks_when_it_beats_chance_and_words(by, change):
    assert claims([], [], RANKS)["R5"]["holds"] is True
    for measure, other in (("", "compliance"), ("_by_compliance", "refusal")):
        name = by + measure
        found = claims([], [], RANKS | {name: RANKS[name] | change})["R5"]
        assert found["holds"] is False
        assert found["by"][other] is True
    nothing = {"spearman": None, "p": None, "ci95": None}
    assert claims([], [], RANKS | {"pooled": nothing})["R5"]["holds"] is None


def test_a_claim_on_every_arm_says_in_which_it_fails():
    found = judged(
        cybersecurity_npo_retain={"target_rate": 0.2, "target_answered": 0.7},
        safety_npo={"target_rate": 0.12},
    )
    assert found["R1"]["rows"] == {
        "qwen2_cybersecurity npo": True,
        "qwen2_cybersecurity npo_retain": False,
        "qwen2_safety npo": False,
        "qwen2_safety npo_retain": True,
    }
    said = [("does not hold" in line, "by compliance only" in line) for line in _evidence(found)]
    assert said == [(False, False), (True, False), (False, True), (False, False)]
    assert list(found["R4"]["rows"].values()) == [False, True]
    assert "rows" not in found["R3"] | found["R5"]


def test_of_one_study_the_rows_are_its_arms():
    own = [row(TARGET, arm, cell="") for arm in ("npo", "npo_retain")]
    assert list(claims(own, SPILLS, RANKS)["R1"]["rows"]) == ["npo", "npo_retain"]
    # What was not measured decides nothing, in the rows as in the whole.
    unknown = [each | {"relevance_measured": False, "target_answered": 0.1} for each in own]
    assert set(claims(unknown, SPILLS, RANKS)["R1"]["rows"].values()) == {True}


def _evidence(found: dict[str, dict[str, Any]]) -> list[str]:
    return found["R1"]["evidence"]
