"""Training metrics: `metrics/ARM.seed_K.jsonl` and TensorBoard events, a row a step."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ema_jax import distributed
from ema_jax.artifacts import write_jsonl


class MetricsWriter:
    """Collects one run's rows; a context manager that writes the file at its end.

    Call it with a row (`step` and figures). A run that was killed before starts anew, so what it
    had written to TensorBoard is removed.
    """

    def __init__(self, workdir: Path, arm: str, seed: int):
        from tensorboardX import SummaryWriter

        self.path = workdir / f"metrics/{arm}.seed_{seed}.jsonl"
        self._run = {"arm": arm, "seed": seed}
        self._rows: list[dict[str, Any]] = []
        events = workdir / f"tensorboard/{arm}.seed_{seed}"
        first = distributed.is_first()
        if first:
            shutil.rmtree(events, ignore_errors=True)
        self._board = SummaryWriter(str(events), write_to_disk=first)

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Adds the figures of one step."""
        # JSON has no NaN, and the row in which a run went wrong is the one to keep.
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._rows.append(self._run | finite)
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, row["step"])

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._board.close()
        write_jsonl(self.path, self._rows)
