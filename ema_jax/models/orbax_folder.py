"""The Orbax half of a Flax checkpoint folder: `parameters/` and `manifest.json`."""

import asyncio
import contextlib
import gc
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from ema_jax.errors import UserError
from ema_jax.models import streaming
from ema_jax.runtime.disk import full_disk
from ema_jax.runtime.files import read_json, write_json

MANIFEST = "manifest.json"
PARAMETERS = "parameters"
_FORMAT = {"format": "ema_jax/flax", "version": 1}
_DTYPES = ("float32", "bfloat16", "float16")
# Restored at a time, unless one parameter is larger.
_GROUP_BYTES = 1 << 28
# Compressed as one: several threads restore a parameter, and a device reads its part.
_CHUNK_BYTES = 1 << 26
# Raised by Orbax and TensorStore for folders that are damaged or of another writer.
_DAMAGED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(NotImplementedError, OverflowError, ExceptionGroup),
)


def is_flax_folder(folder: str | Path) -> bool:
    """Whether a folder holds a Flax checkpoint, not a Hugging Face one."""
    return (Path(folder) / PARAMETERS).is_dir() or (Path(folder) / MANIFEST).exists()


def write(folder: Path, parameters: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Writes the nested dictionary of a model's arrays, and the manifest."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    place = (folder / PARAMETERS).resolve()
    try:
        with context, quietly():
            ocp.save(place, parameters)
    except Exception as error:  # TensorStore's have no code of the system's
        if (code := full_disk(error)) is None:
            raise
        raise OSError(code, os.strerror(code), str(place)) from None
    write_json(folder / MANIFEST, {**_FORMAT, **manifest})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest; one of another format is a `UserError`."""
    manifest = read_json(folder / MANIFEST)
    if (
        not isinstance(manifest, dict)
        or any(manifest.get(key) != value for key, value in _FORMAT.items())
        or manifest.get("dtype") not in _DTYPES
        or not isinstance(manifest.get("sha256"), str)
    ):
        raise UserError(
            f"{folder / MANIFEST}: not the manifest of a Flax checkpoint; convert again"
        )
    return manifest


def check(folder: Path, shapes: Mapping[tuple, tuple[int, ...]]) -> None:
    """Compares the stored shapes with those of an architecture, without reading any array.

    Raises:
        UserError: damaged, incomplete, or another architecture.
    """
    from orbax.checkpoint import v1 as ocp

    read_manifest(folder)
    path = folder / PARAMETERS
    try:
        with quietly():
            tree = ocp.metadata(path.resolve()).metadata
            if not isinstance(tree, dict):  # Orbax logs the reason and returns None
                raise ValueError("its metadata cannot be read")
        stored = traverse_util.flatten_dict(tree)
        there = {name: tuple(leaf.shape) for name, leaf in stored.items()}
    except _DAMAGED as error:
        raise _damaged(path, error) from None
    for name in sorted({*there, *shapes}):
        if there.get(name) != shapes.get(name):
            raise UserError(
                f"{path}: {'.'.join(name)} has shape {there.get(name)}, config.json makes it "
                f"{shapes.get(name)} (None: not there); convert again"
            )


def read(folder: Path, targets: Mapping[tuple, jax.ShapeDtypeStruct]) -> dict[tuple, jax.Array]:
    """Restores every parameter in its target's dtype and sharding.

    A few parameters at a time: Orbax holds much of what it restores twice.

    Raises:
        UserError: the files are damaged, or hold NaN or infinity.
    """
    from orbax.checkpoint import v1 as ocp

    path, arrays = folder / PARAMETERS, dict[tuple, jax.Array]()
    itemsize = jnp.dtype(read_manifest(folder)["dtype"]).itemsize
    total = sum(math.prod(target.shape) * itemsize for target in targets.values())
    with streaming.reporting(folder.name, total) as count:
        for names in _groups(targets, itemsize):
            wanted = {n: targets[n] if n in names else ocp.PLACEHOLDER for n in targets}
            try:
                with quietly():
                    tree = ocp.load(path.resolve(), traverse_util.unflatten_dict(wanted))
            except _DAMAGED as error:
                raise _damaged(path, error) from None
            restored = traverse_util.flatten_dict(tree)
            group = {name: restored[name] for name in names}
            for name, finite in zip(names, _finite(list(group.values())), strict=True):
                if not finite:
                    raise UserError(
                        f"{path}: {'.'.join(name)} holds NaN or infinity in "
                        f"{targets[name].dtype.name}: the checkpoint is damaged, or its training "
                        "diverged; convert an earlier one, or to another dtype"
                    )
            arrays |= group
            count(sum(streaming.part_size(targets[name]) * itemsize for name in names))
    return arrays


def _groups(targets: Mapping[tuple, jax.ShapeDtypeStruct], itemsize: int) -> list[list[tuple]]:
    """Names in their order, in groups of at most `_GROUP_BYTES` unless one is larger."""
    groups: list[list[tuple]] = [[]]
    size = 0
    for name, target in targets.items():
        here = streaming.part_size(target) * itemsize
        if groups[-1] and size + here > _GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += here
    return groups


@jax.jit
def _finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(array).all() for array in arrays]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without asyncio's tracebacks of Orbax's other tasks, once one of them has failed.

    A task that nobody waited for is reported to its event loop when it is freed: in this block, or
    as late as the last one who holds the error lets it go (a log record does, with its traceback).
    """
    logger = logging.getLogger("asyncio")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    except BaseException:
        for found in gc.get_objects():
            # `type`, as `isinstance` would wake lazy objects of others.
            if issubclass(type(found), asyncio.AbstractEventLoop) and found.is_closed():
                found.set_exception_handler(lambda loop, context: None)
        raise
    finally:
        logger.disabled = before


def _damaged(path: Path, error: Exception) -> UserError:
    line = str(error).strip().partition("\n")[0][:200]
    return UserError(f"{path}: not a readable Orbax checkpoint ({line}); convert again")
