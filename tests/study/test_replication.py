"""What `replication.json` takes from the studies of its cells."""

import json

import pytest
from report_fixtures import example_results
from results_schema import optional_fields, without

from ema_jax.config import StudyConfig
from ema_jax.refusal.responses import Responses, rate
from ema_jax.report import write_replication_report
from ema_jax.runtime.files import write_json
from ema_jax.study import replication, results


def config(domains):
    arms = {"npo": {}, "npo_retain": {"retain_weight": 1.0}}
    return StudyConfig(target="cybersecurity", domains=domains, arms=arms, seeds=(0,))


def responses(safety):
    def of(shares):
        return Responses(shares, list("abcd"), [None] * 4, [None] * 4)

    same = {d: of(["refused"] * 4) for d in ("cybersecurity", "bias")}
    return {"safety": of(safety), **same}


def test_drops_pair_prompts_where_invalid_responses_differ(tmp_path):
    base = responses(["refused", "refused", "complied", "off_topic"])
    arm = responses(["off_topic", "complied", "complied", "complied"])
    rates = {d: rate([each]) for d, each in arm.items()}
    seed = {"refusal": rates, "steps": 4, **results.paired_changes(base, arm)}
    study = config(tuple(base))
    made = example_results() | {"domains": list(base)}
    made["arms"] = {name: {"refusal": rates, "seeds": {"0": seed}} for name in study.arms}
    ema = results._ema(base, {d: [each] for d, each in arm.items()}, ("safety", "bias"))
    made["ema"] = dict.fromkeys(study.arms, ema)
    write_json(tmp_path / "cells/one/results.json", made)
    summary = replication.summarise(tmp_path, {"one": study})
    # Two pairs are valid, and one of them lost; rates over valid responses fall by 2/3.
    before = rate([base["safety"]])["rate"]
    assert before - rates["safety"]["rate"] == pytest.approx(2 / 3)
    assert summary["cells"][0]["drops"] == {"0": {"safety": 0.5, "bias": 0.0}}
    row = summary["rows"][0]
    assert (row["worst_domain"], row["worst_drop"]) == ("safety", 0.5)
    assert row["mean_off_target_drop"] == 0.25
    # Of four prompts 50 points are no finding.
    assert row["spilled_domains"] == row["spilled_domains_by_compliance"] == 0


def test_cells_from_before_the_second_measure_still_make_a_page(tmp_path):
    cell = config(tuple(example_results()["domains"]))
    oldest = without(example_results(), optional_fields() - {("Arm", "seeds")})
    write_json(tmp_path / "cells/old/results.json", oldest)
    made = replication.summarise(tmp_path, {"old": cell})
    assert (made["cells"][0]["drops"], made["cells"][0]["rises"]) == ({}, {})
    assert all(row["target_answered"] is row["target_damaged"] is None for row in made["rows"])
    assert made["rows"][0]["worst_drop"] == pytest.approx(0.41)
    assert made["claims"]["R1"]["by"]["compliance"] is None
    assert made["claims"]["R1"]["evidence"][0].endswith("answers not measured")
    assert "compliance not measured" in made["claims"]["R2"]["evidence"][0]
    assert "of every seed" in made["claims"]["R3"]["evidence"][0]
    write_replication_report(tmp_path, json.loads(json.dumps(made)))
    assert "not measured" in (tmp_path / "report/index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("field", sorted(optional_fields() - {("Arm", "seeds")}), ids=".".join)
def test_any_field_that_came_later_may_be_missing(field):
    found = without(example_results(), {field})
    for arm in ("npo", "npo_retain"):
        assert replication._row("x", config(tuple(found["domains"])), found, arm)["arm"] == arm
    replication._by_seed(found, "npo", "drop")


def test_an_arm_that_leaves_the_target_alone_recovers_nothing():
    found = example_results()
    found["containment"]["npo_retain"]["compared_with"] = "npo"
    study = config(tuple(found["domains"]))
    row = replication._row("x", study, found, "npo_retain")
    assert (row["not_contained"], row["recovered"]) == ("", 0.801)
    rate = found["arms"]["npo_retain"]["refusal"]["cybersecurity"]
    rate |= {"rate": 1.0, "ci95": [0.95, 1.0]}
    row = replication._row("x", study, found, "npo_retain")
    assert row["not_contained"] == "target not clearly unlearned"
    assert not {v for k, v in row.items() if k.startswith("recovered")} - {None}
    assert replication._row("x", study, found, "npo")["not_contained"] is None
    evidence = replication.study_claims(study, found)["R4"]["evidence"][0]
    assert "npo_retain: no containment (target not clearly unlearned); target refusal" in evidence
