"""Configs: every shipped one reads, and whatever is wrong with one is said by its field's name."""

import re
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from ema_jax import config as ema
from ema_jax.config import StudyConfig
from ema_jax.errors import UserError
from ema_jax.refusal.judges import JUDGES, TEXT_JUDGES
from ema_jax.study import config_file
from ema_jax.unlearning.config import UnlearnConfig

CONFIGS = Path(__file__).parents[2] / "configs"
CELLS = ("qwen_cyber", "qwen_safety", "mistral_cyber", "mistral_safety")
SMOLLM2 = ("smollm2_cyber", "smollm2_safety", "smollm2_replication")
SHIPPED = ("tiny", "tiny_replication", *SMOLLM2, *CELLS)


def shipped(name: str) -> ConfigDict:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_read_and_name_their_own_launch_line(name):
    study = ema.read(shipped(name))
    assert {"npo", "npo_retain"} <= set(study.arms)
    assert study.arm("npo").retain_weight == 0 < study.arm("npo_retain").retain_weight
    text = (CONFIGS / f"{name}.py").read_text()
    assert f"python -m ema_jax.main --config=configs/{name}.py --workdir=" in text


def test_the_papers_four_cells():
    read = {name: ema.read(shipped(name)) for name in CELLS}
    assert {(study.model.source.split("/")[0], study.target) for study in read.values()} == {
        (owner, target) for owner in ("Qwen", "mistralai") for target in ("cybersecurity", "safety")
    }
    # Nothing but model and target tells the cells apart.
    assert len({repr(vars(s) | {"model": 0, "target": 0}) for s in read.values()}) == 1


def test_the_replication_is_both_families_by_both_targets_over_five_seeds():
    study = ema.read(shipped("tiny_replication"))
    cells = [ema.cell(study, name) for name in study.cells]
    assert len({(Path(c.model.source).name, c.target) for c in cells}) == 4
    assert all(c.seeds == (0, 1, 2, 3, 4) and not c.cells for c in cells)
    alone = ema.read(shipped("tiny"))
    for c in cells:
        assert set(c.arms) == set(alone.arms)
        assert c.arms["npo"] == alone.arms["npo"]


def test_defaults_survive_the_round_trip():
    assert ema.read(ema.default()) == StudyConfig()
    assert ema.read({}) == StudyConfig()
    assert ema.read(ema.default().copy_and_resolve_references()) == StudyConfig()


def test_overrides_on_the_command_line():
    def parsed(*overrides: str) -> StudyConfig:
        fields = [text.removeprefix("--config.").split("=", 1) for text in overrides]
        return config_file.load(str(CONFIGS / "tiny.py"), [(name, text) for name, text in fields])

    study = parsed(
        "--config.seeds=(3, 4)",
        "--config.unlearn.learning_rate=1",
        "--config.unlearn.lora.rank=2",
        "--config.arms.npo_retain.min_steps=7",
        "--config.model.revision=main",
        "--config.model.system_prompt=Be brief.",
        "--config.keep_text=true",
        "--config.prompts.counts.eval=5",
    )
    assert study.seeds == (3, 4)
    assert study.arm("npo").learning_rate == 1.0
    assert isinstance(study.arm("npo").learning_rate, float)
    assert study.arm("npo_retain").lora.rank == 2
    assert (study.arm("npo").min_steps, study.arm("npo_retain").min_steps) == (0, 7)
    assert (study.model.revision, study.model.system_prompt) == ("main", "Be brief.")
    assert study.keep_text
    assert study.prompts.counts["eval"] == 5
    with pytest.raises(UserError, match="learning_rat"):
        parsed("--config.unlearn.learning_rat=1")


def test_an_arm_replaces_what_it_names_and_shares_the_rest():
    study = ema.read(
        {
            "unlearn": {"beta": 0.2, "lora": {"rank": 2, "alpha": 3.0}},
            "arms": {"a": {}, "b": {"beta": 0.5, "lora": {"alpha": 9.0}}},
        }
    )
    a, b = study.arm("a"), study.arm("b")
    assert (a.beta, a.lora.rank, a.lora.alpha) == (0.2, 2, 3.0)
    assert (b.beta, b.lora.rank, b.lora.alpha) == (0.5, 2, 9.0)
    assert b.max_steps == UnlearnConfig().max_steps
    assert hash(a) != hash(b), "an arm is a static argument of the train step"


def test_a_cell_replaces_what_it_names_and_shares_the_rest():
    study = ema.read(
        {
            "unlearn": {"beta": 0.2},
            "cells": {"x": {"target": "safety", "unlearn": {"max_steps": 3}}, "y": {}},
        }
    )
    x, y = ema.cell(study, "x"), ema.cell(study, "y")
    assert (x.target, x.unlearn.max_steps, x.unlearn.beta) == ("safety", 3, 0.2)
    assert y == StudyConfig(unlearn=UnlearnConfig(beta=0.2))


def arm(**values):
    return {"arms": {"npo": values}}


# What is given, and what the one line must name.
BAD = [
    ({"targett": "safety"}, "targett.*did you mean 'target'"),
    ({"unlearn": {"batch_size": 0}}, r"unlearn\.batch_size = 0 is not above zero"),
    ({"unlearn": {"learning_rat": 1.0}}, r"unlearn\.learning_rat.*learning_rate"),
    ({"unlearn": {"lora": {"rnak": 1}}}, r"unlearn\.lora\.rnak"),
    ({"model": {"zzz": 1}}, r"model\.zzz.*source"),
    (arm(learning_rte=1.0), r"arms\.npo\.learning_rte"),
    ({"cells": {"x": {"tarqet": "safety"}}}, r"cells\.x.*tarqet"),
    ({"cells": {"x": {"target": "nothing"}}}, r"cells\.x.*target.*nothing"),
    ({"seeds": 3}, "seeds = 3"),
    ({"seeds": (0.5,)}, "seeds = 0.5 is not a int"),
    ({"seeds": (True,)}, "seeds = True"),
    ({"seeds": "12"}, "seeds = '12'"),
    ({"seeds": ()}, "seeds"),
    ({"seeds": (1, 1)}, r"seeds.*twice"),
    ({"seeds": (-1,)}, "seeds"),
    ({"keep_text": "yes"}, "keep_text = 'yes' is not a bool"),
    ({"keep_text": 1}, "keep_text = 1 is not a bool"),
    ({"target": None}, "target = None is not a str"),
    ({"model": "a/b"}, "model = 'a/b'"),
    ({"model": {"dtype": "float16"}}, r"model\.dtype 'float16' is none of float32, bfloat16"),
    ({"generation": {"max_new_tokens": 0}}, r"generation\.max_new_tokens = 0"),
    ({"generation": {"batch_size": 2.5}}, r"generation\.batch_size = 2\.5"),
    ({"harvest": {"min_examples": 0}}, r"harvest\.min_examples"),
    ({"harvest": {"response_cap": -1}}, r"harvest\.response_cap"),
    ({"concepts": {"permutations": 0}}, r"concepts\.permutations"),
    ({"concepts": {"poolings": ("first",)}}, r"concepts\.poolings"),
    ({"concepts": {"poolings": ()}}, r"concepts\.poolings"),
    ({"judge": "oracle"}, "judge 'oracle' is none of.*lexical"),
    ({"extra_judges": {"oracle": {}}}, "judge 'oracle' is none of.*lexical"),
    ({"extra_judges": {"causal_lm": {}}}, r"extra_judges\.causal_lm.*model"),
    ({"extra_judges": {"lexical": {}}}, "extra_judges: 'lexical' is the judge already"),
    ({"prompts": {"lookalike_source": "salad"}}, r"prompts\.lookalike_source.*no benign.*xstest"),
    ({"prompts": {"lookalike_source": "organism"}}, r"prompts\.lookalike_source: 'organism'"),
    ({"prompts": {"lookalike_source": "dolly"}}, r"prompts\.lookalike_source.*contrast already"),
    ({"prompts": {"eval_source": "file"}}, r"prompts\.eval_source: unknown source 'file'"),
    ({"prompts": {"eval_source": "salad"}}, r"prompts\.eval_source: 'salad' is the source"),
    ({"arms": {}}, "arms"),
    ({"arms": {"base": {}}}, "arms: 'base'"),
    ({"arms": {"../up": {}}}, "arms: '../up'"),
    ({"arms": {"npo": 3}}, r"arms\.npo = 3 is not a set of fields"),
    ({"cells": {"x": 3}}, r"cells\.x"),
    ({"cells": {"../up": {}}}, r"cells: '\.\./up'"),
    (arm(beta=0.0), r"arms\.npo: beta = 0\.0"),
    (arm(beta=float("inf")), r"arms\.npo: beta = inf is not a finite number"),
    (arm(learning_rate=-1e-4), r"arms\.npo: learning_rate"),
    (arm(learning_rate=float("nan")), r"arms\.npo: learning_rate"),
    (arm(max_steps=0), r"arms\.npo: max_steps"),
    (arm(eval_every=0), r"arms\.npo: eval_every"),
    (arm(batch_size=0), r"arms\.npo: batch_size"),
    (arm(stop_at=1.0), r"arms\.npo: stop_at = 1\.0 is not below 1"),
    (arm(stop_at=-0.1), r"arms\.npo: stop_at = -0\.1 is below zero"),
    (arm(retain_weight=-1.0), r"arms\.npo: retain_weight"),
    (arm(forget_weight=-1.0), r"arms\.npo: forget_weight"),
    (arm(warmup_steps=-1), r"arms\.npo: warmup_steps"),
    (arm(min_steps=-1), r"arms\.npo: min_steps"),
    (arm(max_invalid=1.5), r"arms\.npo: max_invalid"),
    (arm(trainable="head"), r"arms\.npo: trainable 'head'"),
    (arm(lora={"rank": 0}), r"arms\.npo: lora\.rank"),
    (arm(lora={"targets": ("lm_head",)}), r"arms\.npo: lora\.targets.*lm_head"),
    (arm(lora={"targets": ()}), r"arms\.npo: lora\.targets"),
    (arm(objective="nop"), r"arms\.npo: objective 'nop' is none of ga, npo"),
    (arm(retain_objective="mse"), r"arms\.npo: retain_objective 'mse'"),
    (arm(forget_norm="max"), r"arms\.npo: forget_norm 'max' is none of sum, mean"),
    (arm(optimizer="adam"), r"arms\.npo: optimizer 'adam'"),
    (arm(schedule="step"), r"arms\.npo: schedule 'step'"),
    (arm(lora={"dropout": 1.0}), r"arms\.npo: lora\.dropout = 1\.0"),
    (arm(layers=(3,)), r"arms\.npo: layers \(3,\) is not \(first, last\)"),
    (arm(layers=(3, 2)), r"arms\.npo: layers"),
    (arm(modules=("down_proj",)), r"arms\.npo: modules is for trainable = 'full'"),
    (arm(trainable="full", modules=("mlp",)), r"arms\.npo: .*modules \['mlp'\]"),
    (arm(retain_counts={"poetry": 3}), r"arms\.npo: retain_counts \{'poetry': 3\}"),
    (arm(retain_counts={"bias": 0}), r"arms\.npo: retain_counts \{'bias': 0\}"),
    (arm(accumulate=3), r"arms\.npo: batch_size = 16 is no multiple of accumulate = 3"),
    ({"checkpoints": {"keep": 0}}, r"checkpoints\.keep = 0"),
    ({"profile": -1}, "profile = -1"),
    ({"mesh": (1, 1)}, "mesh"),
    ({"mesh": (0, 1, 1)}, "mesh"),
    ({"mesh": (-1, -1, 1)}, "mesh"),
    ({"domains": ()}, "domains"),
    ({"domains": ("safety", "safety"), "target": "safety"}, "domains.*twice"),
    ({"domains": ("safety",)}, "target.*cybersecurity.*not one of the domains"),
    ({"target": "poetry"}, "target.*poetry"),
    ({"target": "chemical_weapons"}, "target.*deny-listed"),
    ({"domains": ("cybersecurity", "child_abuse")}, "domains.*deny-listed"),
    ({"prompts": {"source": "nowhere"}}, r"prompts\.source"),
    ({"prompts": {"source": "file"}}, r"prompts\.path"),
    ({"prompts": {"counts": {"test": 3}}}, r"prompts\.counts.*test"),
    ({"prompts": {"counts": {"eval": -3}}}, r"prompts\.counts\.eval = -3 is below zero"),
    ({"prompts": {"counts": {"eval": True}}}, r"prompts\.counts\.eval = True is not a int"),
    ({"prompts": {"near_duplicate": 0.0}}, r"prompts\.near_duplicate = 0\.0 is not above zero"),
    ({"prompts": {"near_duplicate": 1.5}}, r"prompts\.near_duplicate = 1\.5 is above 1"),
    ({"prompts": {"max_chars": 0}}, r"prompts\.max_chars = 0 is not above zero"),
]


@pytest.mark.parametrize(("values", "named"), BAD, ids=[str(values)[:60] for values, _ in BAD])
def test_nonsense_is_refused_by_name(values, named):
    with pytest.raises(UserError) as raised:
        ema.read(values)
    message = str(raised.value)
    assert re.search(named, message), message
    assert "\n" not in message


@pytest.mark.parametrize("name", JUDGES)
def test_every_judge_of_the_registry_can_be_named(name):
    if name in TEXT_JUDGES:
        assert ema.read({"judge": name}).judge == name
    else:
        values = {"judge": name, "judge_options": {"model": "owner/name"}}
        assert ema.read(values).judge_options == {"model": "owner/name"}
    if name in ("logodds", "causal_lm", "endpoint"):
        with pytest.raises(UserError, match=f"judge_options of {name}: missing.*'model'"):
            ema.read({"judge": name})


def test_config_read_does_not_change_what_it_reads():
    config = shipped("tiny_replication")
    before = config.to_dict()
    study = ema.read(config)
    ema.cell(study, next(iter(study.cells)))
    assert config.to_dict() == before
