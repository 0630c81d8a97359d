"""Model folders, Hugging Face and Flax (Orbax), read and written through one mapping table.

Loading reads blocks of the files straight into the stacked, transposed, sharded parameters: besides
these the host holds a few blocks, and so does an accelerator.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ema_jax.errors import UserError
from ema_jax.models import folder_links, gguf_folder, orbax_folder, parts, streaming, token_ids
from ema_jax.models.config import FAMILIES, DecoderConfig
from ema_jax.models.decoder import Decoder, LoRAParam
from ema_jax.models.gguf_file import GgufFile
from ema_jax.models.orbax_folder import is_flax_folder
from ema_jax.models.safetensors_files import WeightFiles, write_weights
from ema_jax.models.sharding import host_array, make_mesh, on_cpu, parameter_shardings
from ema_jax.runtime import distributed
from ema_jax.runtime.files import (
    TensorSpec,
    atomic_path,
    check_folder,
    sha256_file,
    sha256_json,
)
from ema_jax.runtime.opening import open_file, read_bytes

MAX_SHARD_BYTES = 5 * 10**9

_Path = tuple[Any, ...]


class TensorMapping(NamedTuple):
    """One row of the mapping table: a parameter's path here and in a Hugging Face checkpoint."""

    path: _Path
    hf: str  # with {l} for the layer, where layers are stacked
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the Hugging Face checkpoint has one tensor per layer."""
        return "{l}" in self.hf

    def names(self, config: DecoderConfig) -> list[str]:
        """Hugging Face names of the parameter, by layer."""
        return [self.hf.format(l=i) for i in range(config.num_layers if self.stacked else 1)]


def _linears(group: str, *names: str) -> list[TensorMapping]:
    rows = []
    for name in names:
        hf = f"model.layers.{{l}}.{group}.{name}"
        rows.append(TensorMapping(("blocks", name, "kernel"), f"{hf}.weight", transpose=True))
        rows.append(TensorMapping(("blocks", name, "bias"), f"{hf}.bias"))
    return rows


TENSORS = (
    TensorMapping(("embed",), "model.embed_tokens.weight"),
    TensorMapping(("blocks", "input_norm", "scale"), "model.layers.{l}.input_layernorm.weight"),
    *_linears("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
    TensorMapping(("blocks", "q_norm", "scale"), "model.layers.{l}.self_attn.q_norm.weight"),
    TensorMapping(("blocks", "k_norm", "scale"), "model.layers.{l}.self_attn.k_norm.weight"),
    TensorMapping(
        ("blocks", "post_norm", "scale"), "model.layers.{l}.post_attention_layernorm.weight"
    ),
    *_linears("mlp", "gate_proj", "up_proj", "down_proj"),
    TensorMapping(("final_norm", "scale"), "model.norm.weight"),
    TensorMapping(("head",), "lm_head.weight", transpose=True),
)
"""Every parameter of every family; a model has those of its architecture."""


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """A decoder with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))


def _parameters(model: Decoder) -> dict[_Path, Any]:
    flat: Any = nnx.to_flat_state(nnx.state(model))
    return dict(flat)


def check(folder: str | Path) -> DecoderConfig:
    """Validates a model folder without reading its weights, and returns its architecture.

    Raises:
        UserError: a file is missing or damaged, is a link or a pipe, or does not match the
            architecture, or the tokenizer has more ids than the embedding rows.
    """
    folder = Path(folder)
    folder_links.check(folder)
    config = DecoderConfig.from_folder(folder)
    token_ids.check_folder(folder, config.vocab_size)
    parameters = _parameters(abstract_decoder(config))
    if is_flax_folder(folder):
        orbax_folder.check(folder, {path: leaf.shape for path, leaf in parameters.items()})
        return config
    expected: dict[str, tuple[int, ...]] = {}
    for row in TENSORS:
        if row.path in parameters:
            shape = parameters[row.path].shape[row.stacked :]
            shape = shape[::-1] if row.transpose else shape
            expected |= dict.fromkeys(row.names(config), shape)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tied_embeddings else {}
    _stored_weights(folder).check(expected, tied)
    return config


def _stored_weights(folder: Path) -> WeightFiles | GgufFile:
    if gguf_folder.is_gguf_folder(folder):
        return gguf_folder.weights(folder)
    return WeightFiles.find(folder)


def load(folder: str | Path, *, mesh: Mesh | None = None, dtype: Any = None) -> Decoder:
    """Loads a checkpoint folder as a decoder whose parameters are laid out on `mesh`.

    Args:
        folder: `config.json`, and either safetensors files (one, or several with an index), the
            output of `save_flax`, or the place of a GGUF file (`hub.resolve`).
        mesh: one device by default.
        dtype: of the parameters; by default bfloat16 on accelerators, float32 on a CPU.

    Raises:
        UserError: a file is missing or damaged, or does not match the architecture.
    """
    folder = Path(folder)
    config = check(folder)
    graph, abstract = nnx.split(abstract_decoder(config))
    mesh = make_mesh() if mesh is None else mesh
    if dtype is None:
        dtype = jnp.float32 if on_cpu(mesh) else jnp.bfloat16
    leaves = dict(nnx.to_flat_state(abstract))
    shardings = dict(nnx.to_flat_state(parameter_shardings(abstract, mesh)))
    targets = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype(dtype), sharding=shardings[path].get_value()
        )
        for path, leaf in leaves.items()
    }
    if is_flax_folder(folder):
        arrays = orbax_folder.read(folder, targets)
    else:
        arrays = _read_hf(folder, config, targets)
    return nnx.merge(
        graph,
        nnx.from_flat_state({path: leaf.replace(arrays[path]) for path, leaf in leaves.items()}),
    )


def _read_hf(
    folder: Path,
    config: DecoderConfig,
    targets: Mapping[_Path, jax.ShapeDtypeStruct],
    device_block: int | None = None,
) -> dict[_Path, jax.Array]:
    stored = _stored_weights(folder).tensors()
    parameters = {
        row.path: parts.Parameter(
            [stored[name] for name in row.names(config)],
            targets[row.path],
            row.stacked,
            row.transpose,
        )
        for row in TENSORS
        if row.path in targets
    }
    total = sum(tensor.nbytes for parameter in parameters.values() for tensor in parameter.stored)
    with streaming.reporting(folder.name, total) as count:
        return streaming.read_parameters(parameters, count, device_block=device_block)


def hf_shapes(model: Decoder, dtype: Any = None) -> list[TensorSpec]:
    """Name, shape and dtype of each tensor that `hf_tensors` yields, in its order.

    Raises:
        ValueError: the model has adapters; merge them first (`lora.merge`).
    """
    parameters, shapes = _parameters(model), []
    if any(isinstance(leaf, LoRAParam) for leaf in parameters.values()):
        raise ValueError("the model has adapters, which a checkpoint cannot hold; merge them")
    for row in TENSORS:
        if row.path in parameters:
            leaf = parameters[row.path]
            shape = leaf.shape[row.stacked :]
            shape = shape[::-1] if row.transpose else shape
            held = jnp.dtype(leaf.dtype if dtype is None else dtype)
            shapes += [TensorSpec(name, shape, held) for name in row.names(model.config)]
    return shapes


def hf_tensors(model: Decoder, dtype: Any = None) -> Iterator[np.ndarray]:
    """The parameters in Hugging Face's names and layout, one tensor at a time, cast to `dtype`.

    For a model that is split over several processes, all of them have to iterate to the end.
    """
    parameters = _parameters(model)
    for row in TENSORS:
        if row.path in parameters:
            value = parameters[row.path][...]
            for i in range(len(row.names(model.config))):
                tensor = host_array(value[i] if row.stacked else value)
                tensor = tensor if dtype is None else tensor.astype(jnp.dtype(dtype), copy=False)
                yield parts.transpose(tensor) if row.transpose else tensor


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


_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_output(folder: str | Path, overwrite: bool) -> None:
    """Refuses to write over anything but an older checkpoint, and over that without `overwrite`.

    Raises:
        UserError: something is there, or the folder cannot be written.
    """
    folder = Path(folder)
    if not os.path.lexists(folder):
        check_folder(folder)
        return
    if not overwrite:
        raise UserError(f"{folder}: already exists; choose another folder or remove it")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").exists()):
        raise UserError(f"{folder}: no checkpoint folder, so it is not overwritten; choose another")
    check_folder(folder)


def export(
    model: Decoder,
    folder: str | Path,
    *,
    companions: str | Path | None = None,
    card: str | None = None,
    dtype: Any = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face checkpoint folder, atomically.

    With several processes, all have to call it: the first one writes, the others wait for it.

    Args:
        model: without adapters.
        folder: to write.
        companions: a checkpoint folder whose tokenizer and generation config travel along.
        card: the text of its model card, README.md (see `ema_jax.models.card`).
        dtype: of the tensors; the model's own by default.
        overwrite: replace a checkpoint that is already there.
        max_shard_bytes: start a new safetensors file past this size.

    Raises:
        UserError: the folder exists.
        ValueError: the model has adapters.
    """
    check_output(folder, overwrite)
    if companions is not None:
        folder_links.check(companions)
    shapes, tensors = hf_shapes(model, dtype), hf_tensors(model, dtype)
    # No process looks for the folder after the first one made it.
    distributed.barrier(f"writing {folder}")
    with atomic_path(folder) as temporary:
        if distributed.is_first():
            temporary.mkdir()
            write_weights(temporary, shapes, tensors, max_shard_bytes)
            _write_companions(model, temporary, companions, dtype)
            if card is not None:
                (temporary / "README.md").write_text(card, encoding="utf-8")
        else:
            for _ in tensors:  # gathered from the devices of all processes
                pass


def _write_companions(
    model: Decoder, folder: Path, companions: str | Path | None, dtype: Any = None
) -> None:
    config = dict(model.config.hf)
    config["architectures"] = [FAMILIES[model.config.family].architecture]
    config.pop("torch_dtype", None)  # the old name, with the dtype of the source
    config["dtype"] = jnp.dtype(model.embed[...].dtype if dtype is None else dtype).name
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in _COMPANIONS:
        if companions is not None and (source := Path(companions) / name).exists():
            shutil.copyfile(source, folder / name)
    if not (folder / "generation_config.json").exists():
        tokens = {key: config[key] for key in _SPECIAL_TOKENS if config.get(key) is not None}
        text = json.dumps({"_from_model_config": True, **tokens}, indent=2)
        (folder / "generation_config.json").write_text(text + "\n")


def save_flax(
    model: Decoder,
    folder: str | Path,
    *,
    companions: str | Path | None = None,
    overwrite: bool = False,
    origin: Mapping[str, str | None] | None = None,
) -> None:
    """Writes a Flax checkpoint folder, atomically; from one process.

    It holds `parameters/` (Orbax: the pure dictionary of the model's state), `config.json`, the
    tokenizer's files, and `manifest.json` with a hash over all parameters.

    Args:
        model: without adapters.
        folder: to write.
        companions: a checkpoint folder whose tokenizer and generation config travel along.
        overwrite: replace a checkpoint that is already there.
        origin: noted in the manifest: `{"source": …, "revision": …}`.

    Raises:
        UserError: the folder exists.
        ValueError: the model has adapters.
    """
    check_output(folder, overwrite)
    if companions is not None:
        folder_links.check(companions)
    digest, count = hashlib.sha256(), 0
    for shape, tensor in zip(hf_shapes(model), hf_tensors(model), strict=True):
        digest.update(f"{shape.name} {tensor.dtype.name} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        count += tensor.size
    manifest = {
        **(origin or {}),
        "dtype": model.embed[...].dtype.name,
        "parameters": count,
        "sha256": digest.hexdigest(),
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        orbax_folder.write(temporary, nnx.to_pure_dict(nnx.state(model)), manifest)
        _write_companions(model, temporary, companions)


def origin(folder: str | Path) -> dict[str, str | None]:
    """`source` and `revision` of the checkpoint that a Flax folder was converted from."""
    manifest = orbax_folder.read_manifest(Path(folder))
    return {key: manifest.get(key) for key in ("source", "revision")}


def stored_dtype(folder: str | Path) -> np.dtype:
    """Dtype of a checkpoint's parameters (of several, the narrowest that holds them all)."""
    folder = Path(folder)
    if is_flax_folder(folder):
        return jnp.dtype(orbax_folder.read_manifest(folder)["dtype"])
    return _stored_weights(folder).dtype()


def token_files(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each file that decides the tokens: tokenizer, chat templates, generation config.

    A file that is not there is not named.
    """
    folder = Path(folder)
    templates = sorted(folder.glob("additional_chat_templates/*.jinja"))
    names = [*_COMPANIONS, *(str(path.relative_to(folder)) for path in templates)]
    return {name: sha256_file(folder / name) for name in names if (folder / name).exists()}


def fingerprint(folder: str | Path) -> str:
    """SHA-256 that identifies a checkpoint, with all that decides its tokens, in a moment.

    Over `weights_fingerprint` and `token_files`.
    """
    return sha256_json([weights_fingerprint(folder), token_files(folder)])


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 that identifies a checkpoint's weights without reading all of them.

    Over `config.json`, `tokenizer.json`, and the name, size, header and the first and last MiB of
    the data of every safetensors file or of the GGUF file; for a Flax folder, over the hash in its
    manifest. (Studies made before `fingerprint` covered more recorded this.)
    """
    folder, digest, mib = Path(folder), hashlib.sha256(), 1 << 20
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).exists():
            digest.update(read_bytes(folder / name))
    if is_flax_folder(folder):
        digest.update(orbax_folder.read_manifest(folder)["sha256"].encode())
        return digest.hexdigest()
    stored = _stored_weights(folder)
    for path in stored.files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open_file(path) as file:
            digest.update(file.read(stored.header_size(path) + mib))
            file.seek(max(size - mib, 0))
            digest.update(file.read())
    return digest.hexdigest()
