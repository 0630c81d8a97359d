"""Stages run once, again when they must, and never turn a folder into another study."""

import dataclasses
from pathlib import Path

import pytest
from finished_study import contents, sketch

from ema_jax import config as ema
from ema_jax.errors import UserError
from ema_jax.runtime.files import read_json
from ema_jax.study.pipeline import NAMES, OF_RUNS, SHARED
from ema_jax.study.workdir import StageContext, Workdir


class Work:
    """A stage that writes a file and counts how often it did."""

    def __init__(self, workdir: Workdir, name: str, text: str = "x"):
        self.path, self.text, self.runs = workdir / name, text, 0

    def __call__(self, context: StageContext) -> list[Path]:
        self.runs += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text)
        return [self.path]


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    return Workdir(tmp_path / "study")


def test_a_finished_stage_is_left_alone(workdir):
    work = Work(workdir, "a.txt")
    for _ in range(3):
        workdir.run("a", {"n": 1, "names": ("x", "y")}, [], work)
    assert work.runs == 1
    manifest = workdir.manifest("a")
    assert manifest["settings"] == {"n": 1, "names": ["x", "y"]}
    assert list(manifest["outputs"]) == ["a.txt"]


def test_a_missing_output_is_made_again_and_those_that_read_it_stay(workdir):
    first, second = Work(workdir, "a.txt"), Work(workdir, "b.txt")

    def run():
        workdir.run("a", {}, [], first)
        workdir.run("b", {}, ["a"], second)

    run()
    first.path.unlink()
    run()
    assert (first.runs, second.runs) == (2, 1), "the same bytes came back: b is still right"


def test_what_reads_a_changed_output_is_made_again(workdir):
    first, second, third = (Work(workdir, f"{name}.txt") for name in "abc")

    def run():
        workdir.run("a", {}, [], first)
        workdir.run("b", {}, ["a"], second)
        workdir.run("c", {}, ["b"], third)

    run()
    first.path.unlink()
    first.text = "something else"
    run()
    # The hash is of settings, inputs and outputs, so it reaches past b, whose own bytes are equal.
    assert (first.runs, second.runs, third.runs) == (2, 2, 2)


def test_a_folder_counts_with_all_that_is_in_it(workdir):
    def work(context) -> list[Path]:
        for name in ("one", "deep/two"):
            path = workdir / "out" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        # As a process leaves them that was killed while it wrote.
        (workdir / "out" / ".one.123.tmp").write_text("torn")
        return [workdir / "out"]

    workdir.run("a", {}, [], work)
    assert set(workdir.manifest("a")["outputs"]) == {"out/one", "out/deep/two"}
    (workdir / "out" / "deep/two").unlink()
    workdir.run("a", {}, [], work)
    assert (workdir / "out" / "deep/two").exists()


def test_a_stage_that_raises_leaves_no_manifest(workdir):
    def broken(context) -> list[Path]:
        (workdir / "half.txt").write_text("half")
        raise RuntimeError("no")

    (workdir.path).mkdir()
    with pytest.raises(RuntimeError):
        workdir.run("a", {}, [], broken)
    assert workdir.manifest("a") is None
    work = Work(workdir, "half.txt", "whole")
    workdir.run("a", {}, [], work)
    assert work.runs == 1
    assert (workdir / "half.txt").read_text() == "whole"


def test_an_input_that_was_never_made_is_named(workdir):
    work = Work(workdir, "b.txt")
    with pytest.raises(UserError, match=r"stage b needs the stage a, .* add it to --stage"):
        workdir.run("b", {}, ["a"], work)
    assert work.runs == 0
    assert not workdir.path.exists()


def test_other_settings_are_another_study(workdir):
    workdir.run("a", {"x": {"y": 1}, "z": (1, 2)}, [], Work(workdir, "a.txt"))
    before = contents(workdir.path)
    workdir.check({"a": {"z": (1, 2), "x": {"y": 1}}, "new": {}})
    for settings, said in (
        ({"x": {"y": 2}, "z": (1, 2)}, r"stage a was run with x\.y = 1, .* now says 2"),
        ({"x": {"y": 1}, "z": (1,)}, r"with z = \[1, 2\]"),
        ({"x": {"y": 1}}, r"now says .\(not set\)"),
        ({"x": {"y": 1}, "z": (1, 2), "w": 3}, r"with w = .\(not set\)"),
    ):
        with pytest.raises(UserError, match=f"another study: its {said}|{said}"):
            workdir.check({"a": settings})
    assert contents(workdir.path) == before


# How the study's stages hang together, with stand-ins that write a file each and run no model.


RUNS = [f"{stage}/{arm}/seed_0" for arm in ("npo", "npo_retain") for stage in OF_RUNS]


def test_all_stages_run_once_in_their_order(tmp_path):
    assert sketch(tmp_path) == [*SHARED, *RUNS, "analyse", "report"]
    before = contents(tmp_path)
    assert sketch(tmp_path) == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize("killed", [*SHARED, *RUNS, "analyse", "report"])
def test_a_killed_study_resumes_where_it_stopped(tmp_path, killed):
    with pytest.raises(KeyboardInterrupt):
        sketch(tmp_path, killed=killed)
    order = [*SHARED, *RUNS, "analyse", "report"]
    assert sketch(tmp_path) == order[order.index(killed) :]


def test_more_seeds_and_arms_are_added_and_the_figures_follow(tmp_path):
    sketch(tmp_path)
    assert sketch(tmp_path, seeds=(0, 1)) == [
        f"{stage}/{arm}/seed_1" for arm in ("npo", "npo_retain") for stage in OF_RUNS
    ] + ["analyse", "report"]
    more = {"npo": {}, "npo_retain": {"retain_weight": 5.0}, "gentle": {"learning_rate": 1e-5}}
    assert sketch(tmp_path, arms=more, seeds=(0, 1))[-2:] == ["analyse", "report"]
    assert sketch(tmp_path, arms={"npo": {}}) == ["analyse", "report"]


def test_finer_resampling_makes_the_forecast_and_the_figures_again(tmp_path):
    sketch(tmp_path)
    assert sketch(tmp_path, concepts={"permutations": 60}) == ["forecast", "analyse", "report"]
    assert sketch(tmp_path, concepts={"permutations": 60, "splits": 5})[0] == "forecast"


CHANGES = [
    {"target": "safety"},
    {"domains": ("cybersecurity", "safety")},
    {"prompts": {"seed": 1}},
    {"prompts": {"counts": {"eval": 13}}},
    {"judge": "substring_keyword"},
    {"judge_options": {"script": None}},
    {"extra_judges": {"substring_keyword": {}}},
    {"generation": {"max_new_tokens": 47}},
    {"harvest": {"response_cap": 7}},
    {"unlearn": {"beta": 0.2}},
    {"unlearn": {"lora": {"rank": 5}}},
    {"arms": {"npo": {"learning_rate": 0.5}}},
    {"concepts": {"poolings": ("prompt_mean",)}},
    {"model": {"dtype": "bfloat16"}},
    {"model": {"system_prompt": "Be brief."}},
    {"model": {"enable_thinking": True}},
    {"keep_text": True},
    {"export": True},
    {"sensitivity": {"samples": 1}},
    {"fingerprint": "another model"},
]


@pytest.mark.parametrize("change", CHANGES, ids=[str(change) for change in CHANGES])
def test_another_config_is_refused_and_nothing_written(tmp_path, change):
    sketch(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds another study: its stage .* choose another"):
        sketch(tmp_path, **change)
    assert contents(tmp_path) == before


def test_a_folder_of_before_thinking_was_a_choice_is_resumed(tmp_path):
    """Its settings, which a later version compares with its own, do not name the field."""
    sketch(tmp_path)
    assert "enable_thinking" not in "".join(
        path.read_text() for path in (tmp_path / "stages").glob("*.json")
    )


def test_every_field_of_the_config_belongs_to_a_stage(tmp_path):
    """A field that no stage's settings hold could change without a word."""
    named = {key for change in CHANGES for key in change} - {"fingerprint"}
    # Devices change no figure beyond rounding; runs, cells and grids are the stages' names.
    free = {"mesh", "heartbeat_seconds", "checkpoints", "profile", "seeds", "cells", "grid"}
    assert named | free == {field.name for field in dataclasses.fields(ema.StudyConfig)}


def test_single_stages(tmp_path):
    with pytest.raises(UserError, match="stage baseline needs the stage prompts"):
        sketch(tmp_path, only=["baseline"])
    assert not any(tmp_path.iterdir())
    assert sketch(tmp_path, only=["prompts", "baseline", "concepts"]) == list(NAMES[:3])
    assert sketch(tmp_path, only=["harvest", "unlearn"]) == ["harvest", *RUNS[::2]]
    with pytest.raises(UserError, match="stage analyse needs the stage"):
        sketch(tmp_path, only=["analyse", "report"])
    sketch(tmp_path)
    assert sketch(tmp_path, only=["analyse", "report"]) == []
    (tmp_path / "out/report").unlink()
    assert sketch(tmp_path, only=["report"]) == ["report"]
    assert read_json(tmp_path / "stages/report.json")["inputs"].keys() == {"analyse"}
