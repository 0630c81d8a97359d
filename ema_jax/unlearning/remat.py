"""What a train step keeps of its forward pass, and what it computes again: chosen by memory.

`projections` keeps the sums of the blocks' projections and what attention mixes; everything between
them is cheap. `full` keeps what enters a block alone and runs it twice; `none` keeps everything,
norms and gates included, which costs three times the memory and gains nothing: writing it takes
longer than computing it again.
"""

from typing import Literal, NamedTuple

from jax.sharding import Mesh

from ema_jax.models.config import DecoderConfig
from ema_jax.runtime.devices import GIB, memory_gib
from ema_jax.unlearning.config import UnlearnConfig

_ROOM = 0.85  # share of the memory that an estimate may fill
_LOGITS_GIB = 2  # of the loss, forwards and backwards


class Remat(NamedTuple):
    """The choice of an arm, and the line that says why."""

    name: Literal["none", "projections", "full"]
    why: str


def choose_remat(
    model: DecoderConfig, arm: UnlearnConfig, tokens: int, itemsize: int, mesh: Mesh
) -> Remat:
    """What to keep under `unlearn.remat = "auto"`: the projections if the memory has room.

    Args:
        model: the architecture.
        arm: what is trained.
        tokens: of a forward pass (a part of a batch, padding included), all devices together.
        itemsize: bytes of a weight.
        mesh: the devices.
    """
    if arm.remat != "auto":
        return Remat(arm.remat, f"remat: {arm.remat}, as unlearn.remat says")
    limit = memory_gib(mesh.devices.flat[0])
    own = tokens / (mesh.shape["data"] * mesh.shape["fsdp"])
    needs = {kind: _gib(model, arm, kind, own, itemsize, mesh) for kind in ("projections", "full")}
    room = needs["projections"] <= _ROOM * limit
    name: Literal["projections", "full"] = "projections" if room else "full"
    why = (
        f"remat: {name}, by an estimate: keeping the projections needs "
        f"{needs['projections']:.1f} GiB, recomputing blocks {needs['full']:.1f}, "
        f"of {limit:.1f} GiB a device"
    )
    return Remat(name, why)


def saved_values(model: DecoderConfig, kind: str) -> int:
    """Numbers that are kept of one token in one block."""
    width = model.hidden_size
    if kind == "full":
        return width
    if kind == "projections":
        attention = model.num_heads * model.head_dim  # what it mixes
        return width + attention + sum(out for _, out in model.projections.values())
    # Fitted to 355 and 320 KB by compilation, Qwen2.5-7B and Mistral-7B in bfloat16.
    return 18 * width + 6 * model.projections["gate_proj"][1]


def _gib(
    model: DecoderConfig, arm: UnlearnConfig, kind: str, tokens: float, itemsize: int, mesh: Mesh
) -> float:
    """Estimate of a step's memory on a device, in GiB."""
    embeddings = model.vocab_size * model.hidden_size
    weights = model.num_layers * model.block_weights + embeddings
    weights += 0 if model.tied_embeddings else embeddings
    # Parameters in training: a float32 copy, its gradient, two moments, and the working copy.
    of_weight = itemsize if arm.trainable == "lora" else 2 * itemsize + 16
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    kept = model.num_layers * saved_values(model, kind) + saved_values(model, "none")
    activations = tokens * kept * itemsize / mesh.shape["tensor"]
    return (weights * of_weight / split + activations) / GIB + _LOGITS_GIB
