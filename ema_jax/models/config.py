"""Architecture of a decoder, read from a Hugging Face `config.json`.

A model family is one row of `FAMILIES`.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ema_jax.errors import UserError
from ema_jax.runtime.files import read_json
from ema_jax.runtime.opening import other_spelling


@dataclasses.dataclass(frozen=True)
class Family:
    """Features of one family of decoders that its `config.json` does not state."""

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

# Defaults of transformers for values that `config.json` may omit.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32_768},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_position_embeddings": 32_768,
    },
    "llama": {"max_position_embeddings": 2048},
}
_DEFAULT_THETA = 10_000.0

# Guards against mistyped sizes, which would run out of memory before any other check.
_LARGEST = {"num_hidden_layers": 1024}
_LARGEST_SIZE = 1 << 27

# Required parameters of each kind of rotary scaling, besides `rope_theta`.
_ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_ROPE_OPTIONS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of one decoder. Sizes are counts; `hf` is the config that it was read from."""

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

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """A block's linear layers, by PEFT's names: `(input size, output size)`."""
        width, mlp = self.hidden_size, self.intermediate_size
        attention, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (width, attention),
            "k_proj": (width, kv),
            "v_proj": (width, kv),
            "o_proj": (attention, width),
            "gate_proj": (width, mlp),
            "up_proj": (width, mlp),
            "down_proj": (mlp, width),
        }

    @property
    def block_weights(self) -> int:
        """Entries in one block's matrices."""
        return sum(math.prod(size) for size in self.projections.values())

    @property
    def matrix_weights(self) -> int:
        """Weights that each token is multiplied with: all matrices but the embedding table."""
        return self.num_layers * self.block_weights + self.hidden_size * self.vocab_size

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> "DecoderConfig":
        """Reads a parsed `config.json`.

        Args:
            config: the parsed file, of any transformers version (4.x `rope_theta` and
                `rope_scaling`, or 5.x `rope_parameters`).
            where: its name in error messages.

        Raises:
            UserError: an unsupported architecture or feature, or a missing or impossible value.
        """
        if not isinstance(config, Mapping):
            raise UserError(f"{where}: not a JSON object")
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UserError(
                f"{where}: model_type {model_type!r:.80} is not supported; "
                f"use a checkpoint of one of: {', '.join(FAMILIES)}"
            )
        family = FAMILIES[model_type]
        _refuse_unsupported(config, family, where)
        values = {**_DEFAULTS[model_type], **config}
        hidden, heads, layers = (
            _size(values, key, where)
            for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        kv_heads = heads
        if values.get("num_key_value_heads") is not None:
            kv_heads = _size(values, "num_key_value_heads", where)
        if heads % kv_heads:
            raise UserError(
                f"{where}: num_attention_heads {heads} is no multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        if values.get("head_dim") is not None:
            head_dim = _size(values, "head_dim", where)
        elif hidden % heads:
            raise UserError(
                f"{where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}, "
                "and there is no head_dim"
            )
        else:
            head_dim = hidden // heads
        if head_dim % 2:
            raise UserError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need pairs")
        max_positions = _size(values, "max_position_embeddings", where)
        result = cls(
            family=model_type,
            vocab_size=_size(values, "vocab_size", where),
            hidden_size=hidden,
            intermediate_size=_size(values, "intermediate_size", where),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_epsilon=_number(values.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            tied_embeddings=bool(values.get("tie_word_embeddings", False)),
            rope=_read_rope(values, max_positions, where),
            windows=_read_windows(values, layers, where),
            max_positions=max_positions,
            hf=dict(config),
        )
        _check_rope(result, where)
        return result

    @classmethod
    def from_folder(cls, folder: str | Path) -> "DecoderConfig":
        """Reads `config.json` of a checkpoint folder."""
        path = Path(folder) / "config.json"
        if not os.path.lexists(path):
            adapter = path.with_name("adapter_config.json")
            if adapter.exists():
                raise UserError(
                    f"{path.parent}: an adapter ({adapter.name}) and no model; name the model that "
                    "it was trained on, or merge the two (PEFT: merge_and_unload)"
                )
            raise UserError(
                f"{path}: no such file{other_spelling(path)}; a checkpoint folder has config.json"
            )
        return cls.from_hf(read_json(path), where=str(path))


def _refuse_unsupported(config: Mapping[str, Any], family: Family, where: str) -> None:
    named = config.get("architectures")
    if named and family.architecture not in (named if isinstance(named, list) else [named]):
        raise UserError(
            f"{where}: architectures is {named!r:.80}, and a causal language model is needed "
            f"({family.architecture})"
        )
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise UserError(
            f"{where}: the weights are quantised ({method or 'unknown method'}); "
            "use the unquantised checkpoint"
        )
    if (config.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act {config['hidden_act']!r:.80} is not supported (silu)")
    for flag in ("mlp_bias", "attention_bias"):
        if config.get(flag):
            raise UserError(f"{where}: {flag} = true is not supported")
    for key in ("num_experts", "num_local_experts"):
        if config.get(key):
            raise UserError(f"{where}: {key}: mixtures of experts are not supported")


def _size(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values.get(key)
    if value is None:
        raise UserError(f"{where}: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} is {value!r:.80}, expected a positive whole number")
    if value > _LARGEST.get(key, _LARGEST_SIZE):
        raise UserError(f"{where}: {key} is {value}, larger than any model's")
    return value


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} is {value!r:.80}, expected a positive number")
    return float(value)


def _read_rope(values: Mapping[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    """Reads transformers 4's `rope_theta` and `rope_scaling`, or 5's `rope_parameters`."""
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: rope_scaling is {found!r:.80}, expected an object")
    if any(isinstance(v, Mapping) for v in found.values()):
        raise UserError(f"{where}: rotary parameters that differ by layer are not supported")
    rope = dict(found)
    old_kind = rope.pop("type", None)
    kind = rope.get("rope_type") or old_kind or "default"
    if not isinstance(kind, str) or kind not in _ROPE_KINDS:
        raise UserError(
            f"{where}: rope scaling {kind!r:.80} is not supported ({', '.join(_ROPE_KINDS)})"
        )
    rope["rope_type"] = kind
    rope["rope_theta"] = rope.get("rope_theta") or values.get("rope_theta") or _DEFAULT_THETA
    for key in ("rope_theta", *_ROPE_KINDS[kind]):
        if key not in rope:
            raise UserError(f"{where}: rope scaling {kind!r:.80} needs {key}")
        _number(rope[key], key, where)
    rotated = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    if rotated != 1.0:
        raise UserError(f"{where}: partial_rotary_factor {rotated} is not supported (1.0)")
    for key in _ROPE_OPTIONS:
        if rope.get(key) is not None:
            _number(rope[key], key, where)
    original = "original_max_position_embeddings"
    rope[original] = values.get(original) or rope.get(original) or max_positions
    _number(rope[original], original, where)
    return rope


def _check_rope(config: DecoderConfig, where: str) -> None:
    """Refuses parameters that are possible one by one but give no finite angles together."""
    try:
        with np.errstate(all="raise", under="ignore"):
            frequencies, factor = rope_frequencies(config)
        possible = np.isfinite(frequencies).all() and math.isfinite(factor)
    except (ArithmeticError, ValueError):
        possible = False
    if not possible:
        raise UserError(f"{where}: no rotary embedding follows from {dict(config.rope)}")


def _read_windows(values: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    family = values["model_type"]
    sliding = family == "mistral" or (
        family in ("qwen2", "qwen3") and values.get("use_sliding_window")
    )
    if not sliding or values.get("sliding_window") is None:
        return (None,) * layers
    window = _size(values, "sliding_window", where)
    if family == "mistral":
        return (window,) * layers
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 28)
        if not isinstance(first, int) or first < 0:
            raise UserError(f"{where}: max_window_layers is {first!r:.80}, expected a whole number")
        kinds = ["full_attention"] * min(first, layers)
        kinds += ["sliding_attention"] * (layers - len(kinds))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise UserError(
            f"{where}: layer_types has to name full_attention or sliding_attention for each of "
            f"the {layers} layers"
        )
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
    factor, original = float(rope["factor"]), rope["original_max_position_embeddings"]
    if kind == "linear":
        return inverse / np.float32(factor), 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength = 2 * math.pi / inverse
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        return ((1 - smooth) * inverse / factor + smooth * inverse).astype(np.float32), 1.0

    def dimension_of(rotations: float) -> float:
        """The dimension that makes `rotations` turns over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(rope.get("beta_fast") or 32)
    high = dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
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
