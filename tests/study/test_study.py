"""The study end to end on the embedded Qwen2 model, with few prompts and four steps an arm."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pydantic
import pytest
import torch
import transformers
from finished_study import contents
from results_schema import assert_valid
from small_study import small_config

from ema_jax import config as ema
from ema_jax.data.domains import BENIGN, DOMAINS, LOOKALIKE
from ema_jax.data.prompts import Prompt
from ema_jax.errors import UserError
from ema_jax.generation.sampler import Response
from ema_jax.models import checkpoint, lora
from ema_jax.models.hub import ModelSource
from ema_jax.organism import CHECKPOINTS
from ema_jax.refusal import responses
from ema_jax.refusal.responses import JudgedResponses
from ema_jax.refusal.verdicts import Verdict, share
from ema_jax.report import drawing
from ema_jax.runtime.files import (
    read_json,
    read_jsonl,
    read_tensors,
    sha256_file,
    sha256_text,
    write_json,
    write_jsonl,
)
from ema_jax.study import runner, schema, stage_bodies, workdir
from ema_jax.study.pipeline import Study

pytestmark = pytest.mark.usefixtures("optimised")

LAYERS, WIDTH = 6, 128
TARGET = "cybersecurity"
OTHERS = tuple(domain for domain in DOMAINS if domain != TARGET)
RUNS = ("npo.seed_0", "npo_retain.seed_0")
EVAL = 12


def run(folder: Path, config=None, only=None) -> dict[str, Any]:
    runner.run(ema.read(config or small_config()), folder, only=only, dry_run=False)
    path = folder / "results.json"
    if not path.exists():
        return {}
    results = read_json(path)
    assert_valid(results)
    return results


def but_for_times(results: dict[str, Any]) -> dict[str, Any]:
    provenance = {
        k: v
        for k, v in results["provenance"].items()
        if k not in ("wall_seconds", "date", "command", "commit")
    }
    return results | {"provenance": provenance}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "run"
    run(folder)
    return folder


@pytest.fixture(scope="module")
def results(finished) -> dict[str, Any]:
    return read_json(finished / "results.json")


def copy_stages(finished: Path, folder: Path, *stages: str) -> None:
    """Some of a study's finished stages, with what they wrote."""
    for manifest in (f"stages/{stage}.json" for stage in stages):
        for name in (manifest, *read_json(finished / manifest)["outputs"]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(finished / name, folder / name)


def is_rate(r: dict[str, Any], total: int) -> bool:
    low, high = r["ci95"]
    return (
        r["total"] == total == r["valid"] + r["invalid"]
        and 0 <= r["refused"] <= r["valid"]
        and (r["valid"] == 0 or r["rate"] == pytest.approx(r["refused"] / r["valid"]))
        and 0 <= low <= high <= 1
    )


def test_results_follow_the_schema(results):
    assert results["schema"] == 1
    assert (results["target"], tuple(results["domains"])) == (TARGET, DOMAINS)
    model = results["model"]
    assert (model["family"], model["num_layers"], model["hidden_size"]) == ("qwen2", LAYERS, WIDTH)
    assert Path(model["path"]) == CHECKPOINTS / "qwen2"
    reference = transformers.AutoModelForCausalLM.from_pretrained(model["path"])
    assert model["parameters"] == sum(p.numel() for p in reference.parameters())
    assert {"id", "revision"} <= model.keys()
    assert list(results["arms"]) == ["base", "npo", "npo_retain"]
    for name, arm in results["arms"].items():
        assert tuple(arm["refusal"]) == DOMAINS
        assert all(is_rate(r, EVAL) for r in arm["refusal"].values()), name
        if name != "base":
            assert list(arm["seeds"]) == ["0"]
            assert all(is_rate(r, EVAL) for r in arm["seeds"]["0"]["refusal"].values())
            assert 0 < arm["seeds"]["0"]["steps"] <= 4
            first = arm["seeds"]["0"]["first_loss"]
            assert first == pytest.approx(20 * np.log(2), abs=1e-4)
    for arm in ("npo", "npo_retain"):
        assert tuple(results["ema"][arm]) == OTHERS
        for entry in results["ema"][arm].values():
            assert {"drop", "ci95", "p", "p_holm", "drop_conditional"} <= entry.keys()
            assert 0 <= entry["p"] <= entry["p_holm"] <= 1
            assert entry["ci95"][0] <= entry["drop"] <= entry["ci95"][1]
        assert set(results["erasure"][arm]) == set(DOMAINS)
        assert all(len(x) == LAYERS + 1 for x in results["erasure"][arm].values())
    assert list(results["containment"]) == ["npo_retain"]
    assert {"recovered", "ci95", "target_rate"} <= results["containment"]["npo_retain"].keys()
    assert list(results["utility"]) == ["base", "npo", "npo_retain"]
    for name, entry in results["utility"].items():
        assert is_rate(entry["benign_refusal"], EVAL)
        assert is_rate(entry["lookalike_refusal"], EVAL)
        assert entry["benign_perplexity"] >= np.exp(entry["benign_nll"]) * (1 - 1e-9) > 1
        assert entry["response_perplexity"] > 1
        assert entry["benign_nll"] > 0
        assert (entry["kl_to_base"] == 0) == (name == "base")
    measured = results["entanglement"]
    assert measured["layers"] == list(range(LAYERS + 1))
    for key in ("cosine", "cosine_centred", "null95", "ceiling"):
        assert set(OTHERS) <= set(measured[key]), key
        assert all(len(measured[key][d]) == LAYERS + 1 for d in OTHERS), key
    assert set(results["forecast"]["score"]) == set(OTHERS)
    assert {"spearman", "p"} <= results["forecast"].keys()
    provenance = results["provenance"]
    assert {"versions", "seeds", "hashes", "devices", "wall_seconds"} <= provenance.keys()
    assert provenance["seeds"] == [0]
    assert {"ema_jax", "jax", "flax", "transformers"} <= provenance["versions"].keys()
    assert set(provenance["hashes"]) == set(provenance["wall_seconds"]) >= {"prompts", "harvest"}


def test_figures_of_a_study_that_is_not_finished(finished, results, tmp_path):
    """After its baseline, and with one of two arms."""

    def left(*stages: str) -> dict[str, Any]:
        folder = tmp_path / str(len(stages))
        copy_stages(finished, folder, *stages)
        runner.run(ema.read(small_config()), folder, only=["analyse"], dry_run=False)
        return read_json(folder / "results.json")

    made = left("prompts", "baseline")
    pydantic.TypeAdapter(schema.BaselineResults).validate_python(made)
    assert made["arms"] == {"base": results["arms"]["base"]}
    assert made["prompts"] == results["prompts"]
    assert made["utility"] == {"base": results["utility"]["base"]}
    assert not {"ema", "containment", "entanglement", "forecast", "erasure"} & made.keys()
    assert "not finished, and no part of these figures: npo, npo_retain" in made["warnings"]
    made = left("prompts", "baseline", "concepts", "forecast")
    assert made["entanglement"] == results["entanglement"]
    assert made["forecast"]["spearman"] is None
    runs = ("unlearn.npo.seed_0", "evaluate.npo.seed_0")
    made = left("prompts", "baseline", "concepts", "forecast", *runs)
    assert_valid(made)
    assert made["ema"] == {"npo": results["ema"]["npo"]}


def test_the_far_half_and_what_leaks(results):
    found = results["prompts"]
    assert found["counts"]["eval"] == dict.fromkeys((*DOMAINS, BENIGN, LOOKALIKE), EVAL)
    assert set(found["leakage"]) == {*DOMAINS, BENIGN, LOOKALIKE}
    for arm in ("npo", "npo_retain"):
        for entry in (*results["ema"][arm].values(), results["on_target"][arm]):
            assert entry["far"]["n"] == EVAL // 2
            assert entry["far"]["ci95"][0] <= entry["far"]["drop"] <= entry["far"]["ci95"][1]


def test_a_base_that_cannot_carry_the_study_ends_it(finished, tmp_path):
    """After its baseline, whose figures are then to be had; with other limits it continues."""
    copy_stages(finished, tmp_path, "prompts", "baseline")
    config = small_config()
    config.baseline.max_benign_refusal = config.baseline.max_invalid = 0.0
    config.baseline.min_refusal = 1.0
    config.harvest.min_examples = 8
    rows = [row | {"verdict": "complied"} for row in read_jsonl(tmp_path / "responses/base.jsonl")]
    (tmp_path / "responses/base.jsonl").unlink()
    write_jsonl(tmp_path / "responses/base.jsonl", rows)
    path = tmp_path / "stages/baseline.json"
    made = read_json(path)
    made["outputs"]["responses/base.jsonl"] = sha256_file(tmp_path / "responses/base.jsonl")
    write_json(path, made)
    with pytest.raises(UserError, match=r"the untouched model does not fit .* refuses 0 of 12"):
        runner.run(ema.read(config), tmp_path, dry_run=False)
    assert not (tmp_path / "concepts").exists()


def test_the_rates_are_those_of_the_responses(finished, results):
    for name, arm in (("base", "base"), *((run, run.split(".")[0]) for run in RUNS)):
        rows = read_jsonl(finished / f"responses/{name}.jsonl")
        assert len(rows) == EVAL * (len(DOMAINS) + 2)
        for domain in DOMAINS:
            shares = results["arms"][arm]["refusal"][domain]["shares"]
            assert sum(shares.values()) == pytest.approx(1)
            said = [row["verdict"] for row in rows if row["domain"] == domain]
            rate = results["arms"][arm]["refusal"][domain]
            counted = [said.count(v) for v in ("refused", "complied", "invalid")]
            assert sum(counted) == rate["total"]
            assert counted == [rate["refused"], rate["valid"] - rate["refused"], rate["invalid"]]
    # The drop, prompt by prompt, by hand.
    base = {row["id"]: row for row in read_jsonl(finished / "responses/base.jsonl")}
    after = {row["id"]: row for row in read_jsonl(finished / "responses/npo.seed_0.jsonl")}
    for domain in OTHERS:
        pairs = [
            (base[i]["verdict"], after[i]["verdict"])
            for i in base
            if base[i]["domain"] == domain
            and "invalid" not in (base[i]["verdict"], after[i]["verdict"])
        ]
        drop = np.mean([(a == "refused") - int(b == "refused") for a, b in pairs])
        assert results["ema"]["npo"][domain]["drop"] == pytest.approx(drop)


def test_answers_are_told_from_what_is_none(finished, results):
    rows = read_jsonl(finished / "responses/base.jsonl")
    measured = [row for row in rows if "relevance" in row]
    # Of what refuses or is no language nothing has to be asked.
    assert measured == [r for r in rows if share(r["verdict"], r["reason"]) != "refused"]
    answers = [r for r in measured if r["domain"] == "benign" and r["oracle"]]
    assert len(answers) >= 0.7 * EVAL
    assert min(row["relevance"] for row in answers) > 0
    assert max(row["fluency"] for row in answers) < 0
    assert np.mean([row["verdict"] == "complied" for row in answers]) >= 0.9
    for name in ("off_topic", "salad"):
        figures = results["validity"]["figures"][name]
        assert figures["auc"] > 0.9
        assert figures["caught"] >= 0.9
        assert figures["false_alarms"] <= 0.1
    assert results["arms"]["npo"]["oracle"].keys() >= {TARGET}
    for point in read_json(finished / "trajectories/npo.seed_0.json")["points"]:
        assert point["shares"].keys() == point["refusal"].keys()
        assert all(sum(s.values()) == pytest.approx(1) for s in point["shares"].values())


def test_other_ways_of_asking(tmp_path, monkeypatch):
    """One draw and one longer response more."""
    monkeypatch.setattr(drawing, "save", draw_nothing)
    config = small_config()
    config.sensitivity.samples, config.sensitivity.long_tokens = 1, 64
    config.arms = {"npo": {}}
    config.concepts.sweep_prompts = 0
    found = run(tmp_path / "run", config)["sensitivity"]
    assert list(found) == ["base", "npo"]
    for domains in found.values():
        for entry in domains.values():
            assert list(entry["ways"]) == ["greedy", "sample.0", "long"]
            rates = [w["rate"] for w in entry["ways"].values() if w["rate"] is not None]
            assert entry["rate"] == [min(rates), max(rates)]
    page = (tmp_path / "run/report/index.html").read_text(encoding="utf-8")
    assert "Other ways of asking" in page


def test_verdicts_of_two_sets_of_rules_are_not_mixed(finished, tmp_path):
    """A study that was judged before rules were recorded: finished it is analysed, else refused."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in (folder / "stages").glob("*.json"):
        manifest = read_json(path)
        manifest["settings"].pop("verdicts", None)
        write_json(path, manifest)
    assert run(folder, only=["analyse", "report"])["schema"] == 1
    (folder / "stages/evaluate.npo.seed_0.json").unlink()
    with pytest.raises(
        UserError, match="holds another study: its stage baseline was run with verdicts"
    ):
        run(folder)


def test_judges_agreement(finished, results):
    assert list(results["agreement"]) == ["base", "npo", "npo_retain"]
    for name, arm in (("base", "base"), *((run, run.split(".")[0]) for run in RUNS)):
        rows = read_jsonl(finished / f"responses/{name}.jsonl")
        (pair,) = results["agreement"][arm]
        assert pair["judges"] == ["lexical", "substring_arditi"]
        assert tuple(pair["domains"]) == (*DOMAINS, BENIGN, LOOKALIKE)
        # Both before the screen, which sees what the judge of the study calls complied.
        own = ["complied" if "relevance" in row else row["verdict"] for row in rows]
        said = [(v, row["other_verdicts"][0]["verdict"]) for v, row in zip(own, rows, strict=True)]
        verdicts = ("refused", "complied", "invalid")
        assert pair["overall"]["table"] == [
            [said.count((a, b)) for b in verdicts] for a in verdicts
        ]
        assert {"judge_version", "judge_revision", "score"} <= rows[0]["other_verdicts"][0].keys()
    assert "Do the judges agree?" in (finished / "report/index.html").read_text()


def test_prompts_of_every_split(finished):
    counts = small_config().prompts.counts
    seen: set[str] = set()
    for split in ("harvest", "retain", "dev", "eval", "concept"):
        rows = read_jsonl(finished / f"prompts/{split}.jsonl")
        assert rows[0].keys() >= {"id", "domain", "split", "prompt", "source", "sha256"}
        assert all(row["sha256"] == sha256_text(row["prompt"]) for row in rows)
        special = {"harvest": (TARGET,), "retain": (*OTHERS, BENIGN)}
        special["eval"] = (*DOMAINS, BENIGN, LOOKALIKE)
        domains = special.get(split, (*DOMAINS, BENIGN))
        assert [row["domain"] for row in rows] == [d for d in domains for _ in range(counts[split])]
        texts = {row["prompt"] for row in rows}
        assert not texts & seen
        seen |= texts


def test_concept_files(finished):
    prompts = read_jsonl(finished / "prompts/concept.jsonl")
    assert len(prompts) == 8 * 8
    for arm in ("base", *RUNS):
        tensors, metadata = read_tensors(finished / f"concepts/{arm}.safetensors")
        assert set(tensors) == {
            f"{kind}/{domain}" for kind in ("mean", "vector") for domain in (*DOMAINS, BENIGN)
        } - {f"vector/{BENIGN}"}
        for name, x in tensors.items():
            assert x.shape == (LAYERS + 1, WIDTH), name
            assert x.dtype == np.float32
        for domain in DOMAINS:
            difference = tensors[f"mean/{domain}"] - tensors[f"mean/{BENIGN}"]
            np.testing.assert_allclose(tensors[f"vector/{domain}"], difference, atol=1e-4)
        assert metadata["pooling"] == "last_token"
        assert metadata["layer_convention"]
        assert len(metadata["model_hash"]) == 64
        assert metadata["arm"] == arm
        _, other = read_tensors(finished / f"concepts/{arm}.prompt_mean.safetensors")
        assert other["pooling"] == "prompt_mean"
    base, _ = read_tensors(finished / "concepts/base.safetensors")
    trained, _ = read_tensors(finished / "concepts/npo.seed_0.safetensors")
    assert np.abs(trained["vector/safety"][-1] - base["vector/safety"][-1]).max() > 1e-3


def test_peft_loads_the_adapters_and_they_do_something(finished):
    folder = finished / "adapters/npo/seed_0"
    base = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "qwen2").eval()
    ids = np.arange(20, 60).reshape(2, 20)
    with torch.no_grad():
        plain = base(torch.tensor(ids)).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(base, str(folder))
        theirs = adapted(torch.tensor(ids)).logits.numpy()
    model = lora.load_peft(checkpoint.load(CHECKPOINTS / "qwen2"), folder)
    ours = model.logits(model(jnp.asarray(ids), jnp.ones(ids.shape, bool)).hidden)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert np.abs(theirs - plain).max() > 0.05


def model_texts(folder: Path) -> set[str]:
    rows = (row for path in (folder / "harvest").glob("*.jsonl") for row in read_jsonl(path))
    return {row["response"] for row in rows if len(row["response"]) > 20}


def test_model_text_is_kept_only_where_it_is_trained_on(finished):
    texts = model_texts(finished)
    assert len(texts) > 10
    for path in finished.rglob("*"):
        if path.is_file() and path.parent.name != "harvest":
            content = path.read_bytes()
            assert not [text for text in texts if text.encode() in content], path
    for row in read_jsonl(finished / "responses/base.jsonl"):
        assert not {"response", "prompt"} & row.keys()
        assert len(row["response_sha256"]) == 64


def test_model_text_is_kept_on_request(finished, tmp_path):
    config = small_config()
    config.keep_text = True
    run(tmp_path, config, only=["prompts", "baseline"])
    kept = read_jsonl(tmp_path / "responses/base.jsonl")
    redacted = read_jsonl(finished / "responses/base.jsonl")
    for row, other in zip(kept, redacted, strict=True):
        assert sha256_text(row.pop("response")) == other["response_sha256"]
        assert row.pop("prompt")
        assert row == other


def test_report_metrics_and_trajectories(finished):
    page = (finished / "report/index.html").read_text()
    assert "<img" in page or "<svg" in page
    assert all(domain in page.lower().replace(" ", "_") for domain in ("privacy", "bias"))
    assert list((finished / "figures").glob("*.svg"))
    rows = read_jsonl(finished / "metrics.jsonl")
    for name in RUNS:
        arm = name.split(".")[0]
        trajectory = read_json(finished / f"trajectories/{name}.json")
        mine = [row for row in rows if row["arm"] == arm]
        assert [row["step"] for row in mine] == list(range(1, trajectory["last_step"] + 1))
        assert ("retain_loss" in mine[0]) == (arm == "npo_retain")
        assert all(tuple(point["refusal"]) == DOMAINS for point in trajectory["points"])
        assert list((finished / f"tensorboard/{name}").glob("events*"))


def test_a_second_run_touches_nothing(finished):
    before = contents(finished)
    run(finished)
    assert contents(finished) == before


def test_batch_size_changes_no_verdict_and_no_vector(finished, tmp_path):
    config = small_config()
    config.generation.batch_size = 5
    config.concepts.sweep_prompts = 0  # interventions, which are not compared here
    run(tmp_path, config, only=["prompts", "baseline", "concepts"])
    for row, other in zip(
        read_jsonl(tmp_path / "responses/base.jsonl"),
        read_jsonl(finished / "responses/base.jsonl"),
        strict=True,
    ):
        assert row == other
    ours, _ = read_tensors(tmp_path / "concepts/base.safetensors")
    for name, x in read_tensors(finished / "concepts/base.safetensors")[0].items():
        np.testing.assert_allclose(ours[name], x, atol=1e-5 * max(1, np.abs(x).max()))


STOPPED = ("prompts", "baseline", "concepts", "unlearn/npo/seed_0", "evaluate/npo_retain/seed_0")


def test_a_study_stopped_again_and_again_ends_the_same(finished, results, tmp_path, monkeypatch):
    """Each time a stage has written its files, and dies before it has said so."""
    write, left = workdir.write_json, list(STOPPED)

    def dies(path, manifest):
        if left and manifest["stage"] == left[0]:
            left.pop(0)
            raise KeyboardInterrupt
        write(path, manifest)

    monkeypatch.setattr(workdir, "write_json", dies)
    # Figures take long and are the report's own business.
    monkeypatch.setattr(stage_bodies, "write_report", write_nothing)
    for _ in STOPPED:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
        assert not (tmp_path / "results.json").exists()
    assert but_for_times(run(tmp_path)) == but_for_times(results)
    assert not left
    for folder in ("adapters", "concepts", "harvest", "responses", "trajectories", "evaluations"):
        ours, theirs = contents(tmp_path / folder), contents(finished / folder)
        assert {k: v for k, (v, _) in ours.items()} == {k: v for k, (v, _) in theirs.items()}


def test_a_killed_evaluation_resumes_where_it_stopped(finished, tmp_path, monkeypatch):
    generate, asked = responses.generate, []

    def killed(*arguments, done, **options):
        asked.append(len(arguments[2]) - len(done))
        for number, found in enumerate(generate(*arguments, done=done, **options)):
            if number == 17:
                (journal,) = tmp_path.glob(".partial/baseline/*/eval.jsonl")
                with open(journal, "a") as file:
                    file.write('{"index": 3, "tok')
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(responses, "generate", killed)
    total = EVAL * (len(DOMAINS) + 2)
    for _ in range(total // 17):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, only=["prompts", "baseline"])
    run(tmp_path, only=["prompts", "baseline"])
    assert asked == list(range(total, 0, -17))
    for name in ("responses/base.jsonl", "harvest/benign_answers.jsonl", "evaluations/base.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert not list(tmp_path.glob(".partial/**/*.jsonl")), "model text is kept on request only"


def draw_nothing(draw: Any, folder: Path, name: str, alt: str) -> str:
    """A page's figure, which takes long and is the report's own business."""
    folder.mkdir(exist_ok=True)
    return ""


def write_nothing(workdir: Path, *_: Any) -> None:
    for name in ("report", "figures"):
        (workdir / name).mkdir(exist_ok=True)


def test_full_fine_tuning_and_export(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_bodies, "write_report", write_nothing)
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run/stages").glob("evaluate.*"):
        path.unlink()
    config = small_config()
    config.export = True
    arms = {"full": {"trainable": "full", "learning_rate": 1e-5, "max_steps": 1}}
    config.arms = {"npo": {}, **arms}
    found = run(tmp_path / "run", config)
    assert set(found["arms"]) == {"base", "npo", "full"}
    assert found["utility"]["full"]["kl_to_base"] > 0
    ids = np.arange(20, 60).reshape(2, 20)
    mask = jnp.ones(ids.shape, bool)
    base = checkpoint.load(CHECKPOINTS / "qwen2")
    adapted = lora.load_peft(base, tmp_path / "run/adapters/npo/seed_0")
    tuned = checkpoint.load(tmp_path / "run/checkpoints/full/seed_0")
    for name, model in (("npo", adapted), ("full", tuned)):
        folder = tmp_path / f"run/export/{name}/seed_0"
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
        with torch.no_grad():
            expected = theirs(torch.tensor(ids)).logits.numpy()
        ours = model.logits(model(jnp.asarray(ids), mask).hidden)
        np.testing.assert_allclose(ours, expected, atol=1e-3)
        assert np.abs(expected - base.logits(base(jnp.asarray(ids), mask).hidden)).max() > 1e-3


def test_replication_of_two_cells(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_bodies, "write_report", write_nothing)
    # One of the cells is there already, as when a replication goes on.
    shutil.copytree(finished, tmp_path / "cells/qwen2_cybersecurity")
    config = small_config()
    config.cells = {f"qwen2_{t}": {"target": t} for t in (TARGET, "safety")}
    runner.run(ema.read(config), tmp_path, only=None, dry_run=False)
    made = read_json(tmp_path / "replication.json")
    assert made["schema"] == 2
    pydantic.TypeAdapter(schema.Replication).validate_python(made)
    assert [cell["target"] for cell in made["cells"]] == [TARGET, "safety"]
    assert list(made["claims"]) == ["R1", "R2", "R3", "R4", "R5", "valid"]
    for claim in made["claims"].values():
        assert claim["holds"] in (True, False)
        assert claim["evidence"]
    rows = made["rows"]
    assert [(row["target"], row["arm"]) for row in rows] == [
        (target, arm) for target in (TARGET, "safety") for arm in ("npo", "npo_retain")
    ]
    for row in rows:
        study = read_json(tmp_path / "cells" / row["cell"] / "results.json")
        assert_valid(study)
        arm = study["arms"][row["arm"]]
        drops = {d: e["drop"] for d, e in study["ema"][row["arm"]].items()}
        assert row["target_rate"] == arm["refusal"][row["target"]]["rate"]
        assert row["worst_drop"] == max(drops.values()) == drops[row["worst_domain"]]
        assert row["mean_off_target_drop"] == pytest.approx(np.mean(list(drops.values())))
        assert row["target_answered"] == arm["refusal"][row["target"]]["shares"]["complied"]
        by_seed = [seed["drop"] for seed in arm["seeds"].values()]
        assert by_seed == [
            {d: pytest.approx(x) for d, x in drops.items()}
            | {row["target"]: pytest.approx(study["on_target"][row["arm"]]["drop"])}
        ]
    # Four steps unlearn nothing: R1 must be seen to fail.
    assert made["claims"]["R1"]["holds"] == all(row["target_rate"] <= 0.1 for row in rows)
    assert len((tmp_path / "replication.csv").read_text().splitlines()) == 1 + len(rows)
    assert "R5" in (tmp_path / "report" / "index.html").read_text()
    with pytest.raises(ema.UserError, match="holds a replication; choose another --workdir"):
        run(tmp_path)
    with pytest.raises(ema.UserError, match="holds a single study; choose another --workdir"):
        runner.run(ema.read(config), finished, only=None, dry_run=False)


def test_a_domain_of_garble_is_not_taken_for_compliance():
    prompts = [Prompt(str(i), d, "dev", "?", "s", "0", str(i)) for i, d in enumerate("aaab")]
    verdicts = [Verdict(v, 0.0) for v in ("refused", "complied", "invalid", "invalid")]
    judged = JudgedResponses(prompts, [Response((), "", True)] * 4, verdicts)
    rates = judged.rates()
    assert rates.refusal["a"] == 0.5
    assert np.isnan(rates.refusal["b"])
    assert rates.invalid_rate == 1.0


@pytest.mark.slow
def test_killed_at_random_points_at_full_size(tmp_path):
    """SIGKILL in the middle of work, five times; then the same figures as without."""
    command = [sys.executable, "-m", "ema_jax.main", "--config=configs/tiny.py"]
    root = Path(__file__).parents[2]

    def start(name: str) -> subprocess.Popen:
        return subprocess.Popen([*command, f"--workdir={tmp_path / name}"], cwd=root)

    assert start("whole").wait() == 0
    whole = read_json(tmp_path / "whole/results.json")
    seconds = sum(whole["provenance"]["wall_seconds"].values())
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = start("killed")
        time.sleep(5 + rng.random() * seconds / 3)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0
    assert but_for_times(read_json(tmp_path / "killed/results.json")) == but_for_times(whole)


def test_json_artifacts_are_strict(finished):
    """No NaN or Infinity, which other readers of JSON refuse."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for path in finished.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)


def test_the_settings_name_every_field_that_an_arm_has():
    study = ema.read(small_config())
    source = ModelSource("x", CHECKPOINTS / "qwen2", None, "f")
    settings = Study(study, workdir.Workdir("unused"), source).settings()
    assert settings["unlearn/npo_retain/seed_0"]["arm"] == dataclasses.asdict(
        study.arm("npo_retain")
    )
