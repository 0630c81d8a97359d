"""Reading tensors block by block straight into stacked, transposed, sharded parameters.

Each process reads every byte that its devices need once, and no other. On a CPU the memory filled
here becomes the parameter itself; for an accelerator it holds one parameter at a time.
"""

import contextlib
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ema_jax.errors import UserError
from ema_jax.models.gguf_file import GgufTensor
from ema_jax.models.safetensors_files import StoredTensor
from ema_jax.runtime.progress import Progress

_MB = 10**6

# Blocks of this size stay in a processor's cache while they are read, transposed and placed. They
# are transposed tile by tile: XLA's copies of whole blocks would pile up in the allocator.
_BLOCK_BYTES = 4 << 20
_TILE_BYTES = 1 << 20
_SMALL_BYTES = 1 << 16
# XLA uses a NumPy array's memory without a copy if it starts at a multiple of this.
_ALIGNMENT = 64

WORKERS = min(8, (os.cpu_count() or 1) + 1)
"""Threads that read: one more than there are processors, as some of them wait for the disk."""

# Each thread reads all of its blocks into one buffer: freed ones would pile up in the allocator.
_thread = threading.local()


def read_parameter(
    stored: Sequence[StoredTensor | GgufTensor],
    target: jax.ShapeDtypeStruct,
    *,
    stacked: bool,
    transpose: bool,
    pool: Executor,
    count: Callable[[int], None],
) -> jax.Array:
    """Reads one parameter, each part of it into the memory of the device that holds it.

    Args:
        stored: its tensors in the files: one per layer if `stacked`, else a single one.
        target: shape, dtype and sharding.
        stacked: whether the first axis is over `stored`.
        transpose: whether the stored matrix is the transpose of the parameter.
        pool: threads that read blocks.
        count: called with the number of bytes of each block that was read.

    Raises:
        UserError: a file ends too early, or holds NaN or infinity, or numbers that the target's
            dtype does not hold.
    """
    shape, sharding = target.shape, target.sharding
    assert sharding is not None
    wanted = _parts(target)
    parts = {ranges: _aligned(tuple(map(len, ranges)), target.dtype) for ranges in wanted}
    layers = sorted({i for ranges in wanted for i in ranges[0]}) if stacked else [0]
    inner = {ranges[1:] if stacked else ranges for ranges in wanted}

    def one(job: tuple[int, tuple[range, ...]]) -> int:
        layer, place = job
        rows, *columns = reversed(place) if transpose else place
        block = stored[layer].read(rows, columns[0] if columns else None, _memory())
        _check_numbers(block, target.dtype, stored[layer])
        for tile, where in _transposed(block, place) if transpose else [(block, place)]:
            for ranges, values in parts.items():
                if not stacked:
                    _place(tile, where, values, ranges)
                elif layer in ranges[0]:
                    _place(tile, where, values[layer - ranges[0].start], ranges[1:])
        return block.nbytes

    jobs = [
        (layer, place)
        for layer in layers
        for place in _blocks(inner, stored[layer].dtype.itemsize, transpose)
    ]
    for size in pool.map(one, jobs):
        count(size)
    result = jax.make_array_from_callback(
        shape, sharding, lambda index: parts[_ranges(index, shape)]
    )
    # Otherwise the host would hold several parameters that are being copied to an accelerator.
    return jax.block_until_ready(result)


def _check_numbers(block: np.ndarray, dtype: np.dtype, stored: StoredTensor | GgufTensor) -> None:
    """Refuses numbers that are not finite, or would not be in `dtype`; as they are read.

    On their bits, whose order as signed and as unsigned integers is that of positive and of
    negative numbers: two reductions without a copy.
    """
    if not block.size:
        return
    size = 8 * block.itemsize
    infinity = np.array(np.inf, block.dtype).view(f"i{block.itemsize}").item()
    if block.view(f"i{block.itemsize}").max() >= infinity or block.view(
        f"u{block.itemsize}"
    ).max() >= infinity + (1 << (size - 1)):
        raise UserError(
            f"{stored.file}: {stored.name} holds NaN or infinity: the checkpoint is damaged, or "
            "its training diverged; download it again or use an earlier one"
        )
    largest = float(jnp.finfo(dtype).max)
    if largest < float(jnp.finfo(block.dtype).max):
        most = max(float(block.max()), -float(block.min()))
        if most > largest:
            raise UserError(
                f"{stored.file}: {stored.name} holds {most:.3g}, beyond the {largest:.3g} of "
                f"{dtype.name}; load it in bfloat16 or float32"
            )


def part_size(target: jax.ShapeDtypeStruct) -> int:
    """Elements of a parameter that devices of this process hold, each counted once."""
    # The parts overlap only where they are the same.
    return sum(math.prod(map(len, ranges)) for ranges in _parts(target))


def _parts(target: jax.ShapeDtypeStruct) -> set[tuple[range, ...]]:
    """The distinct parts that devices of this process hold."""
    indices = target.sharding.addressable_devices_indices_map(target.shape).values()
    return {_ranges(index, target.shape) for index in indices}


def _ranges(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[range, ...]:
    index = index or (slice(None),) * len(shape)
    return tuple(range(*s.indices(n)) for s, n in zip(index, shape, strict=True))


def _blocks(
    wanted: Collection[tuple[range, ...]], itemsize: int, transpose: bool
) -> Iterator[tuple[range, ...]]:
    """Cuts the wanted parts of a tensor into blocks of rows of the file, none of them twice."""
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
    """Copies the overlap of a block and a part, cast to the part's dtype."""
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


def _transposed(
    block: np.ndarray, place: tuple[range, ...]
) -> Iterator[tuple[np.ndarray, tuple[range, ...]]]:
    """Transposed tiles of a block that belongs at `place`, each with its own place."""
    step = max(_TILE_BYTES // block[:, :1].nbytes, 1)
    for start in range(0, block.shape[1], step):
        columns = slice(start, start + step)
        yield transpose(block[:, columns]), (place[0][columns], place[1])


def transpose(block: np.ndarray) -> np.ndarray:
    """Transpose of a matrix, by XLA: three times as fast as a strided copy in NumPy."""
    if block.nbytes < _SMALL_BYTES:
        return block.T
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        return np.ascontiguousarray(block.T)
    return np.asarray(jax.device_put(block.T, device))


def _memory() -> np.ndarray:
    if not hasattr(_thread, "memory"):
        _thread.memory = np.empty(_BLOCK_BYTES, np.uint8)
    return _thread.memory


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def reporting(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a load, and logs its speed and peak memory at the end.

    Args:
        name: of the checkpoint.
        total: bytes of all its parameters; one process may read fewer.

    Yields:
        A function to call with the number of bytes of each read.
    """
    done, start = 0, time.monotonic()
    with Progress(f"load {name}", total // _MB, "MB") as progress:

        def count(size: int) -> None:
            nonlocal done
            progress.update((done + size) // _MB - done // _MB)
            done += size

        yield count
    seconds = time.monotonic() - start
    logging.info(
        "loaded %s: %.3f GB of %.3f GB read in %.1f s (%.2f GB/s), peak memory %.2f GB",
        name,
        done / 1e9,
        total / 1e9,
        seconds,
        done / 1e9 / seconds,
        peak_bytes() / 1e9,
    )


def peak_bytes() -> int:
    """Peak resident memory of this process since it started."""
    try:
        # Linux's ru_maxrss survives exec: a child would report its parent's peak.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (FileNotFoundError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
