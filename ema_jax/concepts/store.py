"""Activations on disk, written row by row as they leave the device, and resumed after a kill.

The file is safetensors from its first byte on, only under another name until it is complete; its
progress is in a file next to it. Rows go through `pwrite`, not through a memory map, so that the
kernel can drop the pages written and the process stays as small with many prompts as with few.
"""

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ema_jax.errors import UserError
from ema_jax.runtime.files import TensorSpec, json_safe, read_json, safetensors_header, write_json

Shapes = Mapping[str, tuple[int, ...]]


class ActivationStore:
    """float32 tensors `[N, …]` in one safetensors file, filled in chunks of rows.

    Attributes:
      path: the finished file.
      done: chunks that an earlier run has committed.
      finished: the file is complete already, with this metadata.
    """

    def __init__(self, path: str | os.PathLike, shapes: Shapes, metadata: Mapping[str, str]):
        """Opens a file to fill, or resumes one that was begun with the same shapes and metadata.

        Raises:
          UserError: a finished file exists with other shapes or metadata.
        """
        self.path, self._shapes, self._metadata = Path(path), dict(shapes), dict(metadata)
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._progress = self.path.with_name(f".{self.path.name}.partial.json")
        specs = [TensorSpec(name, shape, np.dtype(np.float32)) for name, shape in shapes.items()]
        header = safetensors_header(specs, self._metadata)
        self.finished = self.path.exists()
        if self.finished:
            with open(self.path, "rb") as file:
                if file.read(len(header)) != header:
                    raise UserError(
                        f"{self.path}: holds activations of other prompts, poolings or models: "
                        "remove it or name another file"
                    )
        self.done, state = 0, {"shapes": json_safe(shapes), "metadata": self._metadata}
        self._state = state
        if not self.finished:
            begun = read_json(self._progress) if self._progress.exists() else {}
            done = begun.pop("done", 0) if isinstance(begun, dict) else 0
            if begun == state and self._partial.exists():
                self.done = done
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._partial, "wb") as file:
                    file.write(header)
                    file.truncate(len(header) + sum(spec.nbytes for spec in specs))
        self._offsets, place = {}, len(header)
        for spec in specs:
            self._offsets[spec.name], place = place, place + spec.nbytes

    def commit(self, done: int, rows: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        """Writes some rows of every tensor, and that `done` chunks are finished with them."""
        with open(self._partial, "r+b", buffering=0) as file:
            for name, value in values.items():
                shape = self._shapes[name]
                size = 4 * int(np.prod(shape[1:]))
                for row, block in zip(rows, np.ascontiguousarray(value, np.float32), strict=True):
                    os.pwrite(file.fileno(), block.tobytes(), self._offsets[name] + row * size)
            os.fdatasync(file.fileno())
        self.done = done
        write_json(self._progress, self._state | {"done": done})

    def finish(self) -> dict[str, np.ndarray]:
        """The tensors, memory-mapped read-only; renames the file if it is new."""
        if not self.finished:
            os.replace(self._partial, self.path)
            self._progress.unlink(missing_ok=True)
            self.finished = True
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            name: np.frombuffer(data, np.float32, int(np.prod(shape)), self._offsets[name]).reshape(
                shape
            )
            for name, shape in self._shapes.items()
        }
