"""Training metrics: `metrics/ARM.seed_K.jsonl` and TensorBoard events, a row a step; traces."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from ema_jax.runtime import distributed
from ema_jax.runtime.files import write_jsonl


class MetricsWriter:
    """Appends one run's rows, each on disk once it is added; a context manager.

    Call it with a row (`step` and figures). A run resumed from a checkpoint repeats steps that were
    written before it was killed: its first row replaces that step's and all later ones, here and in
    TensorBoard.
    """

    def __init__(self, workdir: Path, arm: str, seed: int):
        self.path = workdir / f"metrics/{arm}.seed_{seed}.jsonl"
        self._run = {"arm": arm, "seed": seed}
        self._events = workdir / f"tensorboard/{arm}.seed_{seed}"
        self._file: TextIO | None = None
        self._board: Any = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Adds the figures of one step."""
        if self._file is None:
            self._file = self._open(row["step"])
        # JSON has no NaN, and the row in which a run went wrong is the one to keep.
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(self._run | finite, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, row["step"])

    def _open(self, step: int) -> TextIO:
        from tensorboardX import SummaryWriter

        before, first = [], distributed.is_first()
        if step > 1 and self.path.exists():
            # The last line of a killed process may be half a line.
            whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
            rows = map(json.loads, whole.splitlines())
            before = [row for row in rows if row["step"] < step]
        elif first:
            shutil.rmtree(self._events, ignore_errors=True)
        write_jsonl(self.path, before)
        self._board = SummaryWriter(
            str(self._events), purge_step=step if before else None, write_to_disk=first
        )
        return open(self.path if first else os.devnull, "a", encoding="utf-8")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class Profile:
    """A trace of `steps` steps for TensorBoard's profiler, after two that compile and warm up."""

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps = folder, steps
        self._first: int | None = None
        self._running = False

    def at(self, step: int, state: Any) -> None:
        """Called before each step with the state that the last one returned.

        The trace begins and ends once that is there, so that it holds whole steps.
        """
        self._first = step + 2 if self._first is None else self._first
        if step in (self._first, self._first + self._steps):
            jax.block_until_ready(state)
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._first + self._steps:
            self.stop()

    def stop(self) -> None:
        """Ends the trace, if it is being taken."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
