"""Files that other stages and other people read: written atomically, and hashed."""

import contextlib
import csv
import hashlib
import json
import math
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ema_jax.errors import UserError
from ema_jax.runtime import distributed
from ema_jax.runtime.disk import full_disk
from ema_jax.runtime.opening import open_file, read_bytes, why

# Process ids repeat over machines that share a folder.
_WRITER = f"{socket.gethostname()}.{os.getpid()}"

# The format's names of NumPy's (and ml_dtypes') dtypes.
_SAFETENSORS = {"bool": "BOOL", "bfloat16": "BF16"}
_SAFETENSORS |= {f"float{bits}": f"F{bits}" for bits in (16, 32, 64)}
_SAFETENSORS |= {f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
_SAFETENSORS |= {f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)}

MAX_DEPTH = 100
"""Deepest nesting of arrays and objects in a JSON file; this project's are far from it."""

_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary file or folder name next to `path`; renames it to `path` on success.

    A folder that already exists at `path` is replaced. On an error nothing is left behind. Every
    process has to call it; the first one's file stays, and exists when any of them continues.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        if not distributed.is_first():
            pass
        elif temporary.is_dir() and path.is_dir():
            old = _beside(path, "old")
            shutil.rmtree(old, ignore_errors=True)  # of a killed process with this one's number
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        distributed.barrier(f"writing {path.name}")
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{_WRITER}.{threading.get_ident()}.{ending}")


def check_writable(path: str | os.PathLike) -> None:
    """Refuses a file that `atomic_path` could not write, before the work whose result it holds.

    Raises:
        UserError: `path` is a folder, a device or a pipe, or its folder cannot be written to.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no regular file"
        raise UserError(f"{path}: is {kind}; name a file")
    _try_to_write(path, path.parent, "file")


def check_folder(path: str | os.PathLike) -> None:
    """Refuses a folder that could not be made or written to, before the work that fills it.

    Raises:
        UserError: it is something else, or below something that is no folder or is read-only.
    """
    _try_to_write(Path(path), Path(path), "folder")


def _try_to_write(path: Path, folder: Path, what: str) -> None:
    """Makes and removes a folder where `folder` is, or would be made; leaves nothing behind."""
    try:
        folder, temporary = folder.absolute(), _beside(path.absolute(), "tmp").name
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder / temporary)  # which refuses a path that is too long in all
        place = next(there for there in (folder, *folder.parents) if os.path.lexists(there))
        parts = folder.relative_to(place).parts
        longest = max(len(os.fsencode(name)) for name in (temporary, *parts))
        trial = place / (temporary + "x" * (longest - len(os.fsencode(temporary))))
        trial.mkdir()
        trial.rmdir()
    except (OSError, ValueError) as error:
        if full_disk(error):
            raise
        raise UserError(f"{path}: cannot be written ({why(error)}); name another {what}") from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def json_safe(value: Any) -> Any:
    """The value as it comes back from JSON: arrays and tuples as lists, keys as text.

    NaN and infinity, which JSON does not have, become None: the figure is undefined.
    """
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return json_safe(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str) -> Any:
    """Parses JSON, and nothing that could not be written as JSON again.

    Raises:
        ValueError: no JSON, or NaN, infinity, a number beyond 1.8e308, an unpaired surrogate, or
            nesting more than `MAX_DEPTH` deep.
    """
    try:
        value = json.loads(
            text, parse_constant=_no_number, parse_float=_parse_float, parse_int=_parse_int
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Nearly all texts hold too few brackets and no escaped surrogate: they need no second look.
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("an unpaired surrogate") from None
    return value


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number too large")
    return value


def _parse_int(text: str) -> int:
    if len(text) > 308:  # from here on not even a float holds it
        raise ValueError("a number too large")
    return int(text)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [
        item
        for parent in level
        if isinstance(parent, dict | list)
        for item in (parent.values() if isinstance(parent, dict) else parent)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file (`parse_json`); a missing or malformed one is a `UserError` naming it."""
    data = read_bytes(path)
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    lines = (json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows)
    write_text(path, "".join(line + "\n" for line in lines))


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads JSON objects, one a line; see `numbered_rows`."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects, one a line (`parse_json`), each with the number of its line.

    Blank lines and byte order marks are skipped.

    Raises:
        UserError: naming file and line, for a missing file and a line that is anything else.
    """
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8").removeprefix("\ufeff")
                row = parse_json(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error})") from None
            except ValueError as error:
                raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
            if isinstance(row, dict):
                yield number, row
            elif text.strip():
                raise UserError(f"{path}:{number}: expected a JSON object, found {text[:40]!r}")


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of one shape as CSV with a header, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


class TensorSpec(NamedTuple):
    """Specification of a tensor in a file: name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Header of a safetensors file; the tensors' data follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for tensor in specs:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _SAFETENSORS[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants aligned data
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: str | os.PathLike,
    specs: Sequence[TensorSpec],
    values: Iterator[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file one tensor at a time; equal contents, equal bytes.

    (The library's own writer wants all tensors in memory, and orders metadata at random.)

    Args:
        path: where to; not atomic.
        specs: of the tensors.
        values: an array for each, in that order.
        metadata: goes into the header.
    """
    with open(path, "wb") as file:
        file.write(safetensors_header(specs, metadata))
        for tensor in specs:
            value = next(values)
            assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype), tensor.name
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file with string metadata, atomically; equal contents, equal bytes."""
    # Wide dtypes first, as the library has them: every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    specs = [TensorSpec(name, tensors[name].shape, tensors[name].dtype) for name in names]
    with atomic_path(path) as temporary:
        write_safetensors(temporary, specs, (tensors[name] for name in names), metadata)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file: `(tensors, metadata)`."""
    open_file(path).close()
    try:
        with safe_open(path, framework="np") as file:
            # SafeTensors files offer keys() but are not iterable themselves.
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, TypeError) as error:  # a dtype that NumPy lacks
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def sha256_text(text: str) -> str:
    """Hex SHA-256 of UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of key order."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False))


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
