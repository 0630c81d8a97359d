"""Damaged files of every loader, at random: `pytest -m slow tests/robustness` (see `fuzz.py`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import damage

SECONDS = 300


def test_damage_differs_and_repeats():
    import random

    good = json.dumps({"a": [1, {"b": None}], "c": "text"}).encode()
    first, again = ([damage(good, random.Random(i)) for i in range(200)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 150


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
