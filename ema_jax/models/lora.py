"""Low-rank adapters (LoRA, arXiv 2106.09685): attach, merge, and read or write as PEFT."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int
from pydantic import Field, PositiveFloat, PositiveInt

from ema_jax.errors import UserError
from ema_jax.models import peft_config, token_ids
from ema_jax.models.checkpoint import TENSORS
from ema_jax.models.decoder import Decoder, DropoutKey, Linear, LoRAParam
from ema_jax.models.peft_config import ADAPTER_CONFIG, WEIGHTS
from ema_jax.models.sharding import host_array, parameter_spec
from ema_jax.runtime.files import atomic_path, read_tensors, write_tensors

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PEFT_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Shape of the adapters.

    Attributes:
        rank: inner width of the low-rank product.
        alpha: numerator of the product's factor, `alpha / rank`.
        rslora: divide by `√rank` instead.
        targets: the projections that get adapters.
        dropout: share of an adapter's inputs that a training pass sets to zero.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def attach(model: Decoder, config: LoRAConfig, key: jax.Array) -> Decoder:
    """Adds new adapters to every layer; the base's arrays are shared.

    Initialised as by PEFT: `a` uniform in ±1/√in, `b` zero, so that the model is unchanged. Both
    are float32 for every dtype of the base.

    Raises:
        UserError: a target is no projection of the decoder.
    """
    for name in config.targets:
        if name not in TARGETS:
            raise UserError(f"lora.targets: {name!r} is none of {', '.join(TARGETS)}")
    shapes = {name: getattr(model.blocks, name).kernel.shape for name in config.targets}
    # One size for all: drawing takes seconds to compile, and short draws are starts of long ones.
    most = max(layers * size_in for layers, size_in, _ in shapes.values()) * config.rank
    factors = {}
    for place, (name, (layers, size_in, size_out)) in enumerate(shapes.items()):
        drawn = _uniform(key, place, number=len(shapes), size=most)
        a = _cut(drawn, 1 / math.sqrt(size_in), shape=(layers, size_in, config.rank))
        # From NumPy, which has no program to compile for each shape.
        factors[name] = a, jnp.asarray(np.zeros((layers, config.rank, size_out), np.float32))
    return _with_factors(model, factors, config.scale)


@functools.partial(jax.jit, static_argnames=("number", "size"))
def _uniform(
    key: jax.Array, place: Int[Array, ""] | int, *, number: int, size: int
) -> Float[Array, "size"]:
    return jax.random.uniform(jax.random.split(key, number)[place], (size,))


@functools.partial(jax.jit, static_argnames="shape")
def _cut(
    drawn: Float[Array, "size"], bound: Float[Array, ""] | float, *, shape: tuple[int, ...]
) -> Float[Array, "L I R"]:
    """As many numbers as the shape has, in ±bound, in `jax.random.uniform`'s arithmetic."""
    return drawn[: math.prod(shape)].reshape(shape) * (2 * bound) - bound


def _with_factors(
    model: Decoder, factors: Mapping[str, tuple[Array, Array]], scale: float
) -> Decoder:
    """The model with adapters, by target; the base's arrays are shared."""
    model = nnx.merge(*nnx.split(model))
    for name, (a, b) in factors.items():
        linear: Linear = getattr(model.blocks, name)
        kernel = linear.kernel[...]
        linear.lora_a = LoRAParam(_beside(kernel, a, ("blocks", name, "lora_a")))
        linear.lora_b = LoRAParam(_beside(kernel, b, ("blocks", name, "lora_b")))
        linear.lora_scale = scale
    return model


def _beside(kernel: Array, x: Array, path: tuple[str, ...]) -> Array:
    """A parameter on the mesh of a kernel, where training leaves it: elsewhere, programs differ."""
    if isinstance(kernel, jax.core.Tracer) or not isinstance(kernel.sharding, NamedSharding):
        return x
    mesh: Any = kernel.sharding.mesh
    return jax.device_put(x, NamedSharding(mesh, parameter_spec(path, x.shape, mesh)))


def with_dropout(model: Decoder, config: LoRAConfig, key: jax.Array) -> Decoder:
    """The model for one training forward pass, with dropout on the inputs of its adapters."""
    model = nnx.merge(*nnx.split(model))
    for i, name in enumerate(config.targets):
        linear: Linear = getattr(model.blocks, name)
        keys = jax.random.split(jax.random.fold_in(key, i), model.config.num_layers)
        linear.dropout_key, linear.dropout = DropoutKey(keys), config.dropout
    return model


def detach(model: Decoder) -> Decoder:
    """The base without adapters, sharing its arrays."""
    model = nnx.merge(*nnx.split(model))
    for name in TARGETS:
        linear = getattr(model.blocks, name)
        linear.lora_a = linear.lora_b = linear.dropout_key = None
        # As they were before: another constant would make it another program.
        linear.lora_scale = linear.dropout = 0.0
    return model


def scaled(model: Decoder, factor: float) -> Decoder:
    """The model with the change that its adapters make multiplied, sharing its arrays."""
    model = nnx.merge(*nnx.split(model))
    for name in TARGETS:
        getattr(model.blocks, name).lora_scale *= factor
    return model


def merge(model: Decoder) -> Decoder:
    """Adds the adapters to the base's kernels, in float32, and casts them back."""
    merged = detach(model)
    for name in TARGETS:
        source: Linear = getattr(model.blocks, name)
        if source.lora_a is None or source.lora_b is None:
            continue
        factors = source.lora_a[...], source.lora_b[...]
        kernel = source.kernel[...]
        added = _merged(kernel, *factors, scale=source.lora_scale)
        added = _beside(kernel, added, ("blocks", name, "kernel"))
        getattr(merged.blocks, name).kernel = nnx.Param(added)
    return merged


def folded(model: Decoder) -> Decoder:
    """The model as it is best read: in float32 merged, so that every program of the base serves it.

    In bfloat16 it is left as it is: the small changes of adapters would be rounded to the precision
    of the weights.
    """
    adapted = any(getattr(model.blocks, name).lora_a is not None for name in TARGETS)
    return merge(model) if adapted and model.embed[...].dtype == jnp.float32 else model


@functools.partial(jax.jit, static_argnames="scale")
def _merged(
    kernel: Float[Array, "L I O"], a: Float[Array, "L I R"], b: Float[Array, "L R O"], scale: float
) -> Float[Array, "L I O"]:
    """Merges layer by layer: one stack of a 7B model's MLP would be 7.5 GB in float32."""

    def layer(parts: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = parts
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + delta * scale).astype(kernel.dtype)

    return jax.lax.map(layer, (kernel, a, b))


def _module_name(target: str) -> str:
    """Hugging Face name of a projection, with `{l}` for the layer."""
    row = next(row for row in TENSORS if row.path == ("blocks", target, "kernel"))
    return row.hf.removesuffix(".weight")


def save_peft(model: Decoder, folder: str | Path, config: LoRAConfig, base: str) -> None:
    """Writes the adapters as a PEFT folder, atomically.

    Args:
        model: with adapters.
        folder: to write; replaced if it exists.
        config: of the adapters.
        base: the id or path of the base, as PEFT records it.
    """
    tensors: dict[str, np.ndarray] = {}
    for target in config.targets:
        linear: Linear = getattr(model.blocks, target)
        assert linear.lora_a is not None
        assert linear.lora_b is not None
        a, b = host_array(linear.lora_a[...]), host_array(linear.lora_b[...])
        for i in range(a.shape[0]):
            module = _PEFT_PREFIX + _module_name(target).format(l=i)
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[i].T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[i].T)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": list(config.targets),
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        write_tensors(temporary / WEIGHTS, tensors, {"format": "pt"})
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def load_peft(model: Decoder, folder: str | Path) -> Decoder:
    """Attaches the adapters of a PEFT folder; layers that have none get zeros.

    Raises:
        UserError: a file is missing, the adapter is no plain LoRA, a tensor is missing, misshaped
            or unknown to this model, or the folder's tokenizer has ids that the model has no rows
            for. (A wrong prefix would be a silent no-op.)
    """
    folder = Path(folder)
    path = folder / WEIGHTS
    description = peft_config.read(folder)
    tensors, _ = read_tensors(path)
    token_ids.check_folder(folder, model.config.vocab_size)
    modules = {
        _PEFT_PREFIX + _module_name(target).format(l=layer): (target, layer)
        for target in TARGETS
        for layer in range(model.config.num_layers)
    }
    named = {key.partition(".lora_")[0] for key in tensors}
    adapted = [name for name in modules if description.adapts(name, named)]
    if not adapted:
        raise UserError(f"{path}: {next(iter(tensors), 'nothing')} is no projection of this model")
    rank = description.rank
    factors: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
    for module in adapted:
        size_in, size_out = model.config.projections[modules[module][0]]
        factors[modules[module]] = (
            _take(tensors, f"{module}.lora_A.weight", (rank, size_in), path),
            _take(tensors, f"{module}.lora_B.weight", (size_out, rank), path),
        )
    if tensors:
        raise UserError(f"{path}: {next(iter(tensors))} is no projection of this model")
    targets = tuple(t for t in TARGETS if any(target == t for target, _ in factors))
    config = LoRAConfig(rank, description.alpha, description.rslora, targets)
    made: dict[str, tuple[Array, Array]] = {}
    for target in targets:
        size_in, size_out = model.config.projections[target]
        layers = model.config.num_layers
        a = np.zeros((layers, size_in, rank), np.float32)
        b = np.zeros((layers, rank, size_out), np.float32)
        for layer in range(layers):
            if (target, layer) in factors:
                for stack, factor in zip((a, b), factors[target, layer], strict=True):
                    stack[layer] = factor.T
        made[target] = jnp.asarray(a), jnp.asarray(b)
    return _with_factors(model, made, config.scale)


def _take(
    tensors: dict[str, np.ndarray], key: str, shape: tuple[int, int], path: Path
) -> np.ndarray:
    """Takes a tensor out, which has to be there, of this shape and finite."""
    if key not in tensors:
        raise UserError(f"{path}: {key} is missing for this model")
    if tensors[key].shape != shape:
        raise UserError(
            f"{path}: {key} has shape {tensors[key].shape}, this model makes it {shape}"
        )
    if not np.isfinite(tensors[key].astype(np.float32)).all():
        raise UserError(f"{path}: {key} holds NaN or infinity; use an adapter that did not diverge")
    return tensors.pop(key)
