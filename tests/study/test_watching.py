"""What is seen of a running study: places, what stages found, time left, the plan of a dry run."""

import importlib.util
import statistics

import datasets
import pytest
from absl import logging as absl_logging

from ema_jax.models import hub
from ema_jax.refusal.verdicts import COMPLIED, INVALID, REFUSED
from ema_jax.runtime import cli, compilation, hardware
from ema_jax.study import config_file, plan, watching
from ema_jax.study.artifacts import Artifacts, Run, runs_of
from ema_jax.study.pipeline import names
from ema_jax.study.workload import CPU_CORE, Work, work


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
    # No training was measured yet: nothing is said of the time left.
    assert lines[2] == "stage 3 of 3: unlearn, arm npo, seed 0"
    assert (
        lines[3] == "  24 steps, stopped: target, cybersecurity 2% refused on the dev split (30 s)"
    )


# Seconds of stages as they were, in order; of runs as (arm, seed, unlearn, evaluate). Two studies
# of the embedded models on a loaded core, SmolLM2-135M on one core, and seeds of two arms.
EMBEDDED = ({"baseline": 14.9, "concepts": 12.6, "forecast": 7.3, "harvest": 24.5}, [
    ("npo", 0, 57.2, 20.1), ("npo_retain", 0, 80.5, 11.5),
], {"analyse": 0.2, "report": 8.2})  # fmt: skip
LOADED = ({"baseline": 49.3, "concepts": 58.1, "forecast": 24.0, "harvest": 110.8}, [
    ("npo", 0, 168.2, 59.4), ("npo_retain", 0, 110.3, 24.2),
], {"analyse": 2.3, "report": 41.0})  # fmt: skip
SMOLLM2 = ({"baseline": 536.0, "concepts": 34.2, "forecast": 10.4, "harvest": 159.4}, [
    ("npo", 0, 190.7, 224.6), ("npo", 1, 136.1, 138.7), ("npo", 2, 151.0, 151.2),
    ("npo_retain", 0, 241.2, 108.0), ("npo_retain", 1, 203.6, 142.7),
    ("npo_retain", 2, 610.5, 309.2),
], {"analyse": 0.9, "report": 16.6})  # fmt: skip
SEEDS = ({"baseline": 38.1, "concepts": 39.4, "forecast": 17.2, "harvest": 72.4}, [
    ("npo", 0, 146.3, 50.0), ("npo", 1, 133.5, 57.7), ("npo", 2, 183.2, 38.6),
    ("npo_retain", 0, 162.3, 18.6), ("npo_retain", 1, 146.6, 14.3), ("npo_retain", 2, 133.5, 15.2),
], {"analyse": 1.2, "report": 8.0})  # fmt: skip


def _in_order(recorded):
    before, runs, after = recorded
    yield from ((name, None, seconds) for name, seconds in before.items())
    for arm, seed, *both in runs:
        for name, seconds in zip(("unlearn", "evaluate"), both, strict=True):
            yield name, Run(arm, seed), seconds
    yield from ((name, None, seconds) for name, seconds in after.items())


@pytest.mark.parametrize("recorded", [EMBEDDED, LOADED, SMOLLM2, SEEDS])
def test_the_time_left_is_about_what_it_was(recorded, tmp_path):
    stages = list(_in_order(recorded))
    watch = watching.Watch(
        config_file.load("tiny"), Artifacts(tmp_path), [each[:2] for each in stages]
    )
    ratios = []
    for place, (name, run, seconds) in enumerate(stages):
        estimated, real = watch._seconds_left(), sum(each[2] for each in stages[place:])
        trained = any(each[0] == "unlearn" for each in stages[:place])
        measured = trained and name in ("unlearn", "evaluate")
        assert (estimated or 0) > 0 if measured else not estimated
        ratios += [estimated / real] if estimated else []
        watch.end(name, run, seconds)
    assert min(ratios) > 1 / 3
    assert max(ratios) < 2
    assert 0.5 < statistics.median(ratios) < 1.5


@pytest.mark.parametrize(
    ("measured", "left"),
    [
        ([], ""),
        ([("baseline", None, 30.0)], ""),  # nothing is known of training
        ([("unlearn", Run("npo", 0), 100.0)], ""),  # nor here of evaluations
        ([("baseline", None, 30.0), ("unlearn", Run("npo", 0), 100.0)], ", about 2 min left"),
        (
            [  # the median of an arm's three
                ("baseline", None, 900.0),
                ("unlearn", Run("npo", 0), 100.0),
                ("evaluate", Run("npo_retain", 0), 8.0),
                ("unlearn", Run("npo", 1), 20.0),
                ("unlearn", Run("npo", 2), 60.0),
            ],
            ", about 68 s left",
        ),
    ],
)
def test_the_time_left_after_a_resumption(measured, left, tmp_path, lines):
    config, run = config_file.load("tiny"), Run("npo", 3)
    stages = [("unlearn", run), ("evaluate", run), ("analyse", None), ("report", None)]
    watch = watching.Watch(config, Artifacts(tmp_path), stages, measured)
    watch.begin("unlearn", run)
    assert lines == [f"stage 1 of 4: unlearn, arm npo, seed 3{left}"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (9000, "2.5 h"),
        (180_000, "2 days"),
    ],
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


def _plan(monkeypatch, tmp_path, device, name="qwen_cyber"):
    monkeypatch.setattr(plan, "at_hand", lambda: device)
    monkeypatch.setattr(plan, "cores", lambda: 8)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    config = config_file.load(name)
    source = None if name == "qwen_cyber" else hub.find(config.model.source)
    return plan.text("", config, source, None, [])


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (
            "cpu",
            "32 days on the 8 processor cores here, or 57 min on one H100, and some 5 min",
        ),
        ("NVIDIA H100 80GB HBM3", "57 min on one NVIDIA H100 80GB HBM3, and some 6 min"),
        ("NVIDIA H200", "on one NVIDIA H200, and some 6 min"),
        # Slower by 0.61 in memory, which decoding waits for, and by 0.32 in products.
        ("NVIDIA A100-SXM4-80GB", "2.5 h on one NVIDIA A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 3090", "on one H100 (for what is here, NVIDIA GeForce RTX 3090, no"),
        ("TPU", "on one H100 (for what is here, TPU, no figures are known)"),
    ],
)
def test_the_time_is_of_the_device_at_hand_or_says_of_which(monkeypatch, tmp_path, device, said):
    (line,) = (each for each in _plan(monkeypatch, tmp_path, device).split("\n") if "time:" in each)
    assert said in line


def test_the_weights_are_those_of_the_device_at_hand(monkeypatch, tmp_path):
    text = _plan(monkeypatch, tmp_path, "NVIDIA H100 80GB HBM3")
    assert "14.2 GiB of weights in bfloat16" in text  # measured: docs/one-gpu.md
    small = _plan(monkeypatch, tmp_path, "cpu", "tiny")
    assert "6 MiB of weights in float32" in small
    assert "H100" not in small


def test_the_plan_says_what_is_here(monkeypatch, tmp_path):
    plain = _plan(monkeypatch, tmp_path, "cpu")
    assert f"compiled programs: none yet in {tmp_path}" in plain
    assert plain.count("to download") == 4  # the model and three sets of prompts
    for name in ("jit_step-01-cache", "jit_step-01-atime"):
        (tmp_path / name).touch()
    made = tmp_path / "datasets/databricks___databricks-dolly-15k/default/0.0.0/0123"
    made.mkdir(parents=True)
    (made / "dataset_info.json").touch()
    text = _plan(monkeypatch, tmp_path, "cpu")
    assert "licence CC-BY-SA-3.0, here, in the local cache" in text
    assert f"compiled programs: 1 in {tmp_path}" in text
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert cli.compiled_programs() is None


# A study of SmolLM2-135M took 37 minutes of processor time (docs/real-model.md, 26 November 2026).
_AS_MEASURED = [
    *(("seeds", "(0, 1, 2)"), ("prompts.counts.dev", "4"), ("unlearn.batch_size", "4")),
    ("harvest.response_cap", "24"),
    *(("harvest.samples", "1"), ("unlearn.max_steps", "12")),
    *((f"arms.npo_retain.{name}_steps", "16") for name in ("min", "max")),
    ("arms.npo_retain.eval_every", "4"),
]


def test_the_time_on_a_cpu_is_an_upper_bound_near_what_was_measured():
    config = config_file.load("smollm2_cyber", _AS_MEASURED)
    total = Work()
    for stage in ("baseline", "concepts", "harvest"):
        total = total.plus(work(config, stage))
    for run in runs_of(config):
        total = total.plus(work(config, "unlearn", run.arm)).plus(work(config, "evaluate", run.arm))
    assert 37 < total.seconds(CPU_CORE, 134.5e6) / 60 < 60


@pytest.mark.parametrize(
    ("platforms", "plugin", "gpus", "tpus", "found"),
    [
        ("", True, ["Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n"], False, "NVIDIA H100 80GB HBM3"),
        ("", True, ["damaged"], False, "a GPU"),
        ("", True, [], False, "cpu"),
        ("", False, ["Model: NVIDIA H100"], False, "cpu"),
        ("cpu", True, ["Model: NVIDIA H100"], True, "cpu"),
        ("", True, [], True, "TPU"),
        ("tpu", True, [], True, "TPU"),
    ],
)
def test_the_device_at_hand(monkeypatch, tmp_path, platforms, plugin, gpus, tpus, found):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: plugin or None)
    monkeypatch.setattr(hardware, "_NVIDIA", f"{tmp_path}/*/information")
    monkeypatch.setattr(hardware, "_TPU_DEVICES", (f"{tmp_path}",) if tpus else ())
    for number, text in enumerate(gpus):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "information").write_text(text)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.at_hand() == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides GPUs
    assert hardware.at_hand() == (found if found == "TPU" else "cpu")


def test_the_plan_of_a_model_that_is_not_here(monkeypatch):
    monkeypatch.setattr(plan, "at_hand", lambda: "cpu")
    config = config_file.load("qwen_cyber")
    text = plan.text("", config, None, None, ["a/judge"])
    for said in (
        "Qwen/Qwen2.5-7B-Instruct (a Hub id, not in the local cache",
        "read its licence at https://huggingface.co/Qwen/Qwen2.5-7B-Instruct",
        "prompt set dolly: databricks/databricks-dolly-15k, licence CC-BY-SA-3.0, to download",
        "judging model a/judge",
        "28.4 GiB of weights in float32",
        "or 57 min on one H100",
        "compiled programs: ",
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
