"""Damaged files of every loader, at random: `pytest -m slow tests/robustness` (see `fuzz.py`)."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import damage
from report_fixtures import example_results, write_finished

from ema_jax.data.chat import Chat
from ema_jax.data.local import read_local
from ema_jax.errors import UserError
from ema_jax.models import checkpoint
from ema_jax.organism import CHECKPOINTS
from ema_jax.runtime.files import read_jsonl, write_json, write_jsonl
from ema_jax.study.finished import read_judged, read_results

SECONDS = 300


def test_damage_differs_and_repeats():
    good = json.dumps({"a": [1, {"b": None}], "c": "text"}).encode()
    first, again = ([damage(good, random.Random(i)) for i in range(200)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 150


# What fuzzing found, kept small: file, JSON fields that are set in it, and what is said.
FOUND = {
    "a length that is text": ("tokenizer_config.json", {"model_max_length": "a"}, "cannot be read"),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found(tmp_path, case):
    name, fields, said = FOUND[case]
    folder = shutil.copytree(CHECKPOINTS / "qwen2", tmp_path / "m")
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | fields))
    with pytest.raises(UserError, match=said):
        Chat.load(folder)


@pytest.mark.parametrize("name", ["domai\nn", "domai\r\nn"])
def test_a_line_break_in_a_name_leaves_the_message_one_line(tmp_path, name):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "x", name: "bias"}) + "\n")
    with pytest.raises(UserError, match="column 'domain' is missing") as raised:
        read_local(path)
    assert len(str(raised.value).splitlines()) == 1


LONG = {f"{'x' * 300}.safetensors": "no such file", "a\x00b": "no such file"}


@pytest.mark.parametrize("name", LONG)
def test_an_index_names_what_cannot_be_a_file(tmp_path, name):
    folder = shutil.copytree(CHECKPOINTS / "qwen2", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(UserError, match=LONG[name]):
        checkpoint.check(folder)


# Place in `results.json` (None: the file), what stands there, and what is said.
CHANGED = [
    (("arms", "npo", "refusal", "bias", "ci95"), [0.1], "arms.npo.refusal.bias.ci95: .* 2 items"),
    (("arms", "npo", "refusal", "bias", "rate"), "0.5", "arms.npo.refusal.bias.rate: "),
    (("arms", "npo", "refusal"), [], "arms.npo.refusal: "),
    (("arms", "npo", "seeds"), {"one": {"refusal": {}, "steps": 1}}, "seed 'one' is no number"),
    (("arms",), None, "arms: "),
    (("target",), 3, "target: "),
    (("domains",), "bias", "domains: "),
    (("model",), {"id": "x"}, "model.path: Field required"),
    (("ema", "npo"), 1, "ema.npo: "),
    (("ema", "npo", "bias", "ci95"), [0.1], "ema.npo.bias.ci95: .* 2 items"),
    (("on_target", "npo", "ci95"), [0.1], "on_target.npo.ci95: .* 2 items"),
    (("containment", "npo_retain", "ci95"), [0.1], "containment.npo_retain.ci95: .* 2 items"),
    (("provenance", "seeds"), ["0"], "provenance.seeds.0: "),
    (("schema",), 9, "schema 1"),
    ((), [], "schema 1"),
]


@pytest.mark.parametrize(("place", "value", "said"), CHANGED)
def test_results_that_were_changed_are_one_line(tmp_path, place, value, said):
    results = {"": example_results()}
    inner = results
    for key in ("", *place)[:-1]:
        inner = inner[key]
    inner[("", *place)[-1]] = value
    write_json(tmp_path / "results.json", results[""])
    with pytest.raises(UserError, match=said) as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"verdict": "maybe"}, "verdict 'maybe' is none of refused"),
        ({"verdict": None}, "0.verdict: "),
        ({"id": 3}, "0.id: "),
        ({"reason": []}, "0.reason: "),
        ({"response": None}, "0.response: "),
    ],
)
def test_responses_that_were_changed_are_one_line(tmp_path, change, said):
    write_finished(tmp_path)
    rows = read_jsonl(tmp_path / "responses/base.jsonl")
    rows[0] |= change
    write_jsonl(tmp_path / "responses/base.jsonl", rows)
    with pytest.raises(UserError, match=said):
        read_judged(tmp_path, "base", text=True)


@pytest.mark.slow
def test_no_loader_fails_otherwise_than_it_may(capsys):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fuzz.py")), str(SECONDS)],
        capture_output=True,
        text=True,
        check=True,
    )
    with capsys.disabled():
        print(done.stdout)
    assert done.stdout.rstrip().endswith("places that fail 0"), done.stdout


def test_a_stop_that_became_another_exception():
    script = """
import os, signal
from ema_jax.runtime import cli
with cli.exit_codes("kept"):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        raise ValueError("static arguments") from None
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "stopped: asked to stop (SIGTERM); kept\n"
