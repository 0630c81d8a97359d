"""Checkpoints of a run in training, and the ways in which it stops itself with its state kept.

Orbax writes them in the background and commits each by a rename, so a process may be killed at any
moment. What is saved is what the next step needs: the trained variables, the optimizer's state, the
step, and the evaluations so far. Batches are a function of (seed, step), so no data position is.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from ema_jax.errors import AskedToStopError, RunStoppedError
from ema_jax.models.orbax_folder import quietly
from ema_jax.runtime import distributed, signals

# What Orbax and TensorStore raise where a folder cannot be written, is full, or is damaged.
_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


class NonFiniteError(RunStoppedError):
    """The loss or the gradient is not finite, at a known step and on known examples."""

    def __init__(self, message: str, step: int, forget: list[int], retain: list[int]):
        super().__init__(message)
        self.step, self.forget, self.retain = step, forget, retain


class Saved(NamedTuple):
    """A run's state after a step."""

    step: int
    state: Any
    progress: dict[str, Any]  # JSON: the evaluations so far


class Checkpoints:
    """The newest checkpoints of one run.

    Args:
        folder: theirs alone; made when the first one is saved.
        every: steps between two of them.
        keep: how many are kept.
        fingerprint: of everything that the run depends on; those of another run are removed.
    """

    def __init__(
        self, folder: str | Path, *, every: int = 50, keep: int = 2, fingerprint: str = ""
    ):
        self.folder, self.every = Path(folder).resolve(), every
        self._keep, self._fingerprint = keep, fingerprint
        self._writer: Any = None
        self._newest: int | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this step."""
        return step % self.every == 0

    def latest(self, abstract: Any) -> Saved | None:
        """The newest one, each array where `abstract` has it; None without one of this run.

        Raises:
            RunStoppedError: it cannot be read.
        """
        if not self.folder.is_dir():
            return None
        with self._failing("read"):
            found = self._checkpointer().latest
            if found is None:
                return None
            metadata = self._checkpointer().metadata(found.step).custom_metadata or {}
            if metadata.get("fingerprint") != self._fingerprint:
                logging.warning("%s: checkpoints of another run, removed", self.folder)
                self.close()
                distributed.first_only(lambda: shutil.rmtree(self.folder), "checkpoints")
                return None
            named = self._checkpointer().load(found.step, _named(abstract))
        leaves = [named[name] for name in _names(abstract)]
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        self._newest = found.step
        return Saved(found.step, state, metadata["progress"])

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Starts to write one; the arrays are copied before this returns.

        Raises:
            RunStoppedError: this or the one before could not be written.
        """
        if step == self._newest:
            return
        with self._failing("written"):
            self._checkpointer().save_async(
                step,
                _named(state),
                force=True,
                custom_metadata={"fingerprint": self._fingerprint, "progress": dict(progress)},
            )
        self._newest = step

    def wait(self) -> None:
        """Waits until the newest checkpoint is on disk.

        Raises:
            RunStoppedError: it could not be written.
        """
        if self._writer is not None:
            with self._failing("written"):
                self._writer.wait()

    def stopped(self, step: int) -> AskedToStopError:
        """The error to raise once a run that was asked to stop is saved."""
        return AskedToStopError(
            f"unlearn: asked to stop (SIGTERM or Ctrl-C) and saved at step {step}, in "
            f"{self.folder}; the same command resumes from there"
        )

    def close(self) -> None:
        """Waits, and releases the threads; failures were raised by `save` or `wait`."""
        if self._writer is not None:
            with contextlib.suppress(*_FAILURES):
                self._writer.close()
            self._writer = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _checkpointer(self) -> Any:
        if self._writer is None:
            # Imported when the first one is written: it takes seconds.
            from orbax.checkpoint import v1 as ocp

            self._writer = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        return self._writer

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            with quietly():
                yield
        except _FAILURES as error:
            line = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise RunStoppedError(
                f"{self.folder}: a checkpoint could not be {what} ({line}); those written before "
                "are kept: make room or fix the folder, and give the same command again"
            ) from error


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM and Ctrl-C; yields a function that tells whether one came, called once a step.

    Several processes agree on the step at which they stop (`distributed.stop_requested`); that
    waits for the step, whose metrics a single process reads one step behind.
    """
    if jax.process_count() > 1:
        yield distributed.stop_requested
        return
    with signals.noting() as noted:
        yield noted.asked


def _names(state: Any) -> list[str]:
    """A name for each leaf: its path, in characters that any file system takes."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    names = [re.sub(r"\W+", ".", path).strip(".") for path in paths]
    assert len(set(names)) == len(names)
    return names


def _named(state: Any) -> dict[str, Any]:
    return dict(zip(_names(state), jax.tree.leaves(state), strict=True))
