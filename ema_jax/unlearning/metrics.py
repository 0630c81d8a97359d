"""Training metrics: `metrics/ARM.seed_K.jsonl` and TensorBoard events, a row a step; traces.

Weights & Biases and trackio get the same figures on request, and nothing else: no prompt, no
response, no path.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ema_jax.runtime import distributed
from ema_jax.runtime.append_log import AppendLog
from ema_jax.runtime.files import json_safe, write_jsonl


class MetricsWriter:
    """Appends one run's rows, each on disk once it is added; a context manager.

    Call it with a row (`step` and figures). A run resumed from a checkpoint repeats steps that were
    written before it was killed: its first row replaces that step's and all later ones, here and in
    TensorBoard.

    Args:
        workdir: the study's folder.
        arm: the run's arm.
        seed: the run's seed.
        tracker: `wandb` or `trackio`, which get every row too; None for neither. Where they send
            it, and for which user, is set as their own pages say (`WANDB_MODE`, …).
    """

    def __init__(self, workdir: Path, arm: str, seed: int, tracker: str | None = None):
        self.path = workdir / f"metrics/{arm}.seed_{seed}.jsonl"
        self._run = {"arm": arm, "seed": seed}
        self._events = workdir / f"tensorboard/{arm}.seed_{seed}"
        self._log: AppendLog | None = None
        self._board: Any = None
        self._tracker, self._study = tracker, workdir.resolve().name
        self._tracked: Any = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Adds the figures of one step."""
        if self._log is None:
            self._log = self._open(row["step"])
        # JSON has no NaN, and the row in which a run went wrong is the one to keep.
        self._log.append(self._run | json_safe(row))
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, row["step"])
        if self._tracked is not None:
            shown = {f"train/{name}": value for name, value in row.items() if name != "step"}
            self._tracked.log(shown, step=row["step"])

    def _open(self, step: int) -> AppendLog:
        from tensorboardX import SummaryWriter

        before, first = [], distributed.is_first()
        if step > 1 and self.path.exists():
            before = [row for row in AppendLog(self.path).rows.values() if row["step"] < step]
        elif first:
            shutil.rmtree(self._events, ignore_errors=True)
        write_jsonl(self.path, before)
        self._board = SummaryWriter(
            str(self._events), purge_step=step if before else None, write_to_disk=first
        )
        if first and self._tracker is not None:
            self._tracked = _start(self._tracker, self._study, self._run)
        return AppendLog(self.path)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._log is not None:
            self._board.close()
        if self._tracked is not None:
            self._tracked.finish()


def _start(tracker: str, study: str, run: Mapping[str, Any]) -> Any:
    """Starts a run of a tracker; returns its module, which takes `log` and `finish`."""
    module: Any
    if tracker == "wandb":
        import wandb

        module = wandb
    else:
        import trackio

        module = trackio
    name = f"{study}/{run['arm']}.seed_{run['seed']}"
    module.init(project=os.environ.get("WANDB_PROJECT", "ema_jax"), name=name, config=dict(run))
    return module


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
