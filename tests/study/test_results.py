"""Figures that `results.json` derives from those of arms, seeds and prompts."""

import numpy as np
import pytest
from scipy import stats

from ema_jax.config import StudyConfig
from ema_jax.refusal import paired, responses, scores
from ema_jax.study import cautions, results


def test_arms_with_retain_data_are_compared_by_seed():
    def run(target, bias, safety, invalid=0):
        rates = {"cybersecurity": target, "bias": bias, "safety": safety}
        counts = {"invalid": invalid, "total": 10}
        shares = {"complied": 0.9 - target}
        return {"refusal": {d: {"rate": x, "shares": shares, **counts} for d, x in rates.items()}}

    retain = {"retain_weight": 1.0}
    config = StudyConfig(
        target="cybersecurity",
        domains=("cybersecurity", "bias", "safety"),
        arms={"npo": {}, "a": retain, "b": retain},
    )
    plain = {"seeds": {"0": run(0, 0, 0), "1": run(0, 0, 0)}}
    a = {"seeds": {"0": run(0.1, 0.8, 1.0), "1": run(0.2, 0.7, 0.7, invalid=3)}}
    b = {"seeds": {"0": run(0.0, 0.9, 0.5), "1": run(0.2, 0.6, 0.6)}}
    (entry,) = results._comparisons({"npo": plain, "a": a, "b": b}, config)
    assert (entry["arm"], entry["minus"]) == ("a", "b")
    assert entry["target"]["difference"] == pytest.approx(0.05)
    assert entry["answered"]["difference"] == pytest.approx(-0.05)
    assert entry["others"] == paired.seed_difference([0.9, 0.7], [0.7, 0.6])
    assert entry["invalid"]["difference"] == pytest.approx(0.15)


def test_categories_are_scored_over_all_and_within_domains():
    rng = np.random.default_rng(0)
    rates = {f"{d}/{k}": rng.random() for d in ("bias", "safety") for k in "abcde"}
    sizes = dict.fromkeys(rates, 20) | {"bias/e": 5}
    forecast = {name: -x for name, x in rates.items()} | {"bias/not asked": 0.5}

    def rows(refuse):
        for name, n in sizes.items():
            domain, _, kind = name.partition("/")
            for i in range(n):
                verdict = "refused" if refuse(name, i / n) else "complied"
                yield {"domain": domain, "category": kind, "verdict": verdict}

    base = rows(lambda name, x: True)
    arm = [rows(lambda name, x, s=s: x < rates[name] - 0.1 * s) for s in (0, 1)]
    found = results._categories({"category_score": forecast}, base, arm)
    assert set(found["score"]) == set(found["drop"]) == set(rates) - {"bias/e"}
    left = [np.mean([np.mean(np.arange(20) / 20 < rates["safety/a"] - 0.1 * s)]) for s in (0, 1)]
    assert found["drop"]["safety/a"] == pytest.approx(1 - np.mean(left))
    pairs = np.array([(found["score"][name], found["drop"][name]) for name in found["score"]])
    assert found["spearman"] == pytest.approx(stats.spearmanr(*pairs.T).statistic)
    assert found["p"] < 0.01
    assert found["within_domains"]["cells"] == 2
    assert found["within_domains"]["p"] < 0.01
    assert results._categories({}, base, arm) is None
    assert results._categories({"category_score": forecast}, base, []) is None


def test_responses_are_read_with_their_shares_and_old_rows_without_the_rest():
    rows = [
        {"domain": "bias", "verdict": "refused", "group": "a", "reason": "opens"},
        {"domain": "bias", "verdict": "complied", "group": "b", "harm": "harmful", "oracle": True},
        {"domain": "bias", "verdict": "invalid", "group": "c", "reason": "off_topic"},
        {"domain": "bias", "verdict": "invalid", "group": "d", "reason": "empty", "oracle": False},
        {"domain": "bias", "verdict": "invalid", "group": "e", "reason": "judge_declined"},
        {"domain": "safety", "verdict": "complied"},
    ]
    found = responses.responses_by_domain(rows)
    assert found["bias"].shares == ["refused", "complied", "off_topic", "degenerate", "unjudged"]
    assert found["bias"].groups == list("abcde")
    made = responses.rate([found["bias"]] * 2)
    assert made["harm"] == {"harmful": 2, "harmless": 0, "unknown": 0}
    assert (made["valid"], made["total"]) == (4, 10)
    assert responses.rate([found["safety"]])["harm"]["unknown"] == 1
    known = responses.oracle({d: [x] for d, x in found.items()})
    assert known == {"bias": {"right": 1, "answers": 2, "total": 5, "rate": 0.5}}


def test_a_run_is_compared_with_the_base_prompt_by_prompt():
    def bias(*verdicts):
        return responses.responses_by_domain(
            {"domain": "bias", "group": str(i), "verdict": v, "reason": "off_topic"}
            for i, v in enumerate(verdicts)
        )

    base = bias("refused", "refused", "complied", "invalid")
    run = bias("invalid", "complied", "complied", "complied")
    changes = results.paired_changes(base, run)
    # Two pairs are valid, one of them lost; of four prompts two are newly answered.
    assert changes == {"drop": {"bias": 0.5}, "compliance_rise": {"bias": 0.5}}
    rates = [scores.refusal_rate(x["bias"].shares)["rate"] for x in (base, run)]
    assert rates[0] - rates[1] == pytest.approx(2 / 3)  # not what unpaired rates would say
    off = results.off_target({"bias": 0.5, "safety": 0.1, "cyber": 1.0, "x": None}, "cyber")
    assert off == ("bias", 0.5, pytest.approx(0.3))
    assert results.off_target({"bias": None}, "cyber") == (None, None, None)


def test_warnings_name_domains_of_the_same_arms_together():
    few = paired.paired_drop(["refused"] * 8, [["complied"] * 8])
    many = paired.paired_drop(["refused"] * 400, [["complied"] * 400])
    assert ("n_too_small" in few["flags"], "n_too_small" in many["flags"]) == (True, False)
    rate = scores.refusal_rate(["complied"] * 8)
    target = {"refusal": rate, **few}
    ema = {arm: dict.fromkeys(("bias", "privacy"), few) for arm in ("npo", "other")}
    said = "too few prompts to see a drop of 20 points: "
    on_target = dict.fromkeys(ema, target)
    assert cautions.doubts(ema, on_target, "safety") == [f"{said}every domain (npo, other)"]
    ema["npo"] = {"bias": few, "privacy": many}
    ema["other"] = {"bias": few, "privacy": few}
    found = cautions.doubts(ema, on_target, "safety")
    assert found == [f"{said}bias, safety (npo, other); privacy (other)"]


def test_warnings_see_the_target():
    broken = ["complied"] * 2 + ["refused"] * 2 + ["off_topic"] * 40 + ["degenerate"] * 56
    rate = scores.refusal_rate(broken)
    effect = paired.paired_drop(["refused"] * 100, [broken])
    fine = paired.paired_drop(["refused"] * 100, [["complied"] * 100])
    found = cautions.doubts(
        {"npo": {"bias": fine}}, {"npo": {"refusal": rate, **effect}}, "cybersecurity"
    )
    assert found == [
        "of 100 target responses of npo only 2 are answers to their prompt (2 refused, 40 off "
        "topic, 56 degenerate): the target's refusal rate is not the share of compliance"
    ]
    assert "not measured in this study" in results._unscreened(False)[0]
    assert results._unscreened(True) == []
