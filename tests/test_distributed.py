"""Who takes part, who writes, and what happens when one is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ema_jax import artifacts, distributed
from ema_jax.errors import UserError

ROOT = Path(__file__).parents[1]
ADDRESS = {"EMA_JAX_COORDINATOR": "host-0.job:8476"}
NUMBERS = {"EMA_JAX_NUM_PROCESSES": "4", "EMA_JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}),
        ({"EMA_JAX_COORDINATOR": "auto"}, {}),
        (
            ADDRESS | NUMBERS,
            {"coordinator_address": "host-0.job:8476", "num_processes": 4, "process_id": 3},
        ),
    ],
)
def test_the_environment_says_who_takes_part(environment, arguments):
    assert distributed._arguments(environment) == arguments


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"EMA_JAX_COORDINATOR": "host"}, "neither HOST:PORT nor auto"),
        (ADDRESS, "EMA_JAX_NUM_PROCESSES"),
        (ADDRESS | {"EMA_JAX_NUM_PROCESSES": "2"}, "EMA_JAX_PROCESS_ID"),
        (ADDRESS | NUMBERS | {"EMA_JAX_PROCESS_ID": "4"}, "not below"),
    ],
)
def test_half_an_environment_is_refused(environment, said):
    with pytest.raises(UserError, match=said):
        distributed.initialise(10, environment)


def test_alone_nothing_waits(tmp_path):
    assert distributed.is_first()
    distributed.barrier("nobody", seconds=0.001)
    done = []
    distributed.first_only(lambda: done.append(1), "nobody")
    artifacts.write_json(tmp_path / "x.json", {})
    assert done == [1]


def launch(folder: Path, program: str, *arguments: str) -> subprocess.Popen:
    path = folder / "program.py"
    path.write_text(program)
    launcher = [sys.executable, str(ROOT / "launch/local.py"), "--processes=2", "--devices=2"]
    return subprocess.Popen(
        [*launcher, *arguments, "--", sys.executable, str(path), str(folder)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# Writes, reads back at once what the first process wrote, then waits for one that never comes.
PIECES = """
import json, sys, time
from pathlib import Path
from ema_jax import artifacts, distributed
from ema_jax.errors import RunStoppedError

distributed.initialise(heartbeat_seconds=10)
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from ema_jax.models.sharding import make_mesh, host_array, batch_sharding

folder, me = Path(sys.argv[1]), jax.process_index()
artifacts.write_json(folder / "written.json", {"by": me})
assert artifacts.read_json(folder / "written.json") == {"by": 0}
with artifacts.atomic_path(folder / "tree") as temporary:
    temporary.mkdir()
    (temporary / "by").write_text(str(me))
assert (folder / "tree/by").read_text() == "0"
mesh = make_mesh((-1, 1, 1))
assert mesh.size == 4
rows = np.arange(24.0).reshape(8, 3)
placed = jax.device_put(rows, batch_sharding(mesh))
assert not placed.is_fully_addressable
np.testing.assert_array_equal(host_array(jax.jit(lambda x: x * 2)(placed)), rows * 2)
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(placed)
assert float(host_array(total)) == rows.sum()
distributed.first_only(lambda: (folder / "first").write_text(str(me)), "first")
assert (folder / "first").read_text() == "0"
print("all well", flush=True)
if me == 1:
    time.sleep(3)
else:
    try:
        distributed.barrier("the end", seconds=1)
    except RunStoppedError as error:
        print(error, flush=True)
"""


def test_two_processes_write_once_read_whole_and_name_who_is_missing(tmp_path):
    process = launch(tmp_path, PIECES)
    out, _ = process.communicate(timeout=120)
    assert out.count("all well") == 2, out
    assert "the end: process 1 of 2 did not come within 1 s" in out, out
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


STUDY = """
import sys
from absl import logging
logging.set_verbosity(logging.WARNING)
from ema_jax import config as ema, distributed
distributed.initialise(heartbeat_seconds=20)
from ema_jax import replication
from small_study import small_config

config = small_config()
config.mesh = (-1, 1, 1)
config.model.dtype = "float32"
replication.run(ema.read(config), sys.argv[1] + "/run", dry_run=False)
"""


@pytest.mark.slow
def test_a_study_of_two_processes_is_the_study_of_one(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    for folder in (two, one):
        folder.mkdir()
    process = launch(two, STUDY)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    alone = {k: v for k, v in os.environ.items() if not k.startswith("EMA_JAX")}
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    flags = "--xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, two / "program.py", one],
        env=alone | {"PYTHONPATH": path, "XLA_FLAGS": flags},
        check=True,
    )
    ours, alone = (artifacts.read_json(folder / "run/results.json") for folder in (two, one))
    for key in ("arms", "ema", "containment"):
        assert ours[key] == alone[key], key
    for name in ("base", "npo.seed_0", "npo_retain.seed_0"):
        vectors, expected = (
            artifacts.read_tensors(folder / f"run/concepts/{name}.safetensors")[0]
            for folder in (two, one)
        )
        for key, value in expected.items():
            np.testing.assert_allclose(vectors[key], value, atol=1e-5, err_msg=f"{name} {key}")


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_study_goes_on(tmp_path):
    process = launch(tmp_path, STUDY, "--grace=30")
    while not (tmp_path / "run/stages/baseline.json").exists():
        assert process.poll() is None
        time.sleep(0.2)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[1]), signal.SIGKILL)
    start = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - start < 60
    again = launch(tmp_path, STUDY)
    out, _ = again.communicate(timeout=600)
    assert again.returncode == 0, out
    assert (tmp_path / "run/results.json").exists()
