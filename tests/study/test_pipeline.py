"""How the study's stages hang together, with stand-ins that write a file each and run no model."""

import dataclasses

import pytest
from finished_study import contents, sketch

from ema_jax import config as ema
from ema_jax.errors import UserError
from ema_jax.runtime.files import read_json
from ema_jax.study.pipeline import AFTER_RUNS, NAMES, OF_RUNS, SHARED

RUNS = [f"{stage}/{arm}/seed_0" for arm in ("npo", "npo_retain") for stage in OF_RUNS]


def test_the_stages_are_those_of_the_paper():
    assert (*SHARED, "dose", *OF_RUNS, *AFTER_RUNS) == NAMES
    assert OF_RUNS == ("unlearn", "evaluate")
    assert AFTER_RUNS == ("analyse", "report")


def test_all_stages_run_once_in_their_order(tmp_path):
    assert sketch(tmp_path) == [*SHARED, *RUNS, *AFTER_RUNS]
    before = contents(tmp_path)
    assert sketch(tmp_path) == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize("killed", [*SHARED, *RUNS, *AFTER_RUNS])
def test_a_killed_study_resumes_where_it_stopped(tmp_path, killed):
    with pytest.raises(KeyboardInterrupt):
        sketch(tmp_path, killed=killed)
    order = [*SHARED, *RUNS, *AFTER_RUNS]
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
    {"dose": {"trials": 2}},
    {"model": {"dtype": "bfloat16"}},
    {"model": {"system_prompt": "Be brief."}},
    {"model": {"enable_thinking": True}},
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


def test_text_can_be_kept_from_later_stages_on_but_not_forgotten(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sketch(tmp_path, killed="evaluate/npo/seed_0")
    order = [*SHARED, *RUNS, *AFTER_RUNS]
    rest = order[order.index("evaluate/npo/seed_0") :]
    assert sketch(tmp_path, keep_text=True) == rest
    assert sketch(tmp_path, keep_text=True) == []

    def kept(name: str) -> bool:
        return read_json(tmp_path / f"stages/{name}.json")["settings"]["keep_text"]

    assert (kept("baseline"), kept("evaluate.npo.seed_0")) == (False, True)
    with pytest.raises(UserError, match="keep_text = True, and the config now says False"):
        sketch(tmp_path)


def test_every_field_of_the_config_belongs_to_a_stage(tmp_path):
    """A field that no stage's settings hold could change without a word."""
    named = {key for change in CHANGES for key in change} - {"fingerprint"} | {"keep_text"}
    # Devices change no figure beyond rounding; runs, cells and grids are the stages' names; limits
    # of the baseline only end a study; a tracker only receives figures.
    free = {"mesh", "heartbeat_seconds", "checkpoints", "profile", "seeds", "cells", "grid"}
    free |= {"baseline", "tracker"}
    assert named | free == {field.name for field in dataclasses.fields(ema.StudyConfig)}


def test_a_dose_is_searched_for_once_an_arm_before_its_seeds(tmp_path):
    arms = {"npo": {}, "ablated": {"trainable": "ablation"}}
    searching = {"arms": arms, "dose": {"trials": 2}}
    done = sketch(tmp_path, seeds=(4, 5), **searching)
    assert [name for name in done if name.startswith("dose")] == ["dose/npo"]
    for name in ("unlearn.npo.seed_4", "unlearn.npo.seed_5"):
        inputs = read_json(tmp_path / f"stages/{name}.json")["inputs"]
        assert list(inputs) == ["prompts", "baseline", "harvest", "dose/npo"]
    assert "dose/npo" not in read_json(tmp_path / "stages/unlearn.ablated.seed_4.json")["inputs"]
    added = sketch(tmp_path, seeds=(6, 4, 5), **searching)
    assert "dose/npo" not in added, "it does not depend on the seeds"
    assert "unlearn/npo/seed_6" in added
    assert "unlearn/npo/seed_4" not in added


def test_single_stages(tmp_path):
    with pytest.raises(UserError, match="stage baseline needs the stage prompts"):
        sketch(tmp_path, only=["baseline"])
    assert not any(tmp_path.iterdir())
    assert sketch(tmp_path, only=["prompts", "baseline", "concepts"]) == list(NAMES[:3])
    assert sketch(tmp_path, only=["harvest", "unlearn"]) == ["harvest", *RUNS[::2]]
    sketch(tmp_path)
    assert sketch(tmp_path, only=["analyse", "report"]) == []
    (tmp_path / "out/report").unlink()
    assert sketch(tmp_path, only=["report"]) == ["report"]
    assert read_json(tmp_path / "stages/report.json")["inputs"].keys() == {"analyse"}


def test_figures_of_what_is_there(tmp_path):
    """A baseline is enough; what is finished later is taken in."""
    with pytest.raises(UserError, match="stage analyse needs the stage baseline"):
        sketch(tmp_path, only=["prompts", "analyse"])
    assert sketch(tmp_path, only=["baseline"]) == ["baseline"]
    assert sketch(tmp_path, only=["analyse", "report"]) == ["analyse", "report"]
    assert sketch(tmp_path, only=["concepts", "forecast"]) == ["concepts", "forecast"]
    assert sketch(tmp_path, only=["analyse", "report"]) == ["analyse", "report"]
    assert sketch(tmp_path) == ["harvest", *RUNS, *AFTER_RUNS]


def test_each_stage_reads_from_those_before_it(tmp_path):
    arms = {"npo": {}, "ablated": {"trainable": "ablation"}}
    done = sketch(tmp_path, arms=arms, seeds=(0, 1))

    def inputs(name: str) -> list[str]:
        return list(read_json(tmp_path / f"stages/{name}.json")["inputs"])

    assert inputs("unlearn.npo.seed_1") == ["prompts", "baseline", "harvest"]
    # Its direction is a concept of the base.
    assert inputs("unlearn.ablated.seed_0") == ["prompts", "baseline", "concepts", "harvest"]
    own = ["prompts", "baseline", "concepts", "unlearn/npo/seed_1"]
    assert inputs("evaluate.npo.seed_1") == own
    evaluated = [name for name in done if name.startswith("evaluate")]
    assert len(evaluated) == 4
    assert inputs("analyse") == ["prompts", "baseline", "forecast", *evaluated]
    for i, name in enumerate(done):
        assert set(inputs(name.replace("/", "."))) <= set(done[:i]), name
