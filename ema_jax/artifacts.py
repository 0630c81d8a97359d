"""Files that other stages and other people read: written whole or not at all, and hashed."""

import contextlib
import csv
import hashlib
import json
import math
import os
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ema_jax import distributed
from ema_jax.errors import UserError

# Process ids repeat over machines that share a folder.
_WRITER = f"{socket.gethostname()}.{os.getpid()}"

# The format's names of NumPy's (and ml_dtypes') dtypes.
_SAFETENSORS = {"bool": "BOOL", "bfloat16": "BF16"}
_SAFETENSORS |= {f"float{bits}": f"F{bits}" for bits in (16, 32, 64)}
_SAFETENSORS |= {f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
_SAFETENSORS |= {f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary file or folder name beside `path`; renames it to `path` on success.

    A folder that already stands at `path` is replaced whole. On an error nothing is left behind.
    Of several processes all come here; the first one's is kept, and is there when any goes on.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{_WRITER}.{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        yield temporary
        if not distributed.is_first():
            pass
        elif temporary.is_dir() and path.is_dir():
            old = path.with_name(f".{path.name}.{writer}.old")
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


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; a missing or malformed one is a `UserError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    lines = (json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows)
    write_text(path, "".join(line + "\n" for line in lines))


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads JSON objects, one a line; a malformed line is a `UserError` with its number."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected a JSON object, found {line[:40]!r}")
                rows.append(row)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    return rows


def write_csv(path: str | os.PathLike, rows: list[Mapping[str, Any]]) -> None:
    """Writes rows of one shape as CSV with a header, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


class Shape(NamedTuple):
    """What a tensor will be: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors_header(shapes: Sequence[Shape], metadata: Mapping[str, str]) -> bytes:
    """How a safetensors file of these tensors begins; their data follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for tensor in shapes:
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
    shapes: Sequence[Shape],
    values: Iterator[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file one tensor at a time; equal contents, equal bytes.

    (The library's own writer wants all tensors in memory, and orders metadata at random.)

    Args:
        path: where to; not atomic.
        shapes: what will come.
        values: an array for each, in that order; as many are taken.
        metadata: goes into the header.
    """
    with open(path, "wb") as file:
        file.write(safetensors_header(shapes, metadata))
        for tensor in shapes:
            value = next(values)
            assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype), tensor.name
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file with string metadata, atomically; equal contents, equal bytes."""
    # Wide dtypes first, as the library has them: every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    shapes = [Shape(name, tensors[name].shape, tensors[name].dtype) for name in names]
    with atomic_path(path) as temporary:
        write_safetensors(temporary, shapes, (tensors[name] for name in names), metadata)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file: `(tensors, metadata)`."""
    try:
        with safe_open(path, framework="np") as file:
            # SafeTensors files offer keys() but are not iterable themselves.
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def sha256_text(text: str) -> str:
    """Hex SHA-256 of UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of key order."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False))


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
