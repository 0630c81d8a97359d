"""The public names resolve, and importing any of the project's modules starts nothing."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest

import ema_jax


@pytest.mark.parametrize("name", ema_jax.__all__)
def test_every_public_name_resolves(name):
    value = getattr(ema_jax, name)
    assert name == "__version__" or callable(value)
    assert name in dir(ema_jax)
    if name not in ("__version__", "export", "load", "attach_lora", "merge_lora"):
        assert value.__name__ == name


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ema_jax.lode


def test_the_public_names_are_those_of_the_design():
    """Load a checkpoint, capture, vectors, entanglement, judge, unlearn: each by its plain name."""
    wanted = {"load", "capture", "concept_vectors", "entanglement", "get_judge", "unlearn"}
    assert wanted <= set(ema_jax.__all__)


MODULES = sorted(
    module.name for module in pkgutil.walk_packages(ema_jax.__path__, prefix="ema_jax.")
)

_IMPORT_ALL = """
import importlib, json, sys, time
heavy = ("jax", "transformers", "torch", "datasets", "matplotlib", "statsmodels", "pandas")
start = time.process_time()
import ema_jax
alone = time.process_time() - start
early = [name for name in heavy if name in sys.modules]
for name in sys.argv[1:]:
    importlib.import_module(name)
from absl import flags
print(json.dumps({
    "alone": alone,
    "early": early,
    "late": [n for n in ("datasets", "matplotlib", "statsmodels", "torch") if n in sys.modules],
    "flags": [n for n in sys.argv[1:] if flags.FLAGS.get_key_flags_for_module(n)],
    "seconds": time.process_time() - start,
}))
"""


def test_importing_starts_no_backend_and_loads_little(tmp_path):
    assert {"ema_jax.main", "ema_jax.study.stage_bodies", "ema_jax.organism.train"} <= set(MODULES)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *MODULES],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "nowhere"},  # so that starting a backend fails
    )
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["flags"] == [], "flags are a command's business"
    assert told["alone"] < 0.5
    assert told["early"] == [], "import ema_jax is quick"
    assert told["late"] == [], "what is slow to import waits until it is needed"
    assert told["seconds"] < 10
    assert not list(tmp_path.iterdir())


def test_the_packages_ship_a_type_marker_and_their_checkpoints():
    from pathlib import Path

    home = Path(importlib.import_module("ema_jax").__path__[0])
    assert (home / "py.typed").exists()
