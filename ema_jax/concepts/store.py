"""Activations on disk, written row by row as they leave the device, and resumed after a kill.

The file is safetensors from its first byte on, only under another name until it is complete; its
progress is in a file next to it. Rows go through `pwrite`, not through a memory map, so that the
kernel can drop the pages written and the process stays as small with many prompts as with few. Of
several processes, which all have to make the same calls, the first one writes.
"""

import functools
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ema_jax.errors import UserError
from ema_jax.runtime import distributed
from ema_jax.runtime.files import TensorSpec, json_safe, read_json, safetensors_header, write_json
from ema_jax.runtime.opening import open_file

Shapes = Mapping[str, tuple[int, ...]]
Rows = Mapping[str, tuple[Sequence[int], np.ndarray]]  # tensor → places of rows, and the rows


def map_activations(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The float32 tensors of a safetensors file, memory-mapped read-only.

    Raises:
      UserError: no such file, or another one.
    """
    open_file(path).close()
    try:
        with safe_open(path, framework="np"):
            pass  # checks sizes, offsets and dtypes
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    found: dict[str, np.ndarray] = {}
    for name, row in header.items():
        if row["dtype"] != "F32":
            raise UserError(f"{path}: {name} is {row['dtype']}: not activations of this project")
        place, count = 8 + length + row["data_offsets"][0], math.prod(row["shape"])
        found[name] = np.frombuffer(data, np.float32, count, place).reshape(row["shape"])
    return found


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
        self.path, self._shapes = Path(path), dict(shapes)
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._progress = self.path.with_name(f".{self.path.name}.partial.json")
        self._state = {"shapes": json_safe(shapes), "metadata": dict(metadata)}
        specs = [TensorSpec(name, shape, np.dtype(np.float32)) for name, shape in shapes.items()]
        header = safetensors_header(specs, metadata)
        self._offsets, end = {}, len(header)
        for spec in specs:
            self._offsets[spec.name], end = end, end + spec.nbytes
        self.finished, self.done = self.path.exists(), 0
        if self.finished:
            with open(self.path, "rb") as file:
                if file.read(len(header)) != header:
                    raise UserError(
                        f"{self.path}: holds activations of other prompts, poolings or models: "
                        "remove it or name another file"
                    )
        else:
            begin = functools.partial(self._begin, header, end)
            distributed.first_only(begin, f"beginning {self.path.name}")
            self.done = self._committed() or 0

    def _committed(self) -> int | None:
        """Chunks in the half-filled file; None where there is none of these activations."""
        begun = read_json(self._progress) if self._progress.exists() else {}
        done = begun.pop("done", 0) if isinstance(begun, dict) else 0
        return done if begun == self._state and self._partial.exists() else None

    def _begin(self, header: bytes, size: int) -> None:
        if self._committed() is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._progress.unlink(missing_ok=True)
            with open(self._partial, "wb") as file:
                file.write(header)
                file.truncate(size)

    def commit(self, done: int, rows: Rows) -> None:
        """Writes rows of some tensors, and that `done` chunks are finished with them."""
        distributed.first_only(functools.partial(self._write, done, rows), self.path.name)
        self.done = done

    def _write(self, done: int, rows: Rows) -> None:
        with open(self._partial, "r+b", buffering=0) as file:
            for name, (places, values) in rows.items():
                size = 4 * math.prod(self._shapes[name][1:])
                blocks = np.ascontiguousarray(values, np.float32)
                for place, block in zip(places, blocks, strict=True):
                    os.pwrite(file.fileno(), block.tobytes(), self._offsets[name] + place * size)
            os.fdatasync(file.fileno())
        write_json(self._progress, self._state | {"done": done})

    def finish(self) -> dict[str, np.ndarray]:
        """The tensors, memory-mapped read-only; renames the file if it is new."""
        if not self.finished:
            distributed.first_only(self._rename, f"finishing {self.path.name}")
            self.finished = True
        return map_activations(self.path)

    def _rename(self) -> None:
        os.replace(self._partial, self.path)
        self._progress.unlink(missing_ok=True)
