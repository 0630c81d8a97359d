"""A run that was stopped, killed or ran out of disk ends as one that was not, bit for bit."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax
import numpy as np
import pytest
import training_worker
from small_study import assert_same_arrays
from training_worker import CONFIG, STEPS, arrays, train

from ema_jax.errors import RunStoppedError
from ema_jax.models import checkpoint
from ema_jax.runtime.files import read_jsonl
from ema_jax.unlearning import trainer
from ema_jax.unlearning.batches import batch_indices
from ema_jax.unlearning.run_checkpoints import NonFiniteError

TIMED = ("tokens_per_second", "mfu", "memory_gib")


@pytest.fixture(scope="module")
def base(tiny):
    return checkpoint.load(tiny("qwen2"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """An uninterrupted run: its folder and what came of it."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(base, folder, every=10)


def rows(folder: Path) -> list[dict]:
    kept = read_jsonl(folder / "metrics/arm.seed_0.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMED} for row in kept]


def assert_same_run(whole, folder, trained) -> None:
    assert_same_arrays(arrays(trained.model), arrays(whole[1].model))
    assert trained.trajectory == whole[1].trajectory
    assert (trained.steps, trained.stopped) == (STEPS, "limit")
    assert trained.first_loss == whole[1].first_loss
    assert rows(folder) == rows(whole[0])
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))


class KilledError(Exception):
    pass


def dies_at(step: int):
    def log(row):
        if row["step"] == step:
            raise KilledError

    return log


def test_a_run_that_died_resumes_from_its_newest_checkpoint(base, whole, tmp_path):
    for step in (3, 8, 17):
        with pytest.raises(KilledError):
            train(base, tmp_path, every=4, log=dies_at(step))
    # Half a line is what a killed process may leave.
    with open(tmp_path / "metrics/arm.seed_0.jsonl", "a") as file:
        file.write('{"arm": "ar')
    seen: list[int] = []
    trained = train(base, tmp_path, every=4, log=lambda row: seen.append(row["step"]))
    assert seen[0] == 17, "from the checkpoint of step 16"
    assert_same_run(whole, tmp_path, trained)


def test_a_run_that_ended_is_not_trained_again(base, whole):
    folder, trained = whole
    again = train(base, folder, every=10, log=dies_at(1))
    assert_same_run(whole, folder, again)
    assert again.stopped == trained.stopped
    assert kept(folder) == [20, STEPS], "the newest two"


def test_checkpoints_of_another_run_are_not_resumed(base, whole, tmp_path):
    with pytest.raises(KilledError):
        train(base, tmp_path, every=4, log=dies_at(9), fingerprint="another")
    trained = train(base, tmp_path, every=4, fingerprint="this")
    assert_same_run(whole, tmp_path, trained)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_says_how_to_resume(base, whole, tmp_path, number):
    def log(row):
        if row["step"] == 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(RunStoppedError, match=r"saved at step 5.*same command resumes") as error:
        train(base, tmp_path, every=100, log=log)
    assert "\n" not in str(error.value)
    assert signal.getsignal(number) == before
    seen: list[int] = []
    trained = train(base, tmp_path, every=100, log=lambda row: seen.append(row["step"]))
    assert seen[0] == 6
    assert_same_run(whole, tmp_path, trained)


@pytest.mark.parametrize("bad", [7, 8])  # with every second step saved, and read before that
def test_what_is_not_finite_names_its_batch_and_keeps_the_last_good_state(
    base, whole, tmp_path, monkeypatch, bad
):
    step = trainer.train_step

    def poisoned(setup, state, batch):
        state, metrics = step(setup, state, batch)
        if batch.draw[1] == bad - 1:
            metrics = metrics | {"gradient_norm": jax.numpy.float32(np.nan)}
        return state, metrics

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteError, match=f"gradient_norm is nan at step {bad}") as error:
        train(base, tmp_path, every=2)
    assert error.value.step == bad
    assert error.value.forget == batch_indices(9, 8, 0, bad - 1).tolist()
    assert error.value.retain == batch_indices(11, 8, 1, bad - 1).tolist()
    monkeypatch.undo()
    seen: list[int] = []
    trained = train(base, tmp_path, every=2, log=lambda row: seen.append(row["step"]))
    assert seen[0] == 7
    assert_same_run(whole, tmp_path, trained)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a process that trains; what it says on stderr is in `said.txt`.

    Its imports are those of a server that it is forked from, and its programs are compiled once.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([training_worker.__name__])
    programs = tmp_path_factory.mktemp("programs")

    def started(base: Path, folder: Path, steps: int, limit: int | None = None) -> BaseProcess:
        arguments = (str(base), str(folder), str(steps), "1,1,1")
        process = forks.Process(target=training_worker.fork, args=(arguments, programs, limit))
        process.start()
        return process

    return started


def kept(folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    return sorted(int(p.name) for p in (folder / "state").glob("*") if p.name.isdigit())


def kill_and_resume(start, base: Path, folder: Path, steps: int, kills: int) -> dict:
    """Starts the worker, kills it at a random moment of training, and so on; then lets it end."""
    generator = random.Random(kills)
    folder.mkdir(exist_ok=True)
    for _ in range(kills):
        before = kept(folder)
        process = start(base, folder, steps)
        # Until it has a checkpoint more: each life resumes from the one before.
        while process.is_alive() and kept(folder)[-1:] <= before[-1:]:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.15))
        assert process.is_alive(), "it ended before it was killed"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(base, folder, steps)
    process.join()
    assert process.exitcode == 0, (folder / "said.txt").read_text()
    return dict(np.load(folder / "model.npz"))


def test_killed_at_random_moments(start, tiny, whole, tmp_path):
    ours = kill_and_resume(start, tiny("qwen2"), tmp_path, STEPS, kills=2)
    assert_same_arrays(ours, arrays(whole[1].model))
    assert rows(tmp_path) == rows(whole[0])


@pytest.mark.slow
def test_killed_at_twenty_random_moments(start, tiny, base, tmp_path):
    steps = 100  # more than twenty lives get through
    ours = kill_and_resume(start, tiny("qwen2"), tmp_path / "killed", steps, kills=20)
    config = dataclasses.replace(CONFIG, max_steps=steps)
    uninterrupted = train(base, tmp_path / "whole", every=50, config=config)
    assert_same_arrays(ours, arrays(uninterrupted.model))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, steps + 1))


def test_a_full_disk_stops_in_one_line_and_loses_nothing(start, base, tiny, whole, tmp_path):
    config = dataclasses.replace(CONFIG, max_steps=STEPS)
    with pytest.raises(KilledError):
        train(base, tmp_path, every=4, log=dies_at(9), config=config)
    process = start(tiny("qwen2"), tmp_path, STEPS, limit=16384)
    process.join()
    stderr = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 3, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("stopped: ")]
    assert len(lines) == 1, stderr
    assert "could not be written" in lines[0]
    assert "Traceback" not in stderr
    trained = train(base, tmp_path, every=4)
    assert_same_run(whole, tmp_path, trained)


def test_a_folder_that_cannot_be_written(base, tmp_path):
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(RunStoppedError, match="could not be") as error:
        train(base, tmp_path, every=4)
    assert "\n" not in str(error.value)


def test_progress_is_json(whole):
    folder, trained = whole
    assert json.loads(json.dumps(trained.trajectory)) == trained.trajectory
    assert len(trained.trajectory[0]["log_ratio_by_position"]) == 5
    assert not any(trained.trajectory[0]["log_ratio_by_position"])
    assert all(x < 0 for x in trained.trajectory[-1]["log_ratio_by_position"])
    assert list((folder / "tensorboard/arm.seed_0").glob("events*"))
