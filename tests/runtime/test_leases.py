"""The lock on a folder: one run at a time, whoever dies, whatever the clocks say."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_study import small_config

from ema_jax import config as ema
from ema_jax.errors import UserError
from ema_jax.runtime import leases
from ema_jax.runtime.leases import Holder, Leases, locked
from ema_jax.study import pipeline, runner

ELSEWHERE = Holder("node7", 4711, "another boot", "1")
EXPIRY = 0.6


def lock_of(folder: Path, holder: Holder | str) -> Path:
    """A lock as another run leaves it."""
    path = folder / ".lock/run.0"
    path.parent.mkdir(parents=True)
    path.write_text(holder if isinstance(holder, str) else json.dumps(holder._asdict()))
    return path


def try_lock(folder: Path) -> None:
    with locked(folder, EXPIRY):
        assert list((folder / ".lock").iterdir())


def test_the_second_run_is_told_whose_it_is(tmp_path):
    with locked(tmp_path), pytest.raises(UserError) as raised, locked(tmp_path):
        pass
    said = str(raised.value)
    assert f"another run works in it (process {os.getpid()} on " in said
    assert "choose another --workdir" in said
    try_lock(tmp_path)  # let go


def test_a_lock_leaves_nothing(tmp_path):
    try_lock(tmp_path)
    assert not list(tmp_path.iterdir())
    try_lock(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


SLEEPER = """
import sys, time
from pathlib import Path
from ema_jax.runtime.leases import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def sleeper(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_killed_run_of_this_machine_is_taken_over_at_once(tmp_path, sleeper):
    with pytest.raises(UserError, match=f"process {sleeper.pid} on"), locked(tmp_path):
        pass
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait()
    start = time.monotonic()
    with locked(tmp_path, 60):
        pass
    assert time.monotonic() - start < 1


def test_a_suspended_run_still_holds_its_folder(tmp_path, sleeper):
    sleeper.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="another run works in it"):
        try_lock(tmp_path)


def test_a_process_number_that_came_again_is_another_process(tmp_path):
    lock_of(tmp_path, Holder.this()._replace(started="1"))
    start = time.monotonic()
    with locked(tmp_path, 60):
        pass
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("ahead", [-86400, -30, 0, 30, 86400])
def test_a_silent_run_elsewhere_is_taken_over_after_the_expiry(tmp_path, ahead):
    path = lock_of(tmp_path, ELSEWHERE)
    os.utime(path, (time.time() + ahead,) * 2)
    start = time.monotonic()
    try_lock(tmp_path)
    assert EXPIRY < time.monotonic() - start < 5 * EXPIRY


@pytest.mark.parametrize("ahead", [-86400, -30, 0, 30, 86400])
def test_a_run_elsewhere_that_lives_is_seen_whatever_its_clock_says(tmp_path, ahead):
    path, ended = lock_of(tmp_path, ELSEWHERE), threading.Event()

    def beat() -> None:
        while not ended.wait(EXPIRY / 6):
            os.utime(path, (time.time() + ahead,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 4711 on node7"):
            try_lock(tmp_path)
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("text", ["", "node7 4711\n", "{}", '{"host": 3}', "[1]", "\0"])
def test_a_lock_of_an_unknown_kind_is_watched_too(tmp_path, text):
    lock_of(tmp_path, text)
    start = time.monotonic()
    try_lock(tmp_path)
    assert time.monotonic() - start > EXPIRY


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path):
    lock_of(tmp_path, Holder.this()._replace(started="1"))
    gate, done, refused = threading.Barrier(8), [], []

    def rush() -> None:
        gate.wait()
        try:
            with locked(tmp_path, EXPIRY):
                done.append(1)
                time.sleep(0.5)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=rush) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), len(refused)) == (1, 7)


def test_a_lease_outlives_a_clock_that_is_behind(tmp_path):
    """A sweep's worker whose file server is a day behind still holds its cell."""
    mine, other = Leases(tmp_path, EXPIRY), Leases(tmp_path, EXPIRY)
    with mine.take("a") as held:
        os.utime(held.path, (1, 1))
        assert other.take("a") is None
        time.sleep(1.5 * EXPIRY)
        assert other.take("a") is None


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_run_in_a_folder_at_work_is_refused_and_a_dry_run_is_not(tmp_path, dry_run, monkeypatch):
    monkeypatch.setattr(pipeline.Study, "check", lambda self: None)
    monkeypatch.setattr(pipeline.Study, "run", lambda self: None)
    study = ema.read(small_config())
    with locked(tmp_path):
        if dry_run:
            runner.run(study, tmp_path, dry_run=True)
        else:
            with pytest.raises(UserError, match=f"process {os.getpid()} on"):
                runner.run(study, tmp_path, dry_run=False)
    runner.run(study, tmp_path, dry_run=False)
    assert not list(tmp_path.iterdir())


def test_this_process_lives():
    assert Holder.this().alive() is True
    assert Holder.this()._replace(process=2**22 + 7).alive() is False
    assert ELSEWHERE.alive() is None
    assert leases.Holder.read(json.dumps(ELSEWHERE._asdict())) == ELSEWHERE
