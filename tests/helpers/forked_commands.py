"""A command in forks of one process that has imported what it needs: a start costs no imports.

forked_commands.py MODULE IMPORT…: reads the arguments of a call as JSON, a line each; answers with
the fields of `Done`.
"""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """What came of a call; seconds and the peak of memory, in bytes, are its fork's."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    peak: int


class ForkedCommand:
    """`python -m MODULE`, as often as it is called, in the repository's folder.

    Args:
        module: of the command.
        imports: modules that it imports late.
        environment: variables besides this process's.
    """

    def __init__(self, module: str, *imports: str, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, __file__, module, *imports],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str) -> Done:
        """Runs the command."""
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        return Done(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _run(module: str, arguments: list[str]) -> list[Any] | None:
    """Runs a call in a fork; returns the fields of `Done`, and None in the fork itself."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.monotonic()
        if (child := os.fork()) == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return None
        _, status, used = os.wait4(child, 0)
        seconds = time.monotonic() - start
        for file in (out, err):
            file.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return [code, out.read(), err.read(), seconds, used.ru_maxrss * 1024]


def _serve(module: str) -> None:
    # Unbuffered, or a fork would read the calls that are not its own.
    while line := os.read(0, 1 << 20):
        done = _run(module, json.loads(line))
        if done is None:
            return
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # at a fork's end the collector would copy every page of what was imported
    _serve(sys.argv[1])
