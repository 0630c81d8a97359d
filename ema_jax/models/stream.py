"""From files straight into the stacked, transposed, sharded parameters, in small blocks.

Each process reads every byte that its devices need once, and no other. On a CPU the memory filled
here becomes the parameter itself; for an accelerator one stacked parameter's part waits here.
"""

import itertools
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ema_jax.models.weights import Stored

# Blocks as large as this keep in a processor's cache between being read, turned and placed.
_BLOCK_BYTES = 4 << 20
_SMALL_BYTES = 1 << 16
# XLA uses a NumPy array's memory as it is if it starts at such a multiple.
_ALIGNMENT = 64

WORKERS = min(8, (os.cpu_count() or 1) + 1)
"""Threads that read: one more than there are processors, as some of them wait for the disk."""


class _Part(NamedTuple):
    """One distinct part of a parameter that devices of this process hold."""

    ranges: tuple[range, ...]
    values: np.ndarray


def read_parameter(
    stored: Sequence[Stored],
    target: jax.ShapeDtypeStruct,
    *,
    stacked: bool,
    transpose: bool,
    pool: Executor,
    count: Callable[[int], None],
) -> jax.Array:
    """Reads one parameter to where its target's sharding puts it.

    Args:
        stored: the tensors behind it: one a layer if `stacked`, else a single one.
        target: shape, dtype and sharding.
        stacked: whether the first axis is over `stored`.
        transpose: whether a stored matrix is the transpose of ours.
        pool: of threads, for blocks.
        count: told the number of bytes of each block once it is read.

    Raises:
        UserError: a file ends too early.
    """
    shape, sharding = target.shape, target.sharding
    assert sharding is not None
    indices = sharding.addressable_devices_indices_map(shape).values()
    wanted = {_ranges(index, shape) for index in indices}
    parts = {
        ranges: _Part(ranges, _aligned(tuple(map(len, ranges)), target.dtype)) for ranges in wanted
    }
    layers = sorted({i for ranges in wanted for i in ranges[0]}) if stacked else [0]
    inner = {ranges[1:] if stacked else ranges for ranges in wanted}

    def one(job: tuple[int, tuple[range, ...]]) -> int:
        layer, place = job
        block = stored[layer].read(*(reversed(place) if transpose else place))
        size = block.nbytes
        block = block.astype(target.dtype, copy=False)
        block = turn(block) if transpose else block
        for part in parts.values():
            ranges, values = part
            if stacked:
                if layer not in ranges[0]:
                    continue
                ranges, values = ranges[1:], values[layer - ranges[0].start]
            _place(block, place, values, ranges)
        return size

    jobs = [
        (layer, place)
        for layer in layers
        for place in _blocks(inner, stored[layer].dtype.itemsize, transpose)
    ]
    for size in pool.map(one, jobs):
        count(size)
    result = jax.make_array_from_callback(
        shape, sharding, lambda index: parts[_ranges(index, shape)].values
    )
    # Or the host would hold several parameters that are still on their way to an accelerator.
    return jax.block_until_ready(result)


def _ranges(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[range, ...]:
    index = index or (slice(None),) * len(shape)
    return tuple(range(*s.indices(n)) for s, n in zip(index, shape, strict=True))


def _blocks(
    wanted: Collection[tuple[range, ...]], itemsize: int, transpose: bool
) -> Iterator[tuple[range, ...]]:
    """Cuts what is wanted of a tensor along its rows in the file, none of them twice."""
    axis = len(next(iter(wanted))) - 1 if transpose else 0
    edges = sorted({edge for ranges in wanted for edge in (ranges[axis].start, ranges[axis].stop)})
    for low, high in itertools.pairwise(edges):
        here = [ranges for ranges in wanted if ranges[axis].start <= low < ranges[axis].stop]
        if not here:
            continue
        box = [
            range(min(r.start for r in along), max(r.stop for r in along))
            for along in zip(*here, strict=True)
        ]
        others = math.prod(len(r) for i, r in enumerate(box) if i != axis)
        step = max(_BLOCK_BYTES // (others * itemsize), 1)
        for start in range(low, high, step):
            box[axis] = range(start, min(start + step, high))
            yield tuple(box)


def _place(
    block: np.ndarray, place: tuple[range, ...], values: np.ndarray, ranges: tuple[range, ...]
) -> None:
    """Copies what a block and a part have in common."""
    shared = [
        (max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(place, ranges, strict=True)
    ]
    if all(low < high for low, high in shared):
        here = tuple(
            slice(low - a.start, high - a.start)
            for (low, high), a in zip(shared, place, strict=True)
        )
        there = tuple(
            slice(low - b.start, high - b.start)
            for (low, high), b in zip(shared, ranges, strict=True)
        )
        values[there] = block[here]


def turn(block: np.ndarray) -> np.ndarray:
    """A matrix's transpose; XLA's is three times as fast as a strided copy in NumPy."""
    if block.nbytes < _SMALL_BYTES:
        return block.T
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to start an accelerator's backend alone
        return np.ascontiguousarray(block.T)
    return np.asarray(jax.device_put(block.T, device))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def peak_bytes() -> int:
    """The most memory that this process held since it started (resident set)."""
    try:
        # Linux's ru_maxrss survives exec: a child would report what its parent held.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (FileNotFoundError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
