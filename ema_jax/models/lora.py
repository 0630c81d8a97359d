"""Low-rank adapters (LoRA, arXiv 2106.09685): attach, merge, and the PEFT format on disk."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from ema_jax.artifacts import atomic_path, read_json
from ema_jax.errors import UserError
from ema_jax.models.checkpoint import TENSORS
from ema_jax.models.decoder import Decoder, Linear, LoRAParam

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PEFT_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """An adapter's shape; `alpha / rank` scales it, or `alpha / √rank` with `rslora`."""

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    targets: Sequence[str] = TARGETS

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def attach(model: Decoder, config: LoRAConfig, key: jax.Array) -> Decoder:
    """The model with fresh adapters on every layer, sharing the base's arrays.

    As PEFT initialises: `a` uniform in ±1/√in, `b` zero, so that the model is unchanged. Both are
    float32 whatever the base is.

    Raises:
        UserError: a target that is no projection of the decoder.
    """
    for name in config.targets:
        if name not in TARGETS:
            raise UserError(f"lora.targets: {name!r} is none of {', '.join(TARGETS)}")
    model = nnx.merge(*nnx.split(model))
    for name, target_key in zip(config.targets, jax.random.split(key, len(config.targets)), strict=True):
        linear: Linear = getattr(model.blocks, name)
        layers, size_in, size_out = linear.kernel.shape
        bound = 1 / math.sqrt(size_in)
        a = jax.random.uniform(target_key, (layers, size_in, config.rank), minval=-bound, maxval=bound)
        linear.lora_a = LoRAParam(a)
        linear.lora_b = LoRAParam(jnp.zeros((layers, config.rank, size_out)))
        linear.lora_scale = config.scale
    return model


def detach(model: Decoder) -> Decoder:
    """The base alone, sharing its arrays: adapters off."""
    model = nnx.merge(*nnx.split(model))
    for name in TARGETS:
        linear = getattr(model.blocks, name)
        linear.lora_a = linear.lora_b = None
    return model


def merge(model: Decoder) -> Decoder:
    """The model with its adapters added into the base's kernels (in float32, then cast back)."""
    merged = detach(model)
    for name in TARGETS:
        source: Linear = getattr(model.blocks, name)
        if source.lora_a is None or source.lora_b is None:
            continue
        delta = jnp.einsum("lir,lro->lio", source.lora_a[...], source.lora_b[...])
        kernel = source.kernel[...]
        total = kernel.astype(jnp.float32) + delta * source.lora_scale
        getattr(merged.blocks, name).kernel = nnx.Param(total.astype(kernel.dtype))
    return merged


def _module_name(target: str) -> str:
    """Hugging Face name of a projection, with {l} for the layer."""
    row = next(row for row in TENSORS if row.path == ("blocks", target, "kernel"))
    return row.hf.removesuffix(".weight")


def save_peft(model: Decoder, folder: str | Path, config: LoRAConfig, base: str) -> None:
    """Writes the adapters as a PEFT folder, whole or not at all.

    Args:
        model: with adapters.
        folder: where to; replaced if it is there.
        config: what the adapters were attached with.
        base: the id or path of the base, as PEFT records it.
    """
    tensors: dict[str, np.ndarray] = {}
    for target in config.targets:
        linear: Linear = getattr(model.blocks, target)
        assert linear.lora_a is not None
        assert linear.lora_b is not None
        a, b = np.asarray(linear.lora_a[...]), np.asarray(linear.lora_b[...])
        for l in range(a.shape[0]):
            module = _PEFT_PREFIX + _module_name(target).format(l=l)
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[l].T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[l].T)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": list(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")


def load_peft(model: Decoder, folder: str | Path) -> Decoder:
    """The model with the adapters of a PEFT folder.

    Raises:
        UserError: a file is missing, or a tensor that this model does not have. (A wrong prefix
            would otherwise be a silent no-op.)
    """
    folder = Path(folder)
    read = read_json(folder / "adapter_config.json")
    config = LoRAConfig(
        rank=read["r"],
        alpha=read["lora_alpha"],
        rslora=bool(read.get("use_rslora")),
        targets=tuple(t for t in TARGETS if t in read["target_modules"]),
    )
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise UserError(f"{path}: no such file")
    tensors = load_file(path)
    model = attach(model, config, jax.random.key(0))
    for target in config.targets:
        linear: Linear = getattr(model.blocks, target)
        for side, name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            keys = [
                f"{_PEFT_PREFIX}{_module_name(target).format(l=l)}.{name}.weight"
                for l in range(model.config.num_layers)
            ]
            absent = [key for key in keys if key not in tensors]
            if absent:
                raise UserError(f"{path}: {absent[0]} is missing for this model")
            stacked = np.stack([tensors.pop(key).T for key in keys])
            if stacked.shape != getattr(linear, side).shape:
                raise UserError(
                    f"{path}: {keys[0]} has shape {stacked.shape[:0:-1]}, which does not fit "
                    "this model"
                )
            setattr(linear, side, LoRAParam(jnp.asarray(stacked, jnp.float32)))
    if tensors:
        raise UserError(f"{path}: {next(iter(tensors))} is no projection of this model")
    return model
