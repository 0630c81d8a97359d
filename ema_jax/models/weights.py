"""The safetensors files of a checkpoint folder: which holds which tensor, and whether they fit."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ema_jax.artifacts import read_json
from ema_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_ROWS_AT_ONCE = 4096
# Old Llama and Mistral checkpoints store these; they follow from config.json.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """A folder's weights; `file_of` says which file holds a tensor."""

    folder: Path
    file_of: Mapping[str, Path]

    @classmethod
    def find(cls, folder: Path) -> "WeightFiles":
        """Reads the names in a folder's `model.safetensors` or in its index.

        Raises:
            UserError: no such weights, or an index that does not fit its files.
        """
        index, single = folder / INDEX, folder / SINGLE
        if index.exists() and single.exists():
            raise UserError(f"{folder}: both {SINGLE} and {INDEX}; remove the one that is stale")
        if index.exists():
            return cls(folder, _read_index(index))
        if single.exists():
            return cls(folder, dict.fromkeys(open_weights(single).keys(), single))
        raise UserError(f"{folder}: {_what_else(folder)}; a checkpoint has {SINGLE} or {INDEX}")

    @property
    def files(self) -> list[Path]:
        """The files in use, by name."""
        return sorted(set(self.file_of.values()))

    def slices(self) -> dict[str, Any]:
        """Lazily readable slices of every tensor, by name.

        Raises:
            UserError: a file is damaged, or holds other tensors than the index says.
        """
        found: dict[str, Any] = {}
        for path in self.files:
            file = open_weights(path)
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                home = self.file_of.get(name)
                if home is None:
                    raise UserError(f"{path}: holds {name}, which {INDEX} does not list")
                if home != path:
                    raise UserError(f"{path}: holds {name}, which {INDEX} puts into {home.name}")
                found[name] = file.get_slice(name)
        for name, path in self.file_of.items():
            if name not in found:
                raise UserError(f"{path}: {name} is not in this file, though {INDEX} says so")
        return found

    def check(self, expected: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> None:
        """Compares the tensors with those of an architecture.

        Args:
            expected: every tensor's shape.
            tied: tensors that may be there as copies of another one.

        Raises:
            UserError: a tensor is missing or too many, or has another shape or a dtype that is not
                floating.
        """
        missing = [name for name in expected if name not in self.file_of]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} tensors are missing, first {missing[0]}; "
                "is the download complete, and config.json its own?"
            )
        slices = self.slices()
        unexpected = [
            name
            for name in slices
            if name not in expected and name not in tied and not _DERIVED.search(name)
        ]
        if unexpected:
            raise UserError(
                f"{self.folder}: {len(unexpected)} tensors that config.json gives no place to, "
                f"first {unexpected[0]}; use the checkpoint of a plain causal language model"
            )
        for name, wanted in expected.items():
            shape, dtype = tuple(slices[name].get_shape()), slices[name].get_dtype()
            if shape != wanted:
                raise UserError(
                    f"{self.file_of[name]}: {name} has shape {shape}, config.json makes it {wanted}"
                )
            if dtype not in _DTYPES:
                raise UserError(
                    f"{self.file_of[name]}: {name} has dtype {dtype}; use the unquantised "
                    f"checkpoint ({', '.join(_DTYPES)})"
                )
        for name, source in tied.items():
            if name in slices and not _equal(slices[name], slices[source]):
                # transformers 5 would leave such a pair untied, earlier ones would tie it.
                raise UserError(
                    f"{self.file_of[name]}: {name} differs from {source} though config.json has "
                    "tie_word_embeddings = true; set it to false, or remove the tensor"
                )

    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds every tensor exactly."""
        held = {s.get_dtype() for name, s in self.slices().items() if not _DERIVED.search(name)}
        return jnp.result_type(*(_DTYPES.get(name, np.float32) for name in sorted(held)))


def open_weights(path: Path) -> Any:
    """Opens a safetensors file for NumPy; a damaged one is a `UserError`."""
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
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
        if not path.exists():
            raise UserError(f"{path}: no such file, though {INDEX} names it; download it again")
    return file_of


def _what_else(folder: Path) -> str:
    """What a folder holds in place of weights that can be read."""
    for pattern, what in (
        ("model-*-of-*.safetensors", f"{{}} without its {INDEX}"),
        ("consolidated*.safetensors", "only weights in Mistral's own format ({})"),
        ("adapter_model.safetensors", "an adapter ({}) and not a model"),
        ("*.gguf", "only GGUF weights ({})"),
        ("*.bin", "only pickled weights ({})"),
        ("*.pth", "only pickled weights ({})"),
        ("*.safetensors", "{} under a name that no checkpoint has"),
    ):
        if found := sorted(folder.glob(pattern)):
            return what.format(found[0].name)
    return "no weights"


def _equal(first: Any, second: Any) -> bool:
    if first.get_shape() != second.get_shape() or first.get_dtype() != second.get_dtype():
        return False
    return all(np.array_equal(first[rows], second[rows]) for rows in _chunks(first.get_shape()[0]))


def _chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, rows))
