"""A small study that is killed, asked to stop, or runs out of disk: identical results in the end.

pytest -m slow -n 0 tests/robustness

prints what was counted. The numbers of signals are EMA_JAX_KILLS and EMA_JAX_STOPS.
"""

import contextlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ema_jax.runtime.files import read_json, read_jsonl, read_tensors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests/helpers"
KILLS = int(os.environ.get("EMA_JAX_KILLS", "50"))
STOPS = int(os.environ.get("EMA_JAX_STOPS", "20"))
# Of the finished folder's size.
SHARES = (0.01, 0.1, 0.3, 0.6, 0.95)
CONFIG = (
    "from small_study import smallest_config\n\n\ndef get_config():\n    return smallest_config()\n"
)
_TEMPORARY = re.compile(r"\..*\.(?:tmp|old)")


class Runs:
    """Starts the study in a folder; `whole` is one that nothing disturbed."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "config.py").write_text(CONFIG)
        self._forks = self._start_forks()
        before = time.monotonic()
        code, said = self.run("whole")
        assert code == 0, said
        # Programs are compiled by now: later runs take less.
        self.seconds = time.monotonic() - before
        self.whole = folder / "whole"

    def _start_forks(self) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}",
            "XLA_FLAGS": "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
            # Small programs, too: there are many.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(self.folder / "xla"))
        return subprocess.Popen(
            [sys.executable, str(HELPERS / "forked_study.py")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what is read here is not there to be waited for
        )

    def close(self) -> None:
        """Ends what was started."""
        self._forks.stdin.close()
        self._forks.wait()
        self._forks.stdout.close()

    def start(self, name: str) -> int:
        """Process of a run that begins in the folder of this name."""
        arguments = [f"--config={self.folder}/config.py", f"--workdir={self.folder / name}"]
        self._said = self.folder / f"{name}.txt"
        self._said.touch()  # a run may be killed before it opens it
        self._forks.stdin.write(json.dumps([arguments, str(self._said)]).encode() + b"\n")
        return int(self._forks.stdout.readline())

    def ends_within(self, seconds: float) -> bool:
        """Whether the run ends in this time; waits for it."""
        return bool(select.select([self._forks.stdout], [], [], seconds)[0])

    def end(self) -> tuple[int, str]:
        """Exit code, and what was said on stderr."""
        return int(self._forks.stdout.readline()), self._said.read_text()

    def run(self, name: str) -> tuple[int, str]:
        """As `end`, of a run that nothing disturbs."""
        self.start(name)
        return self.end()

    def finish(self, name: str) -> None:
        """Runs to the end, and compares with `whole`."""
        code, said = self.run(name)
        assert code == 0, said
        self.compare(name)

    def compare(self, name: str) -> None:
        """Asserts that everything but times is as in `whole`, and that nothing is left behind."""
        folder = self.folder / name
        ours, theirs = _contents(folder), _contents(self.whole)
        assert ours.keys() == theirs.keys()
        assert [path for path in theirs if ours[path] != theirs[path]] == []
        left = [p for p in folder.rglob(".*") if _TEMPORARY.fullmatch(p.name)]
        assert left == []


def _contents(folder: Path) -> dict[str, object]:
    """What the study's artifacts hold, without what is each run's own: times, and the folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            tensors, metadata = read_tensors(path)
            found[name] = ({k: v.tobytes() for k, v in tensors.items()}, metadata)
        elif path.suffix == ".jsonl" and name.startswith(("prompts", "responses")):
            found[name] = read_jsonl(path)
        elif name == "results.json":
            results = read_json(path)
            for own in ("wall_seconds", "date", "command", "commit"):
                del results["provenance"][own]
            found[name] = results
        elif path.suffix == ".csv":
            found[name] = path.read_text()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("kills"))
    yield runs
    runs.close()


@pytest.mark.parametrize(
    ("number", "wanted"),
    [(signal.SIGKILL, KILLS), (signal.SIGTERM, STOPS)],
    ids=["SIGKILL", "SIGTERM"],
)
def test_signals_at_random_moments(runs, capsys, number, wanted):
    rng = random.Random(int(number))
    sent, studies, codes = 0, 1, Counter[int]()
    name = f"{number.name}_{studies}"
    while sent < wanted:
        process = runs.start(name)
        # Early ones are likelier, since every stage of a few seconds is met so.
        if not runs.ends_within(runs.seconds * rng.random() ** 3):
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(process, number)
                sent += 1
        code, said = runs.end()
        codes[code] += 1
        with capsys.disabled():
            print(f"{name}: {code}", flush=True)
        if code == 0:  # it was faster
            runs.compare(name)
            studies += 1
            name = f"{number.name}_{studies}"
        elif number == signal.SIGKILL:
            assert code == -signal.SIGKILL, said
        elif code != -signal.SIGTERM:  # before the command has begun
            assert code == 3, said
            assert said.splitlines()[-1].startswith("stopped: "), said
            assert "Traceback" not in said
    runs.finish(name)
    with capsys.disabled():
        print(f"\n{number.name}: {sent} sent to {studies} studies, exit codes {dict(codes)}")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted, which takes root")
@pytest.mark.parametrize("share", SHARES)
def test_a_full_disk(runs, capsys, share):
    name = f"disk_{share}"
    folder = runs.folder / name
    folder.mkdir()
    whole = sum(p.stat().st_size for p in runs.whole.rglob("*") if p.is_file())
    size = max(int(share * whole), 8192)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        code, said = runs.run(name)
        assert code == 3, said
        # The second is said of training checkpoints, without the words of the system.
        assert re.match(
            r"stopped: .*(No space left|could not be written)", said.splitlines()[-1]
        ), said
        assert "Traceback" not in said
        left = [str(p) for p in folder.rglob(".*") if _TEMPORARY.fullmatch(p.name)]
        assert left == []
        subprocess.run(["mount", "-o", f"remount,size={4 * whole}", folder], check=True)
        runs.finish(name)
    finally:
        subprocess.run(["umount", folder], check=True)
    with capsys.disabled():
        print(f"\ndisk of {size} bytes of {whole}: {said.splitlines()[-1]}")
