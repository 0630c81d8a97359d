"""Hugging Face checkpoints in and out, through one mapping table.

Loading reads slices of the safetensors files straight into the stacked, transposed, sharded
target, so the peak of host memory is the parameters plus one shard of one tensor.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ema_jax.artifacts import atomic_path, read_json
from ema_jax.errors import UserError
from ema_jax.models.decoder import Decoder
from ema_jax.models.families import FAMILIES, DecoderConfig
from ema_jax.models.sharding import make_mesh, parameter_shardings
from ema_jax.progress import Progress

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9


class Tensor(NamedTuple):
    """One row of the mapping: where a parameter of ours stands in a Hugging Face checkpoint."""

    path: tuple[str, ...]
    hf: str  # with {l} where one tensor a layer is stacked
    transpose: bool = False


def _linear(ours: str, theirs: str) -> list[Tensor]:
    prefix = "model.layers.{l}."
    return [
        Tensor(("blocks", ours, "kernel"), f"{prefix}{theirs}.{ours}.weight", transpose=True),
        Tensor(("blocks", ours, "bias"), f"{prefix}{theirs}.{ours}.bias"),
    ]


TENSORS = (
    Tensor(("embed",), "model.embed_tokens.weight"),
    Tensor(("blocks", "input_norm", "scale"), "model.layers.{l}.input_layernorm.weight"),
    *(row for name in ("q_proj", "k_proj", "v_proj", "o_proj") for row in _linear(name, "self_attn")),
    Tensor(("blocks", "q_norm", "scale"), "model.layers.{l}.self_attn.q_norm.weight"),
    Tensor(("blocks", "k_norm", "scale"), "model.layers.{l}.self_attn.k_norm.weight"),
    Tensor(("blocks", "post_norm", "scale"), "model.layers.{l}.post_attention_layernorm.weight"),
    *(row for name in ("gate_proj", "up_proj", "down_proj") for row in _linear(name, "mlp")),
    Tensor(("final_norm", "scale"), "model.norm.weight"),
    Tensor(("head",), "lm_head.weight", transpose=True),
)
"""Every parameter of every family; a model has those of its architecture."""


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """The decoder with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The safetensors files of a folder: which holds which tensor."""

    folder: Path
    file_of: Mapping[str, Path]

    @classmethod
    def find(cls, folder: Path) -> "_Weights":
        index = folder / INDEX
        if index.exists():
            names = read_json(index).get("weight_map", {})
            file_of = {name: folder / file for name, file in names.items()}
            for path in sorted(set(file_of.values())):
                if path.resolve().parent != folder.resolve():
                    raise UserError(f"{index}: points outside its folder ({path})")
                if not path.exists():
                    raise UserError(f"{path}: no such file, though {INDEX} names it")
            return cls(folder, file_of)
        single = folder / SINGLE
        if not single.exists():
            pickled = sorted(folder.glob("*.bin"))
            found = f"only pickled weights ({pickled[0].name})" if pickled else "no weights"
            raise UserError(f"{folder}: {found}; a checkpoint here needs {SINGLE} or {INDEX}")
        with _open(single) as file:
            names = file.keys()
            return cls(folder, dict.fromkeys(names, single))

    def files(self) -> list[Path]:
        return sorted(set(self.file_of.values()))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _rows(state: Mapping[tuple[str, ...], Any]) -> Iterator[Tensor]:
    for row in TENSORS:
        if row.path in state:
            yield row


def _names(row: Tensor, config: DecoderConfig) -> list[str]:
    if "{l}" not in row.hf:
        return [row.hf]
    return [row.hf.format(l=l) for l in range(config.num_layers)]


def _validate(weights: _Weights, config: DecoderConfig, state: Mapping) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for row in _rows(state):
        shape = state[row.path].shape
        shape = shape[1:] if "{l}" in row.hf else shape
        for name in _names(row, config):
            expected[name] = shape[::-1] if row.transpose else shape
    missing = [name for name in expected if name not in weights.file_of]
    if missing:
        raise UserError(
            f"{weights.folder}: {len(missing)} tensors are missing, first {missing[0]}; "
            "is the download complete?"
        )
    ignored = {"lm_head.weight"} if config.tied_embeddings else set()
    unexpected = [
        name
        for name in weights.file_of
        if name not in expected and name not in ignored and not name.endswith("rotary_emb.inv_freq")
    ]
    if unexpected:
        raise UserError(
            f"{weights.folder}: {len(unexpected)} tensors that a {config.family} does not have, "
            f"first {unexpected[0]}"
        )
    for path in weights.files():
        with _open(path) as file:
            held = set(file.keys())
            for name, home in weights.file_of.items():
                if home != path or name not in expected:
                    continue
                if name not in held:
                    raise UserError(f"{path}: {name} is not in this file, though {INDEX} says so")
                shape = tuple(file.get_slice(name).get_shape())
                if shape != expected[name]:
                    raise UserError(
                        f"{path}: {name} has shape {shape}, config.json makes it {expected[name]}"
                    )


def load(folder: str | Path, *, mesh: Mesh | None = None, dtype: Any = None) -> Decoder:
    """Loads a checkpoint folder as a decoder whose parameters lie on `mesh`.

    Args:
        folder: `config.json` and safetensors files (single or indexed).
        mesh: where the parameters go; one device by default.
        dtype: of the parameters; by default bfloat16 on accelerators, float32 on a CPU.

    Raises:
        UserError: anything about the folder that would make the model another one.
    """
    folder = Path(folder)
    config = DecoderConfig.from_folder(folder)
    weights = _Weights.find(folder)
    graph, abstract = nnx.split(abstract_decoder(config))
    flat = dict(nnx.to_flat_state(abstract))
    _validate(weights, config, flat)
    mesh = make_mesh() if mesh is None else mesh
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    shardings = dict(nnx.to_flat_state(parameter_shardings(abstract, mesh)))
    loaded = {}
    files = {path: _open(path) for path in weights.files()}
    total = sum(math.prod(leaf.shape) for leaf in flat.values())
    with Progress(f"load {folder.name}", total, "parameters") as progress:
        for row in _rows(flat):
            slices = [files[weights.file_of[n]].get_slice(n) for n in _names(row, config)]
            shape = flat[row.path].shape

            def read(
                index: tuple[slice, ...],
                slices: list = slices,
                row: Tensor = row,
                shape: tuple = shape,
            ) -> np.ndarray:
                if "{l}" not in row.hf:
                    return _read_slice(slices[0], index, row.transpose).astype(dtype)
                layers = range(*index[0].indices(len(slices)))
                sizes = [len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)]
                target = np.empty(sizes, dtype)
                for place, l in enumerate(layers):
                    target[place] = _read_slice(slices[l], index[1:], row.transpose)
                return target

            sharding = shardings[row.path]
            sharding = getattr(sharding, "value", sharding)
            array = jax.make_array_from_callback(shape, sharding, read)
            loaded[row.path] = flat[row.path].replace(array)
            progress.update(math.prod(shape))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _read_slice(source: Any, index: tuple[slice, ...], transpose: bool) -> np.ndarray:
    if transpose:
        return source[index[1], index[0]].T
    return source[index]


def hf_tensors(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """The model's parameters under their Hugging Face names, one tensor at a time.

    Adapters are not among them: merge them first (`lora.merge`).
    """
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    for row in _rows(flat):
        value = flat[row.path][...]
        for l, name in enumerate(_names(row, model.config)):
            tensor = np.asarray(value[l] if "{l}" in row.hf else value)
            yield name, np.ascontiguousarray(tensor.T if row.transpose else tensor)


# Everything in a checkpoint folder that is not weights and should travel with them.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def export(
    model: Decoder,
    folder: str | Path,
    *,
    companions: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes an ordinary Hugging Face checkpoint folder, whole or not at all.

    Args:
        model: without adapters.
        folder: where to.
        companions: a checkpoint folder whose tokenizer and generation config travel along.
        overwrite: replace a folder that is already there.
        max_shard_bytes: start a new safetensors file past this size.

    Raises:
        UserError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder}: already exists; choose another folder or remove it")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        shards: list[dict[str, np.ndarray]] = [{}]
        names: list[list[str]] = []
        size = total = 0

        def flush() -> None:
            save_file(shards[0], temporary / f"part-{len(names)}", metadata={"format": "pt"})
            names.append(list(shards[0]))
            shards[0] = {}

        for name, tensor in hf_tensors(model):
            if shards[0] and size + tensor.nbytes > max_shard_bytes:
                flush()
                size = 0
            shards[0][name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
            dtype = tensor.dtype.name
        flush()
        if len(names) == 1:
            (temporary / "part-0").rename(temporary / SINGLE)
        else:
            weight_map = {}
            for i, held in enumerate(names):
                file = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
                (temporary / f"part-{i}").rename(temporary / file)
                weight_map |= dict.fromkeys(held, file)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / INDEX).write_text(json.dumps(index, indent=2))
        config = dict(model.config.hf)
        config["architectures"] = [FAMILIES[model.config.family].architecture]
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in _COMPANIONS:
            if companions is not None and (source := Path(companions) / name).exists():
                shutil.copyfile(source, temporary / name)


def fingerprint(folder: str | Path) -> str:
    """A hash that tells one checkpoint from another without reading all of it.

    SHA-256 over `config.json` and `tokenizer.json` whole, and over every safetensors file's size,
    header and the first and last MiB of its data.
    """
    folder, digest, mib = Path(folder), hashlib.sha256(), 1 << 20
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).exists():
            digest.update((folder / name).read_bytes())
    for path in _Weights.find(folder).files():
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            header = file.read(8)
            digest.update(header + file.read(struct.unpack("<Q", header)[0] + mib))
            file.seek(max(size - mib, 0))
            digest.update(file.read())
    return digest.hexdigest()
