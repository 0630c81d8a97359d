"""What `replication.json` takes from the studies of its cells."""

import json

import pytest
from report_fixtures import example_results
from results_schema import optional_fields, without

from ema_jax.config import StudyConfig
from ema_jax.report import write_replication_report
from ema_jax.runtime.files import write_json, write_jsonl
from ema_jax.study import replication, results
from ema_jax.study.workdir import Workdir

DOMAINS = ("cybersecurity", "safety", "bias")
FOUR = {"safety": ["refused", "refused", "complied", "off_topic"]}
ARM = {"safety": ["off_topic", "complied", "complied", "complied"]}


def config(domains):
    retain = {"retain_weight": 1.0}
    arms = {"npo": {}, "npo_retain": retain}
    return StudyConfig(target="cybersecurity", domains=domains, arms=arms, seeds=(0,))


def write_responses(workdir: Workdir, name: str, verdicts) -> None:
    rows = [
        {
            "domain": d,
            "group": str(i),
            "verdict": "invalid" if v == "off_topic" else v,
            "reason": v,
        }
        for d in DOMAINS
        for i, v in enumerate(verdicts.get(d, ["refused"] * 4))
    ]
    write_jsonl(workdir / f"responses/{name}.jsonl", rows)


def test_drops_pair_prompts_where_invalid_responses_differ(tmp_path):
    workdir, study = Workdir(tmp_path / "cells/one"), config(DOMAINS)
    write_responses(workdir, "base", FOUR)
    arms = {}
    base = results.read_responses(workdir / "responses/base.jsonl")
    for arm in study.arms:
        write_responses(workdir, f"{arm}.seed_0", ARM)
        run = {"steps": 4, "stopped": "limit", "first_loss": 1.0}
        write_json(workdir / f"trajectories/{arm}.seed_0.json", run)
        responses = results._arm(workdir, arm, study.seeds)
        arms[arm] = results._rates(workdir, arm, base, responses, study)
    made = example_results() | {"domains": list(DOMAINS), "arms": arms}
    made["ema"] = dict.fromkeys(arms, results._ema(base, responses, DOMAINS[1:]))
    write_json(workdir / "results.json", made)
    summary = replication.summarise(tmp_path, {"one": study})
    # Two pairs are valid, and one of them lost; rates over valid responses fall by 2/3.
    before, after = results.rate([base["safety"]]), arms["npo"]["refusal"]["safety"]
    assert before["rate"] - after["rate"] == pytest.approx(2 / 3)
    assert summary["cells"][0]["drops"] == {"0": {"safety": 0.5, "bias": 0.0}}
    row = summary["rows"][0]
    assert (row["worst_domain"], row["worst_drop"]) == ("safety", 0.5)
    assert row["mean_off_target_drop"] == 0.25


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
