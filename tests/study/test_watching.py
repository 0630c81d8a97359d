"""What is seen of a running study: places, what stages found, time left, the plan of a dry run."""

import pytest
from absl import logging as absl_logging

from ema_jax.refusal.verdicts import COMPLIED, INVALID, REFUSED
from ema_jax.runtime import compilation
from ema_jax.study import config_file, plan, watching
from ema_jax.study.artifacts import Artifacts, Run, runs_of
from ema_jax.study.pipeline import names
from ema_jax.study.workload import Work, work


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(absl_logging, "info", lambda form, *given: said.append(form % given))
    return said


def test_a_line_as_a_stage_starts_and_one_with_what_it_found(tmp_path, lines):
    config, artifacts = config_file.load("tiny"), Artifacts(tmp_path)
    run = runs_of(config)[0]
    artifacts.responses("base").write(
        [{"domain": "bias", "verdict": v} for v in (REFUSED, REFUSED, COMPLIED, INVALID)]
        + [{"domain": "privacy", "verdict": INVALID}]
    )
    artifacts.trajectory(run).write(
        {"steps": 24, "stopped": "target", "points": [{"refusal": {"cybersecurity": 0.025}}]}
    )
    watch = watching.Watch(
        config, artifacts, [("prompts", None), ("baseline", None), ("unlearn", run)]
    )
    watch.end("prompts", None, None)  # done before: nothing is said of it
    watch.begin("baseline", None)
    watch.end("baseline", None, 120.0)
    watch.begin("unlearn", run)
    watch.end("unlearn", run, 30.0)
    assert lines[0] == "stage 2 of 3: baseline"
    assert lines[1] == "  refused: bias 67%, privacy no valid response (2 min)"
    assert lines[2].startswith("stage 3 of 3: unlearn, arm npo, seed 0, at most ")
    assert lines[2].endswith(" left")
    assert (
        lines[3] == "  24 steps, stopped: target, cybersecurity 2% refused on the dev split (30 s)"
    )


def test_the_time_left_is_in_proportion_to_the_work(tmp_path, lines):
    config = config_file.load("tiny")
    artifacts = Artifacts(tmp_path)
    artifacts.responses("base").write([])
    runs = [Run("npo", seed) for seed in (0, 1)]
    stages = [("baseline", None), *(("evaluate", run) for run in runs)]
    watch = watching.Watch(config, artifacts, stages)
    watch.end("baseline", None, 1000.0)
    watch.begin("evaluate", runs[0])
    ratio = work(config, "evaluate", "npo").h100_seconds(1) / work(config, "baseline").h100_seconds(
        1
    )
    assert 1 < ratio < 1.2  # the same responses, and a capture
    assert (
        lines[-1]
        == f"stage 2 of 3: evaluate, arm npo, seed 0, at most {2000 * ratio / 60:.0f} min left"
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")],
)
def test_durations(seconds, said):
    assert watching.duration(seconds) == said


def test_work_is_counted_as_the_config_says():
    config = config_file.load("qwen_cyber")
    # Seven domains, the contrast and look-alikes of 300 each; 256 tokens a response.
    assert work(config, "baseline")[:2] == (2700, 2700 * 256)
    assert work(config, "harvest").responses == 128 + 7 * 64
    # 200 steps, dev rates before the first and after every tenth; 16 forget rows.
    trained = work(config, "unlearn", "npo")
    assert (trained.responses, trained.steps) == (21 * 7 * 32, 200)
    assert trained.train_tokens == 200 * 16 * (128 + 128)
    assert work(config, "unlearn", "npo_retain").train_tokens == 3 * trained.train_tokens
    assert work(config, "report") == Work()


def test_the_plan_of_a_model_that_is_not_here():
    config = config_file.load("qwen_cyber")
    text = plan.text("", config, None, None, ["a/judge"])
    for said in (
        "Qwen/Qwen2.5-7B-Instruct (a Hub id, not in the local cache",
        "read its licence at https://huggingface.co/Qwen/Qwen2.5-7B-Instruct",
        "prompt set dolly: databricks/databricks-dolly-15k, licence CC-BY-SA-3.0",
        "judging model a/judge",
        "14.2 GiB of weights",  # measured: docs/one-gpu.md
        "on one H100",
        "to do  unlearn/npo_retain/seed_2",
    ):
        assert said in text
    assert len(names(config)) == 5 + 2 * 6 + 2
    unknown = plan.text("", config_file.load("tiny", [("model.source", "a/b")]), None, None, [])
    assert "not known before the model is here" in unknown


def test_long_compilations_are_named(monkeypatch, lines):
    monkeypatch.setattr(compilation, "_SECONDS", 0.02)
    compilation._started(compilation._EVENT, 0.0, fun_name="jit(step)")
    (timer,) = compilation._waiting.values()
    timer.join(5)
    assert lines == ["  compiling jit(step) …"]
    compilation._ended(compilation._EVENT, 61.0, fun_name="jit(step)")
    compilation._started("/another/event", 0.0)
    compilation._started(compilation._EVENT, 0.0, fun_name="jit(add)")
    compilation._ended(compilation._EVENT, 0.001, fun_name="jit(add)")
    assert lines[1:] == ["  compiled jit(step) in 61 s"]
    assert not compilation._waiting
