"""Safetensors files of a Hugging Face folder: which tensors they hold, reading and writing them."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ema_jax.errors import UserError
from ema_jax.runtime.files import TensorSpec, parse_json, read_json, write_safetensors
from ema_jax.runtime.opening import fill, open_file, other_spelling

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_ROWS_AT_ONCE = 4096
HEAD = "lm_head.weight"
"""The tensor that a tied model lacks."""

_BARE = "model."
# Parts of names that a model gets from what it was wrapped into when it was saved.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "Lightning",
    "base_model.": "PEFT",
    "module.": "DataParallel",
}
# Old Llama and Mistral checkpoints store these; they follow from config.json.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")
# Stored by GPTQ, AWQ, FP8, bitsandbytes and MLX in addition to a matrix or in its place.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|(weight|input)_scale(_inv)?|weight_packed|SCB|scales"
    r"|weight\.(absmax|quant_map|quant_state\..*))$"
)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `dtype_name` is safetensors' name of its dtype, `offset` is in bytes."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype_name: str
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a floating tensor."""
        return np.dtype(_DTYPES[self.dtype_name])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(
        self, rows: range, columns: range | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads `[rows]` of a vector or `[rows, columns]` of a matrix, and no other byte.

        By plain reads: mapped pages would count as memory of this process.

        Args:
            rows: which rows.
            columns: which columns; all by default.
            memory: a buffer to read into, if it is large enough; a new one by default.

        Raises:
            UserError: the file ends before the tensor does.
        """
        row, size = math.prod(self.shape[1:]), self.dtype.itemsize
        columns = range(row) if columns is None else columns
        width = len(columns) * size
        if memory is None or len(memory) < len(rows) * width:
            memory = np.empty(len(rows) * width, np.uint8)
        stored = memory[: len(rows) * width]
        first = self.offset + (rows.start * row + columns.start) * size
        with open(self.file, "rb", buffering=0) as file:
            if len(columns) == row:
                whole = fill(stored.data, file, first)
            else:
                pieces = enumerate(stored.reshape(len(rows), width))
                whole = all(fill(piece.data, file, first + i * row * size) for i, piece in pieces)
        if not whole:
            raise UserError(f"{self.file}: ends inside of {self.name}; download it again")
        values = stored.view(self.dtype).reshape(len(rows), len(columns))
        return values if len(self.shape) > 1 else values[:, 0]


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The weights in a folder; `file_of` maps each tensor to its file."""

    folder: Path
    file_of: Mapping[str, Path]

    @classmethod
    def find(cls, folder: Path) -> "WeightFiles":
        """Reads the names in a folder's `model.safetensors` or in its index.

        Raises:
            UserError: no such weights, or an index that does not match its files.
        """
        index, single = folder / INDEX, folder / SINGLE
        if os.path.lexists(index) and os.path.lexists(single):
            raise UserError(f"{folder}: both {SINGLE} and {INDEX}; remove the one that is stale")
        if os.path.lexists(index):
            return cls(folder, _read_index(index))
        if os.path.lexists(single):
            return cls(folder, dict.fromkeys(open_weights(single).keys(), single))
        there = other_spelling(single) or other_spelling(index)
        raise UserError(
            f"{folder}: {_what_else(folder)}{there}; a checkpoint has {SINGLE} or {INDEX}"
        )

    @property
    def files(self) -> list[Path]:
        """The files in use, sorted by name."""
        return sorted(set(self.file_of.values()))

    @staticmethod
    def header_size(path: Path) -> int:
        """Bytes of a file before its data.

        Raises:
            UserError: the file is damaged.
        """
        open_weights(path)
        with open(path, "rb") as file:
            return 8 + int.from_bytes(file.read(8), "little")

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name, with its file and offset.

        Raises:
            UserError: a file is damaged, or holds other tensors than the index says.
        """
        found: dict[str, StoredTensor] = {}
        for path in self.files:
            for name, tensor in _read_header(path).items():
                home = self.file_of.get(name)
                if home is None:
                    raise UserError(f"{path}: holds {name}, which {INDEX} does not list")
                if home != path:
                    raise UserError(f"{path}: holds {name}, which {INDEX} puts into {home.name}")
                found[name] = tensor
        for name, path in self.file_of.items():
            if name not in found:
                raise UserError(f"{path}: {name} is not in this file, though {INDEX} says so")
        return found

    def check(self, expected: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> None:
        """Checks the tensors against those of an architecture.

        Args:
            expected: every tensor's shape.
            tied: tensors that may be stored as copies of another one, and that one.

        Raises:
            UserError: a tensor is missing, unexpected, of another shape, or of a dtype that is not
                floating-point.
        """
        missing = [name for name in expected if name not in self.file_of]
        quantised = next((name for name in self.file_of if _QUANTISED.search(name)), None)
        if missing and quantised:
            raise UserError(
                f"{self.file_of[quantised]}: holds {quantised}, so the weights are quantised; use "
                "the unquantised checkpoint"
            )
        if missing:
            raise UserError(f"{self.folder}: {self._what_instead(expected, missing)}")
        stored = self.tensors()
        unexpected = [
            name
            for name in stored
            if name not in expected and name not in tied and not _DERIVED.search(name)
        ]
        if unexpected:
            raise UserError(
                f"{self.folder}: {len(unexpected)} tensors that config.json gives no place to, "
                f"first {unexpected[0]}; use the checkpoint of a plain causal language model"
            )
        for name, wanted in expected.items():
            tensor = stored[name]
            if tensor.shape != wanted:
                raise UserError(
                    f"{tensor.file}: {name} has shape {tensor.shape}, config.json makes it {wanted}"
                )
            if tensor.dtype_name not in _DTYPES:
                raise UserError(
                    f"{tensor.file}: {name} has dtype {tensor.dtype_name}; use the unquantised "
                    f"checkpoint ({', '.join(_DTYPES)})"
                )
        for name, source in tied.items():
            if name in stored and not _equal(stored[name], stored[source]):
                # transformers 5 would leave such a pair untied, earlier ones would tie it.
                raise UserError(
                    f"{self.file_of[name]}: {name} differs from {source} though config.json has "
                    "tie_word_embeddings = true; set it to false, or remove the tensor"
                )

    def _what_instead(self, expected: Mapping[str, tuple[int, ...]], missing: list[str]) -> str:
        """Says what stands in the place of missing tensors, and what to do."""
        if missing == [HEAD]:
            return (
                f"{HEAD} is missing, and config.json has tie_word_embeddings = false; set it to "
                "true if the model's head is its embedding, else download the folder again"
            )
        count = f"{len(missing)} tensors are missing, first {missing[0]}"
        for name in self.file_of:
            for wanted in missing:
                if name.endswith(f".{wanted}"):
                    prefix = name.removesuffix(wanted)
                    by = next((by for part, by in _WRAPPERS.items() if part in prefix), "a wrapper")
                    return (
                        f"{count}; the names start with {prefix!r} ({name}), which {by} leaves; "
                        "save the model that is inside (save_pretrained), or take that off the "
                        "names"
                    )
                if wanted == _BARE + name:
                    return (
                        f"{count}; the names lack {_BARE!r} ({name}), as of a model without its "
                        "head (AutoModel); save it with AutoModelForCausalLM"
                    )
        return f"{count}; is the download complete, and config.json its own?"

    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds every tensor exactly."""
        held = {t.dtype_name for name, t in self.tensors().items() if not _DERIVED.search(name)}
        return jnp.result_type(*(_DTYPES.get(name, np.float32) for name in sorted(held)))


def open_weights(path: Path) -> Any:
    """Opens a safetensors file for NumPy; a damaged one is a `UserError`."""
    open_file(path).close()
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); download it again"
        ) from None


def _read_index(index: Path) -> dict[str, Path]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: no weight_map from tensors to files; download it again")
    file_of = {}
    for name, file in names.items():
        # By name and not by where it leads: files in the hub's cache are links into its blobs.
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {name} is in {file!r}, which is no file of this folder")
        file_of[name] = index.parent / file
    for path in sorted(set(file_of.values())):
        if not os.path.exists(path):  # a Path's own raises where the name is too long
            raise UserError(f"{path}: no such file, though {INDEX} names it; download it again")
    return file_of


def _what_else(folder: Path) -> str:
    """Names the contents of a folder that has no weights in a supported format."""
    for pattern, what in (
        ("model-*-of-*.safetensors", f"{{}} without its {INDEX}"),
        ("consolidated*.safetensors", "only weights in Mistral's own format ({})"),
        ("adapter_model.safetensors", "an adapter ({}) and not a model"),
        ("adapter_model*.bin", "a pickled adapter ({}) and not a model"),
        ("adapter_config.json", "an adapter's description ({}) and no model"),
        ("*.gguf", "only GGUF weights (name {} itself)"),
        ("*.bin", "only pickled weights ({})"),
        ("*.pth", "only pickled weights ({})"),
        ("*.safetensors", "{} under a name that no checkpoint has"),
    ):
        if found := sorted(folder.glob(pattern)):
            return what.format(found[0].name)
    return "no weights"


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    if (first.shape, first.dtype_name) != (second.shape, second.dtype_name):
        return False
    return all(np.array_equal(first.read(rows), second.read(rows)) for rows in _bands(first))


def _bands(tensor: StoredTensor) -> Iterator[range]:
    for start in range(0, tensor.shape[0], _ROWS_AT_ONCE):
        yield range(start, min(start + _ROWS_AT_ONCE, tensor.shape[0]))


def _read_header(path: Path) -> dict[str, StoredTensor]:
    open_weights(path)  # safetensors itself checks sizes, offsets and dtypes
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length).decode())
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path, name, tuple(row["shape"]), row["dtype"], 8 + length + row["data_offsets"][0]
        )
        for name, row in header.items()
    }


def write_weights(
    folder: Path, shapes: Sequence[TensorSpec], values: Iterable[np.ndarray], max_shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or several files and their index, one tensor at a time.

    Args:
        folder: to write to.
        shapes: name, shape and dtype of each tensor.
        values: the arrays in that order; may be lazy.
        max_shard_bytes: start a new file past this size, unless a single tensor is larger.
    """
    shards: list[list[TensorSpec]] = [[]]
    for tensor in shapes:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    remaining = iter(values)
    for i, shard in enumerate(shards):
        many = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE if len(shards) == 1 else many
        write_safetensors(folder / file, shard, remaining, {"format": "pt"})
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in shapes)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
