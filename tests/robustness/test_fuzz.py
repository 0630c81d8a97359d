"""Damaged files of every loader, at random: `pytest -m slow tests/robustness` (see `fuzz.py`)."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import damage

from ema_jax.data.chat import Chat
from ema_jax.errors import UserError
from ema_jax.organism import CHECKPOINTS

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
