"""SIGTERM and Ctrl-C end a command with exit code 3 and one line, wherever they find it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from ema_jax.runtime import signals

KINDS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}

# What a command may be doing when the signal comes; each prints "ready" first.
DOING = {
    "sleep": "time.sleep(60)",
    "arithmetic": "while True: sum(range(1000))",
    "a lock": "threading.Lock().acquire() and threading.Event().wait(60)",
    "a thread's end": "t = threading.Thread(target=time.sleep, args=(60,), daemon=True)\n"
    "    t.start(); t.join()",
    "a child process": "subprocess.run(['sleep', '60'])",
    "a broad except": "try: time.sleep(60)\n    except Exception: time.sleep(60)",
    "a flood of garbage": "while True: x = []; x.append(x)",
    "a collector's callback": "gc.callbacks.append(lambda *_: time.sleep(0.02))\n"
    "    while True: gc.collect()",
    "a destructor": "class D:\n        def __del__(self): time.sleep(0.02)\n    while True: D()",
    "a numpy loop": "import numpy as np\n    while True: np.linalg.svd(np.ones((200, 200)))",
    "an interrupt that is caught once": "try: time.sleep(60)\n    finally: time.sleep(0.1)",
}

SCRIPT = """
import gc, subprocess, sys, threading, time
from ema_jax.runtime import cli

def main(argv):
    print("ready", flush=True)
    {doing}

cli.run(main, kept="all is kept")
"""


@pytest.fixture
def started() -> Iterator[Callable[[str], subprocess.Popen]]:
    """Starts the command on what it is to do; none is left running, whatever the test finds."""
    processes = []

    def start(doing: str) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT.format(doing=doing)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("doing", DOING)
def test_a_signal_ends_a_command_with_one_line(started, doing, kind):
    process = started(DOING[doing])
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(KINDS[kind])
    _, said = process.communicate(timeout=20)
    assert said == f"stopped: asked to stop ({kind}); all is kept\n"
    assert process.returncode == 3


def test_what_a_terminal_and_a_launcher_both_send_counts_once(started):
    doing = "try: time.sleep(60)\n    finally: time.sleep(0.5); print('cleaned', flush=True)"
    process = started(doing)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=20)
    assert out == "cleaned\n"
    assert said == "stopped: asked to stop (Ctrl-C); all is kept\n"
    assert process.returncode == 3


def test_an_ignored_signal_stays_ignored():
    """As under nohup."""
    doing = "import os, signal\n    os.kill(os.getpid(), signal.SIGINT); print('on', flush=True)"
    script = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    done = subprocess.run(
        [sys.executable, "-c", script + SCRIPT.format(doing=doing)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ready\non\n")


@pytest.mark.parametrize("number", KINDS.values())
def test_a_noted_signal_waits_and_a_second_one_does_not(number, monkeypatch):
    before = signal.getsignal(number)
    with signals.noting() as noted:
        assert not noted.asked()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the echo
        assert noted.asked()
        now = time.monotonic()
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + 2)
        with pytest.raises(signals.StopRequested):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
