"""GGUF files: their metadata, and their tensors under Hugging Face's names and in its layout.

Blocks of quantised weights are dequantised by the `gguf` package as they are read. The header is
read here: the package's `GGUFReader` keeps two arrays for every token and merge (166 MB for 49,000
tokens), and walks a damaged count to the end of the file.
"""

import dataclasses
import functools
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from ema_jax.errors import UserError
from ema_jax.runtime.opening import fill, open_file

_AGAIN = "download it again"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # of a tensor in ggml
_MAX_HEADER_BYTES = 1 << 28  # the longest vocabularies take some 10 MB

# NumPy's names of the format's numbers, by their ids there; 8 is text and 9 an array.
_NUMBERS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9

# Types that need no dequantising; the package's own function would widen the last one.
_PLAIN: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: jnp.bfloat16,
}

_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies (Llama 3.1): metadata in the form of a tensor."""


def hf_name(name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor; None for one that has none."""
    if not (found := _NAME.fullmatch(name)):
        return None
    layer, part, kind = found.groups()
    if layer is None:
        return f"{_OUTSIDE[part]}.{kind}" if part in _OUTSIDE else None
    return f"model.layers.{layer}.{_INSIDE[part]}.{kind}" if part in _INSIDE else None


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file, read as floats (see `safetensors_files.StoredTensor`).

    Attributes:
        file: that holds it.
        name: in the file.
        shape: in Hugging Face's order, rows first.
        kind: how its values are stored.
        offset: of its data, in bytes.
        head: rows of an attention head, if these are in llama.cpp's order; else 0.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    head: int = 0

    @property
    def dtype(self) -> np.dtype:
        """The dtype that `read` gives: float32 for quantised values."""
        return np.dtype(_PLAIN.get(self.kind, np.float32))

    @property
    def nbytes(self) -> int:
        """Bytes that `read` gives for the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size if len(self.shape) > 1 else size // block

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return self.row_bytes * self.shape[0]

    def read(
        self, rows: range, columns: range | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads `[rows]` of a vector or `[rows, columns]` of a matrix.

        Whole rows are read, and whole heads where their rows have another order in the file.

        Args:
            rows: which rows.
            columns: which columns; all by default.
            memory: a buffer to read into, if it is large enough; a new one by default.

        Raises:
            UserError: the file ends before the tensor does.
        """
        low, high = rows.start, rows.stop
        if self.head:
            low, high = low // self.head * self.head, -(-high // self.head) * self.head
        size = (high - low) * self.row_bytes
        if memory is None or len(memory) < size:
            memory = np.empty(size, np.uint8)
        stored = memory[:size]
        with open(self.file, "rb", buffering=0) as file:
            whole = fill(stored.data, file, self.offset + low * self.row_bytes)
        if not whole:
            raise UserError(f"{self.file}: ends inside of {self.name}; {_AGAIN}")
        values = self._floats(stored.reshape(high - low, self.row_bytes))
        if self.head:
            values = values[_stored_row(np.asarray(rows), self.head) - low]
        if len(self.shape) == 1:
            return values[:, 0]
        return values if columns is None else values[:, columns.start : columns.stop]

    def _floats(self, stored: np.ndarray) -> np.ndarray:
        if self.kind in _PLAIN:
            return stored.view(self.dtype)
        return quants.dequantize(stored, self.kind)


def _stored_row(row: np.ndarray, head: int) -> np.ndarray:
    """Where llama.cpp puts a row: it interleaves the halves of each head that rotate together."""
    which, within = np.divmod(row, head)
    half, pair = np.divmod(within, head // 2)
    return which * head + 2 * pair + half


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file's metadata, and its tensors by their names there."""

    path: Path
    metadata: Mapping[str, Any]
    stored: Mapping[str, GgufTensor]
    header_bytes: int

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Reads the header, and checks that the file holds all tensors that it lists.

        Raises:
            UserError: a missing, damaged or truncated file, or one of another version or with
                tensors that cannot be dequantised.
        """
        try:
            status = path.stat()
            return _opened(path, status.st_mtime_ns, status.st_size)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, OverflowError, MemoryError, struct.error) as error:
            raise UserError(f"{path}: not a readable GGUF file ({error}); {_AGAIN}") from None

    @property
    def files(self) -> list[Path]:
        """The file, as `WeightFiles.files` gives several."""
        return [self.path]

    def header_size(self, path: Path) -> int:
        """Bytes of the file before its data."""
        del path  # the only one
        return self.header_bytes

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata.

        Raises:
            UserError: it is of another kind, or missing where `default` is `...`.
        """
        value = self.metadata.get(key, default)
        if value is ...:
            raise UserError(f"{self.path}: {key} is missing; convert the model to GGUF again")
        if value is not default and not isinstance(value, kind):
            raise UserError(f"{self.path}: {key} is {str(value)[:40]!r}, which is none; {_AGAIN}")
        return value

    def tensors(self) -> dict[str, GgufTensor]:
        """The model's tensors by their Hugging Face names.

        Raises:
            UserError: the file holds one that no supported architecture has.
        """
        architecture = self.get("general.architecture", str, ...)
        heads = {}
        if architecture == "llama":
            # Its rotary embedding pairs neighbours in llama.cpp, and halves in transformers.
            count = self.get(f"{architecture}.attention.head_count", int, ...)
            kv = self.get(f"{architecture}.attention.head_count_kv", int, count)
            heads = {"self_attn.q_proj.weight": count, "self_attn.k_proj.weight": kv}
        result = {}
        for tensor in self.stored.values():
            if tensor.name == ROPE_FACTORS:
                continue
            name = hf_name(tensor.name)
            if name is None:
                raise UserError(
                    f"{self.path}: holds {tensor.name}, which has no place in a model that is "
                    "supported; use a plain causal language model"
                )
            count = next((n for end, n in heads.items() if name.endswith(end)), 0)
            if count and (count < 1 or tensor.shape[0] % (2 * count)):
                raise UserError(
                    f"{self.path}: {tensor.name} has {tensor.shape[0]} rows for {count} heads; "
                    f"{_AGAIN}"
                )
            head = tensor.shape[0] // count if count else 0
            result[name] = dataclasses.replace(tensor, head=head)
        return result

    def check(self, expected: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> None:
        """Checks the tensors against those of an architecture (`WeightFiles.check`).

        Raises:
            UserError: a tensor is missing, unexpected or of another shape.
        """
        del tied  # a GGUF file whose head is tied does not hold one
        found = self.tensors()
        for what, names in (
            ("are missing", [name for name in expected if name not in found]),
            ("have no place in its architecture", [name for name in found if name not in expected]),
        ):
            if names:
                raise UserError(
                    f"{self.path}: {len(names)} tensors {what}, first {names[0]}; use a complete "
                    "file of a plain causal language model"
                )
        for name, wanted in expected.items():
            if found[name].shape != wanted:
                raise UserError(
                    f"{self.path}: {found[name].name} has shape {found[name].shape}, the metadata "
                    f"makes it {wanted}; {_AGAIN}"
                )

    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds every tensor exactly."""
        return jnp.result_type(*{tensor.dtype for tensor in self.stored.values()})

    @property
    def quantisation(self) -> str:
        """How the matrices are stored, by falling number of weights: `Q4_1, Q8_0`."""
        sizes: Counter[str] = Counter()
        for tensor in self.stored.values():
            if len(tensor.shape) > 1:
                sizes[tensor.kind.name] += math.prod(tensor.shape)
        return ", ".join(kind for kind, _ in sizes.most_common())


class _Header:
    """Reads a header's values one after another, none beyond the file's end."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.left = os.fstat(file.fileno()).st_size

    def take(self, size: int) -> bytes:
        self.need(size, 1)
        self.left -= size
        return self.file.read(size)

    def need(self, count: int, size: int) -> None:
        """Refuses a count of things, of at least `size` bytes each, that cannot follow."""
        if count * size > min(self.left, _MAX_HEADER_BYTES):
            raise ValueError("it ends inside of its header, or a count in it is wrong")

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def text(self) -> str:
        return self.take(int.from_bytes(self.take(8), "little")).decode("utf-8")

    def value(self) -> Any:
        kind = self.number("<u4")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            self.need(count, dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        if kind != _TEXT:
            raise ValueError(f"an array of type {kind}")
        self.need(count, 8)
        return [self.text() for _ in range(count)]


@functools.lru_cache(maxsize=1)  # a model is found, checked, identified and loaded
def _opened(path: Path, changed: int, size: int) -> GgufFile:
    del changed, size  # another file under the same name
    with open_file(path) as file:
        return _read(path, file)


def _read(path: Path, file: BinaryIO) -> GgufFile:
    header = _Header(file)
    size = header.left
    if header.take(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    version = header.number("<u4")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, and only {_VERSIONS} are read")
    tensor_count, value_count = header.number("<u8"), header.number("<u8")
    header.need(value_count, 13)
    metadata = {}
    for _ in range(value_count):
        key = header.text()
        metadata[key] = header.value()
    if metadata.get("split.count", 0) not in (0, 1):
        raise UserError(
            f"{path}: one of several files of a model; merge them first (llama-gguf-split --merge)"
        )
    header.need(tensor_count, 24)
    rows = [_tensor(path, header) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment {alignment}")
    header_bytes = size - header.left
    start = -(-header_bytes // alignment) * alignment
    stored = {row.name: dataclasses.replace(row, offset=start + row.offset) for row in rows}
    if len(stored) < len(rows):
        raise ValueError("a tensor twice")
    for tensor in stored.values():
        if tensor.offset + tensor.stored_bytes > size:
            raise ValueError(f"it ends before or inside of {tensor.name}")
    return GgufFile(path, metadata, stored, header_bytes)


@functools.cache
def _readable(kind: GGMLQuantizationType) -> bool:
    """Whether values of a type can be turned into floats."""
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _tensor(path: Path, header: _Header) -> GgufTensor:
    name, dimensions = header.text(), header.number("<u4")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(header.number("<u8") for _ in range(dimensions))[::-1]
    kind, offset = header.number("<u4"), header.number("<u8")
    if kind not in {*GGMLQuantizationType}:
        raise ValueError(f"{name} is of an unknown type, {kind}")
    kind = GGMLQuantizationType(kind)
    if not _readable(kind) or (kind not in _PLAIN and len(shape) < 2):
        raise UserError(
            f"{path}: {name} is stored as {kind.name}, which the gguf package does not "
            "dequantise; use another quantisation, such as Q8_0 or Q4_K_M"
        )
    if len(shape) > 2 or min(shape) < 1 or (shape[-1] % GGML_QUANT_SIZES[kind][0]):
        raise ValueError(f"{name} has the shape {shape}")
    return GgufTensor(path, name, shape, kind, offset)
