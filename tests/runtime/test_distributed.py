"""Who takes part, who writes, and what happens when one is gone."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_worker
from results_schema import assert_valid
from small_study import assert_same_arrays

from ema_jax.errors import UserError
from ema_jax.runtime import distributed, files

ROOT = Path(__file__).parents[2]
WORKER = Path(training_worker.__file__)
ADDRESS = {"EMA_JAX_COORDINATOR": "host-0.job:8476"}
NUMBERS = {"EMA_JAX_NUM_PROCESSES": "4", "EMA_JAX_PROCESS_ID": "3"}

NO_NUMBERS = ("", "two", "2.0", "-1", "\u00b2", "\u0662", "2(x3)", "9" * 5000, "1e3", "2,2", "\x00")


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {}),
        # With --gpus-per-task=1: the one that is there, whatever the task's number.
        ({"SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "0"}, {"local_device_ids": [0]}),
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
        *(
            (ADDRESS | NUMBERS | {name: text}, f"{name}: .* no number")
            for name in NUMBERS
            for text in NO_NUMBERS
        ),
        *(
            ({"SLURM_STEP_NUM_TASKS": text}, "SLURM_STEP_NUM_TASKS: .* no number")
            for text in NO_NUMBERS
        ),
        *(
            ({"SLURM_STEP_NUM_TASKS": "2", name: "2(x3)"}, f"{name}: .* no number")
            for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
        ),
        *(
            (NUMBERS | {"EMA_JAX_COORDINATOR": f"host:{port}"}, "no port below 65536")
            for port in ("0", "65536", "99999999999999999999")
        ),
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
    files.write_json(tmp_path / "x.json", {})
    assert done == [1]


def launch(
    folder: Path, program: str, *arguments: str, processes: int = 2, devices: int = 2
) -> subprocess.Popen:
    path = folder / "program.py"
    path.write_text(program)
    return start([str(path), str(folder)], *arguments, processes=processes, devices=devices)


def start(
    command: list[str], *arguments: str, processes: int, devices: int, cache: str = ""
) -> subprocess.Popen:
    """A Python program in several processes; one is without the launcher, as any program is."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EMA_JAX")}
    environment |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{WORKER.parent}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    if cache:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
    command = [sys.executable, *command]
    if processes > 1:
        counts = [f"--processes={processes}", f"--devices={devices}"]
        launcher = [sys.executable, str(ROOT / "launch/local.py"), *counts, *arguments, "--"]
        command = [*launcher, *command]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def children(process: subprocess.Popen) -> list[int]:
    """The processes that the launcher started, in their order; none where it did not need to."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


# Writes, reads back at once what the first process wrote, then waits for one that never comes.
PIECES = """
import json, sys, time
from pathlib import Path
from ema_jax.runtime import distributed, files
from ema_jax.errors import RunStoppedError

distributed.initialise(heartbeat_seconds=10)
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from ema_jax.models.sharding import make_mesh, host_array, batch_sharding

folder, me = Path(sys.argv[1]), jax.process_index()
files.write_json(folder / "written.json", {"by": me})
assert files.read_json(folder / "written.json") == {"by": 0}
with files.atomic_path(folder / "tree") as temporary:
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
from ema_jax import config as ema
from ema_jax.runtime import distributed
distributed.initialise(heartbeat_seconds=20)
from ema_jax.study import runner
from small_study import small_config

config = small_config()
config.mesh = (-1, 1, 1)
config.model.dtype = "float32"
runner.run(ema.read(config), sys.argv[1] + "/run", dry_run=False)
"""


EXACT = ("arms", "ema", "containment", "entanglement", "forecast")


def assert_close(ours: Any, theirs: Any, where: str = "") -> None:
    """JSON, number by number."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_close(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, value in enumerate(theirs):
            assert_close(ours[i], value, f"{where}/{i}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), where
    else:
        assert ours == theirs, where


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_study_of_several_processes_is_the_study_of_one(tmp_path, processes):
    """The same responses and rates; what is read from trained weights to their rounding."""
    several, one = tmp_path / "several", tmp_path / "one"
    for folder, shape in ((several, (processes, 2)), (one, (1, 2 * processes))):
        folder.mkdir()
        process = launch(folder, STUDY, processes=shape[0], devices=shape[1])
        out, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, out
    ours, alone = (files.read_json(f / "run/results.json") for f in (several, one))
    for made in (ours, alone):
        assert_valid(made)
        del made["provenance"]
    assert_close(ours, alone)
    for key in EXACT:
        assert ours[key] == alone[key], key
    for name in ("base", "npo.seed_0", "npo_retain.seed_0"):
        vectors, expected = (
            files.read_tensors(folder / f"run/concepts/{name}.safetensors")[0]
            for folder in (several, one)
        )
        for key, value in expected.items():
            np.testing.assert_allclose(vectors[key], value, atol=1e-5, err_msg=f"{name} {key}")


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_study_goes_on(tmp_path):
    process = launch(tmp_path, STUDY, "--grace=30")
    while not (tmp_path / "run/stages/baseline.json").exists():
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(children(process)[1], signal.SIGKILL)
    begin = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - begin < 60
    again = launch(tmp_path, STUDY)
    out, _ = again.communicate(timeout=600)
    assert again.returncode == 0, out
    assert (tmp_path / "run/results.json").exists()


# Training alone: stopped, killed, gone on with by other processes.
STEPS = 80
FOUR, TWO = "2,2,1", "1,2,1"  # meshes, of as many devices
HEARTBEAT = 10  # what the worker asks for


def trainer(base: Path, folder: Path, mesh: str, processes: int) -> subprocess.Popen:
    command = [str(WORKER), str(base), str(folder), str(STEPS), mesh]
    grace = f"--grace={3 * HEARTBEAT}"
    cache = str(folder.parent / f"cache-{mesh}-{processes}")
    devices = math.prod(map(int, mesh.split(","))) // processes
    return start(command, grace, processes=processes, devices=devices, cache=cache)


def signalled(process: subprocess.Popen, folder: Path, number: int, victim: int) -> tuple[str, int]:
    """Sends a signal to one process in the middle of training; what they said, and the code."""
    metrics = folder / "metrics/arm.seed_0.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while not (metrics.exists() and metrics.stat().st_mtime_ns > before):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    time.sleep(random.Random(before).uniform(0, 0.15))
    pids, seen = children(process), len(files.read_jsonl(metrics))
    os.kill(pids[victim] if len(pids) > 1 else process.pid, number)
    out, _ = process.communicate(timeout=3 * HEARTBEAT)
    # A busy machine does a few steps between the look and the signal.
    assert len(files.read_jsonl(metrics)) <= seen + 10, "it went on for long"
    return out, process.returncode


def finish(base: Path, folder: Path, mesh: str, processes: int) -> Path:
    process = trainer(base, folder, mesh, processes)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return folder


def rows(folder: Path) -> list[dict]:
    kept = files.read_jsonl(folder / "metrics/arm.seed_0.jsonl")
    other = ("arm", "tokens_per_second", "mfu", "memory_gib")
    made = [{k: v for k, v in row.items() if k not in other} for row in kept]
    assert [row["step"] for row in made] == list(range(1, STEPS + 1))
    return made


def parameters(folder: Path) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "model.npz"))


def check_same(ours: Path, whole: Path) -> None:
    assert_same_arrays(parameters(ours), parameters(whole))
    assert rows(ours) == rows(whole)


def moved_on(base: Path, folder: Path, mesh: str, processes: list[int]) -> Path:
    """Stopped in the middle and gone on with by each number of processes; the last one ends it."""
    for number in processes[:-1]:
        process = trainer(base, folder, mesh, number)
        out, code = signalled(process, folder, signal.SIGTERM, victim=0)
        assert code == 3, out
    return finish(base, folder, mesh, processes[-1])


@pytest.mark.slow
def test_other_numbers_of_processes_on_two_devices_are_bit_identical(tiny, tmp_path):
    """A sum of two is the same in either order."""
    base = tiny("qwen2")
    whole = finish(base, tmp_path / "whole", TWO, 1)
    check_same(moved_on(base, tmp_path / "run", TWO, [1, 2, 1, 2]), whole)


@pytest.mark.slow
def test_other_numbers_of_processes_on_four_devices_differ_by_rounding(tiny, tmp_path):
    """Sums over four devices are taken in another order within a process than between them."""
    base = tiny("qwen2")
    whole = finish(base, tmp_path / "whole", FOUR, 1)
    ours = moved_on(base, tmp_path / "run", FOUR, [1, 4, 2])
    expected = parameters(whole)
    for name, value in parameters(ours).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=5e-6, err_msg=name)
    for row, alone in zip(rows(ours), rows(whole), strict=True):
        assert row == pytest.approx(alone, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_one_of_two_is_signalled_at_ten_random_moments(tiny, tmp_path, number):
    base, folder, generator = tiny("qwen2"), tmp_path / "run", random.Random(int(number))
    whole = finish(base, tmp_path / "whole", FOUR, 2)
    for _ in range(10):
        victim = generator.randrange(2)
        process = trainer(base, folder, FOUR, 2)
        out, code = signalled(process, folder, number, victim)
        if number == signal.SIGTERM:
            assert code == 3, out
            stops = re.findall(r"\[(\d)\] stopped: .* saved at step (\d+)", out)
            assert sorted(i for i, _ in stops) == ["0", "1"], out
            assert len({step for _, step in stops}) == 1, out
        else:
            assert code == 128 + signal.SIGKILL, out
            assert f"[{victim}] ended with -9; the others get" in out, out
    check_same(finish(base, folder, FOUR, 2), whole)
