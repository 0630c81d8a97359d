"""Reading tensors block by block into stacked, transposed, sharded parameters.

Each process reads every byte that its devices need once, and no other, into memory that it uses
again and again.
"""

import contextlib
import itertools
import math
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ema_jax.errors import UserError
from ema_jax.models.gguf_file import GgufTensor
from ema_jax.models.parts import Box, DevicePart, HostPart, Parameter, Part
from ema_jax.models.safetensors_files import StoredTensor
from ema_jax.runtime.progress import Progress

_Key = TypeVar("_Key", bound=Hashable)
_MB = 10**6

# Blocks of this size stay in a processor's cache while they are read, checked and transposed.
_BLOCK_BYTES = 4 << 20
DEVICE_BLOCK_BYTES = 8 << 20
"""Size of blocks that are sent to an accelerator: each is a copy and a program that runs there."""

WORKERS = min(8, (os.cpu_count() or 1) + 1)
"""Threads that read: one more than there are processors, as some of them wait for the disk."""

# Each thread reads all of its blocks into one buffer: freed ones would pile up in the allocator.
_thread = threading.local()


def read_parameters(
    parameters: Mapping[_Key, Parameter],
    count: Callable[[int], None],
    *,
    device_block: int | None = None,
) -> dict[_Key, jax.Array]:
    """Reads parameters, each part of them into the memory of the device that holds it.

    Args:
        parameters: what to read.
        count: called with the number of bytes of each block that was read.
        device_block: bytes of the blocks that an accelerator puts together itself, where its part
            of a parameter has more than one; 0 where the host does it. By default by platform.

    Raises:
        UserError: a file ends too early, or holds NaN or infinity, or numbers that the target's
            dtype does not hold.
    """
    parts: dict[_Key, list[Part]] = {}
    first: list[tuple[_Key, int, Box]] = []
    others: list[tuple[_Key, int, Box]] = []
    for key, parameter in parameters.items():
        parts[key], block_bytes = _parts(parameter, device_block)
        layers = sorted({layer for part in parts[key] for layer in part.layers})
        boxes = {part.box for part in parts[key]}
        itemsize = max(tensor.dtype.itemsize for tensor in parameter.stored)
        jobs = itertools.product([key], layers, blocks(boxes, itemsize, block_bytes))
        first.append(next(jobs))
        others.extend(jobs)

    def read(job: tuple[_Key, int, Box]) -> int:
        key, layer, box = job
        block = read_block(parameters[key].stored[layer], box, parameters[key].target.dtype)
        for part in parts[key]:
            part.place(block, box, layer)
        return block.nbytes

    with ThreadPoolExecutor(WORKERS) as pool:
        # A block of each parameter first, so that devices' programs are compiled side by side.
        for size in pool.map(read, [*first, *others]):
            count(size)
    arrays: dict[_Key, jax.Array] = {}
    for key, parameter in parameters.items():
        target = parameter.target
        held = [array for part in parts[key] for array in part.arrays()]
        arrays[key] = jax.make_array_from_single_device_arrays(
            target.shape, _sharding(target), held
        )
    return arrays


def read_block(stored: StoredTensor | GgufTensor, box: Box, dtype: np.dtype) -> np.ndarray:
    """Reads a block of a tensor that is to become `dtype`, and checks its numbers.

    It is in memory that the thread's next block is read into.
    """
    rows, *columns = box
    size = max(math.prod(map(len, box)) * stored.dtype.itemsize, _BLOCK_BYTES)
    if not hasattr(_thread, "memory") or len(_thread.memory) < size:
        _thread.memory = np.empty(size, np.uint8)
    block = stored.read(rows, columns[0] if columns else None, _thread.memory)
    _check_numbers(block, dtype, stored)
    return block


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
    return sum(math.prod(map(len, ranges)) for ranges in _holders(target))


def _sharding(target: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    assert target.sharding is not None
    return target.sharding


def _holders(target: jax.ShapeDtypeStruct) -> dict[Box, list[jax.Device]]:
    """The distinct parts that devices of this process hold, each with those devices."""
    holders = defaultdict[Box, list[jax.Device]](list)
    for device, index in _sharding(target).addressable_devices_indices_map(target.shape).items():
        index = index or (slice(None),) * len(target.shape)
        ranges = (range(*s.indices(n)) for s, n in zip(index, target.shape, strict=True))
        holders[tuple(ranges)].append(device)
    return holders


def _parts(parameter: Parameter, device_block: int | None) -> tuple[list[Part], int]:
    """The parts of a parameter that devices of this process hold, and the size of their blocks."""
    target, holders = parameter.target, _holders(parameter.target)
    if device_block is None:
        devices: set[jax.Device] = _sharding(target).device_set
        on_cpu = all(device.platform == "cpu" for device in devices)
        device_block = 0 if on_cpu else DEVICE_BLOCK_BYTES
    size = max(math.prod(map(len, ranges)) for ranges in holders) * target.dtype.itemsize
    kind, block = (
        (DevicePart, device_block) if size > device_block > 0 else (HostPart, _BLOCK_BYTES)
    )
    return [kind(parameter, ranges, devices) for ranges, devices in holders.items()], block


def blocks(boxes: Collection[Box], itemsize: int, block_bytes: int) -> Iterator[Box]:
    """Cuts what is needed of a tensor into blocks of rows, none of which is read twice."""
    edges = sorted({edge for rows, *_ in boxes for edge in (rows.start, rows.stop)})
    for low, high in itertools.pairwise(edges):
        here = [box for box in boxes if box[0].start <= low < box[0].stop]
        if not here:
            continue
        _, *along = zip(*here, strict=True)
        columns = [range(min(r.start for r in rs), max(r.stop for r in rs)) for rs in along]
        row_bytes = math.prod(map(len, columns)) * itemsize
        for rows in _equal(range(low, high), max(block_bytes // row_bytes, 1)):
            yield rows, *columns


def _equal(rows: range, most: int) -> Iterator[range]:
    """Cuts rows into ranges of at most `most`, all of a size if there is one not much smaller.

    A device compiles a program for each size.
    """
    fewest = -(-len(rows) // most)
    counts = range(fewest, 2 * fewest)
    count = next((n for n in counts if len(rows) % n == 0), fewest)
    step = -(-len(rows) // count)
    for start in range(rows.start, rows.stop, step):
        yield range(start, min(start + step, rows.stop))


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
