"""What a device holds of a parameter, while it is loaded block by block.

On a CPU it is put together in host memory, transposed there, and that memory becomes the
parameter. An accelerator is sent blocks as the files store them and puts them into place itself: on
the host there are only the blocks on their way, and on the device little beside the parameters.
"""

import abc
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ema_jax.models.gguf_file import GgufTensor
from ema_jax.models.safetensors_files import StoredTensor

Box = tuple[range, ...]
"""Ranges along the axes of an array."""

# Tiles of this size stay in a processor's cache while they are transposed and placed; XLA's copies
# of whole blocks would pile up in the allocator.
_TILE_BYTES = 1 << 20
_SMALL_BYTES = 1 << 16
# XLA uses a NumPy array's memory without a copy if it starts at a multiple of this.
_ALIGNMENT = 64


class Parameter(NamedTuple):
    """A parameter to load.

    Attributes:
        stored: its tensors in the files: one per layer if `stacked`, else a single one.
        target: shape, dtype and sharding.
        stacked: whether its first axis is over `stored`.
        transpose: whether a stored matrix is the transpose of the parameter's.
    """

    stored: Sequence[StoredTensor | GgufTensor]
    target: jax.ShapeDtypeStruct
    stacked: bool
    transpose: bool


class Part(abc.ABC):
    """A part of a parameter, which takes blocks of its stored tensors from any thread.

    Attributes:
        shape: of the part.
        layers: the stored tensors that it is of.
        box: what it takes of each.
    """

    def __init__(self, parameter: Parameter, ranges: Box, devices: Sequence[jax.Device]):
        """Makes a part without values: `ranges` of a parameter, held by `devices`."""
        self.shape = tuple(map(len, ranges))
        self.dtype, self.transpose = parameter.target.dtype, parameter.transpose
        self.devices = devices
        self.layers = ranges[0] if parameter.stacked else range(1)
        self._stacked = parameter.stacked
        inner = ranges[parameter.stacked :]
        self.box = inner[::-1] if parameter.transpose else inner

    def place(self, block: np.ndarray, box: Box, layer: int) -> None:
        """Takes its share of a block, whose memory may then be used again.

        Args:
            block: numbers as stored.
            box: where they are in their tensor.
            layer: which of the stored tensors that is.
        """
        shared = [
            range(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(box, self.box, strict=True)
        ]
        if layer not in self.layers or not all(shared):
            return
        here = [
            slice(s.start - b.start, s.stop - b.start) for s, b in zip(shared, box, strict=True)
        ]
        start = [s.start - own.start for s, own in zip(shared, self.box, strict=True)]
        start = start[::-1] if self.transpose else start
        start = [layer - self.layers.start, *start] if self._stacked else start
        self._put(block[tuple(here)], start)

    @abc.abstractmethod
    def _put(self, piece: np.ndarray, start: list[int]) -> None:
        """Puts a piece, as stored, where it starts in the part."""

    @abc.abstractmethod
    def arrays(self) -> list[jax.Array]:
        """The part on each of its devices, once all of it is placed."""


class HostPart(Part):
    """A part in host memory, which becomes the device's own where the device is a CPU."""

    def __init__(self, parameter: Parameter, ranges: Box, devices: Sequence[jax.Device]):
        """Makes a part without values (see `Part`)."""
        super().__init__(parameter, ranges, devices)
        size = math.prod(self.shape) * self.dtype.itemsize
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % _ALIGNMENT
        self._values = memory[first : first + size].view(self.dtype).reshape(self.shape)

    def _put(self, piece: np.ndarray, start: list[int]) -> None:
        for offset, tile in _transposed(piece) if self.transpose else [(0, piece)]:
            sizes = (1,) * (len(start) - tile.ndim) + tile.shape
            first = [*start]
            first[-tile.ndim] += offset
            self._values[tuple(slice(s, s + n) for s, n in zip(first, sizes, strict=True))] = tile

    def arrays(self) -> list[jax.Array]:
        """The part on each of its devices, once all of it is placed."""
        return [jax.device_put(self._values, device) for device in self.devices]


class DevicePart(Part):
    """A part on accelerators, which transpose and cast what they are sent."""

    def __init__(self, parameter: Parameter, ranges: Box, devices: Sequence[jax.Device]):
        """Makes a part without values (see `Part`)."""
        super().__init__(parameter, ranges, devices)
        self._held: list[jax.Array] = []
        self._lock = threading.Lock()

    def _put(self, piece: np.ndarray, start: list[int]) -> None:
        if piece.dtype == np.float64:  # JAX would make float32 of it first, and so round twice
            piece = piece.astype(self.dtype)
        sent = [
            jax.device_put((piece, np.array(start, np.int32)), device) for device in self.devices
        ]
        with self._lock:
            if not self._held:  # by the first thread that comes: threads compile side by side
                self._held = [jnp.zeros(self.shape, self.dtype, device=d) for d in self.devices]
            done = []
            for i, (block, where) in enumerate(sent):
                self._held[i], last = _write(self._held[i], block, where, transpose=self.transpose)
                done.append(last)
        # So that no more than a block of each thread is on its way, and its memory free again.
        jax.block_until_ready(done)

    def arrays(self) -> list[jax.Array]:
        """The part on each of its devices, once all of it is placed."""
        return self._held


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transpose")
def _write(
    part: jax.Array, block: jax.Array, start: jax.Array, *, transpose: bool
) -> tuple[jax.Array, jax.Array]:
    """Puts a stored block into a part, in place.

    Returns:
        The part; and a number to wait for, as the part goes on to the next block at once.
    """
    block = (block.T if transpose else block).astype(part.dtype)
    block = jax.lax.expand_dims(block, range(part.ndim - block.ndim))
    return jax.lax.dynamic_update_slice(part, block, tuple(start)), block.reshape(-1)[0]


def _transposed(block: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Transposed tiles of a block, each with the column it starts at."""
    step = max(_TILE_BYTES // block[:, :1].nbytes, 1)
    for first in range(0, block.shape[1], step):
        yield first, transpose(block[:, first : first + step])


def transpose(block: np.ndarray) -> np.ndarray:
    """Transpose of a matrix, by XLA: three times as fast as a strided copy in NumPy."""
    if block.nbytes < _SMALL_BYTES:
        return block.T
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        return np.ascontiguousarray(block.T)
    return np.asarray(jax.device_put(block.T, device))
