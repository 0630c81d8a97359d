"""What the decoder needs to know of a checkpoint, read from its Hugging Face `config.json`.

A model family is one row of `FAMILIES`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ema_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one family of decoders apart, beyond the numbers in its config."""

    model_type: str
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    row.model_type: row
    for row in (
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True),
        Family("llama", "LlamaForCausalLM"),
    )
}

# Values that `config.json` may leave out, as transformers fills them in.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "rope_theta": 10_000.0, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "rope_theta": 10_000.0},
    "qwen3": {"num_key_value_heads": 32, "rope_theta": 10_000.0, "head_dim": 128},
    "llama": {"rope_theta": 10_000.0},
}

_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of one decoder. Sizes are counts; `hf` keeps the config it was read from."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    rope: Mapping[str, Any] = dataclasses.field(hash=False)
    # Attention window of each layer in tokens; None attends to everything before.
    windows: tuple[int | None, ...]
    max_positions: int
    hf: Mapping[str, Any] = dataclasses.field(repr=False, compare=False, hash=False)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> "DecoderConfig":
        """Reads a parsed `config.json`.

        Args:
            config: the parsed file, of any transformers version (4.x `rope_theta` and
                `rope_scaling`, or 5.x `rope_parameters`).
            where: how error messages name it.

        Raises:
            UserError: an architecture or a feature that the decoder does not have.
        """
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise UserError(
                f"{where}: model_type {model_type!r} is not supported; "
                f"use a checkpoint of one of: {', '.join(FAMILIES)}"
            )
        family = FAMILIES[model_type]
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown")
            raise UserError(
                f"{where}: the weights are quantised ({method}); use the unquantised checkpoint"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: hidden_act {config['hidden_act']!r} is not supported (silu)")
        for flag in ("mlp_bias", "attention_bias"):
            if config.get(flag):
                raise UserError(f"{where}: {flag} = true is not supported")
        values = {**_DEFAULTS[model_type], **config}
        try:
            heads = int(values["num_attention_heads"])
            hidden = int(values["hidden_size"])
            layers = int(values["num_hidden_layers"])
            kv_heads = int(values.get("num_key_value_heads") or heads)
            result = cls(
                family=model_type,
                vocab_size=int(values["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(values["intermediate_size"]),
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=int(values.get("head_dim") or hidden // heads),
                norm_epsilon=float(values.get("rms_norm_eps", 1e-6)),
                qkv_bias=family.qkv_bias,
                qk_norm=family.qk_norm,
                tied_embeddings=bool(values.get("tie_word_embeddings", False)),
                rope=_read_rope(values, where),
                windows=_read_windows(values, layers),
                max_positions=int(values.get("max_position_embeddings", 32768)),
                hf=dict(config),
            )
        except KeyError as error:
            raise UserError(f"{where}: {error.args[0]} is missing") from None
        if heads % kv_heads:
            raise UserError(
                f"{where}: num_attention_heads {heads} is no multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        return result

    @classmethod
    def from_folder(cls, folder: str | Path) -> "DecoderConfig":
        """Reads `config.json` of a checkpoint folder."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; a checkpoint folder has config.json"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        return cls.from_hf(config, where=str(path))


def _read_rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Unites transformers 4's `rope_theta` + `rope_scaling` and 5's `rope_parameters`."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    rope.setdefault("rope_theta", values["rope_theta"])
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    if rope["rope_type"] not in _ROPE_KINDS:
        raise UserError(
            f"{where}: rope scaling {rope['rope_type']!r} is not supported "
            f"({', '.join(_ROPE_KINDS)})"
        )
    return rope


def _read_windows(values: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = values.get("sliding_window")
    if values["model_type"] == "mistral":
        return (window,) * layers
    if not values.get("use_sliding_window") or window is None:
        return (None,) * layers
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 28)
        kinds = ["sliding_attention" if l >= first else "full_attention" for l in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rope_frequencies(config: DecoderConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies of rotary embeddings, float32 `[head_dim / 2]`, and the cos/sin factor.

    Sources: RoFormer (default); position interpolation (linear); the Llama 3.1 model card's
    wavelength-dependent scaling (llama3); YaRN, arXiv 2309.00071 (yarn).
    """
    rope, dim = config.rope, config.head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / dim
    theta = float(rope["rope_theta"])
    inverse = (1.0 / theta**exponent).astype(np.float32)
    kind = rope["rope_type"]
    if kind == "default":
        return inverse, 1.0
    factor = float(rope["factor"])
    if kind == "linear":
        return inverse / np.float32(factor), 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        original = rope["original_max_position_embeddings"]
        wavelength = 2 * math.pi / inverse
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        return ((1 - smooth) * inverse / factor + smooth * inverse).astype(np.float32), 1.0
    original = rope.get("original_max_position_embeddings") or config.max_positions

    def dimension_of(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(rope.get("beta_fast") or 32)
    high = dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    inverse = (inverse / factor) * ramp + inverse * (1 - ramp)

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        weight, weight_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if weight and weight_all:
            attention = magnitude(factor, weight) / magnitude(factor, weight_all)
        else:
            attention = magnitude(factor)
    return inverse.astype(np.float32), float(attention)
