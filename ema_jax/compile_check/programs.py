"""The study's three programs, lowered for given shapes: train step, capture and decode."""

import dataclasses
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ema_jax.concepts import capture
from ema_jax.config import ModelConfig, StudyConfig
from ema_jax.data.batching import bucket
from ema_jax.data.packing import Packed
from ema_jax.errors import UserError
from ema_jax.generation import sampler
from ema_jax.models import checkpoint, hub, lora
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import (
    batch_multiple,
    batch_rows,
    batch_sharding,
    parameter_shardings,
)
from ema_jax.unlearning import train_step as steps
from ema_jax.unlearning.batches import StepBatch
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import FORGET
from ema_jax.unlearning.optimizers import optimizer
from ema_jax.unlearning.remat import choose_remat

_SHAPES = resources.files("ema_jax.models") / "shapes"


def architecture(model: ModelConfig) -> DecoderConfig:
    """Architecture of a model, without its weights and without a network.

    From `config.json` of a folder or of a cached Hub snapshot, or else from the sizes that come
    with the package (`ema_jax/models/shapes`).

    Raises:
        UserError: a Hub id that is neither in the cache nor among those sizes.
    """
    found = hub.cached(model.source, model.revision)
    if found is not None:
        return DecoderConfig.from_folder(found[0])
    file = _SHAPES / f"{model.source.replace('/', '--')}.json"
    if not file.is_file():
        known = sorted(path.name[: -len(".json")].replace("--", "/") for path in _SHAPES.iterdir())
        raise UserError(
            f"{model.source}: not in the local cache, and its sizes are not among those that come "
            f"along ({', '.join(known)}); name a folder with its config.json"
        )
    return DecoderConfig.from_hf(json.loads(file.read_text(encoding="utf-8")), where=file.name)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes of the programs that a study runs.

    Attributes:
        model: the architecture.
        dtype: of its weights.
        arm: the arm that needs most memory, of all arms of the study.
        prompt_tokens: padded length of a rendered prompt.
        train_tokens: padded length of a training example.
        prompt_rows: prompts per batch in capture and decode.
        new_tokens: most tokens of a response.
        poolings: number of poolings in a capture.
    """

    model: DecoderConfig
    dtype: Any
    arm: UnlearnConfig
    prompt_tokens: int
    train_tokens: int
    prompt_rows: int
    new_tokens: int
    poolings: int

    @classmethod
    def of(cls, config: StudyConfig, prompt_tokens: int) -> "Workload":
        """Shapes of a config, for prompts of a given length (which only its data would show)."""
        arms = [config.arm(name) for name in config.arms]
        arm = max(arms, key=lambda a: (a.trainable == "full", a.retain_weight > 0, a.batch_size))
        prompt = bucket(prompt_tokens)
        return cls(
            model=architecture(config.model),
            dtype=jnp.dtype(config.model.dtype or jnp.bfloat16),
            arm=arm,
            prompt_tokens=prompt,
            train_tokens=bucket(prompt + config.harvest.response_cap),
            prompt_rows=config.generation.batch_size or 64,
            new_tokens=config.generation.max_new_tokens,
            poolings=len(config.concepts.poolings),
        )

    @property
    def train_rows(self) -> int:
        """Examples per train step, forget and retain together."""
        return self.arm.batch_size + self.arm.retains * self.arm.retain_batch_size


def resolved(work: Workload, mesh: Mesh) -> Workload:
    """The workload with what its train step keeps under `unlearn.remat = "auto"`."""
    tokens = work.train_rows * work.train_tokens // work.arm.accumulate
    choice = choose_remat(work.model, work.arm, tokens, work.dtype.itemsize, mesh)
    return dataclasses.replace(work, arm=dataclasses.replace(work.arm, remat=choice.name))


def lowered(work: Workload, mesh: Mesh, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Lowers programs by name: `(name, jax.stages.Lowered)` for train, capture or decode."""
    makers = {"train": _train, "capture": _capture, "decode": _decode}
    for name in names:
        yield name, makers[name](work, mesh)


def _train(work: Workload, mesh: Mesh) -> Any:
    arm = work.arm

    def build() -> Decoder:
        base = _zeros(work)
        return lora.attach(base, arm.lora, jax.random.key(0)) if arm.trainable == "lora" else base

    graph, *states = nnx.split(nnx.eval_shape(build), steps.select_trainable(arm), ...)
    initial, frozen = (_placed(state, mesh) for state in states)
    setup = steps.TrainSetup(graph, arm.program, mesh, initial, frozen, arm.traced_settings)
    trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), states[0])
    opt_state = jax.eval_shape(optimizer(arm).init, trained)
    state = steps.TrainState(_placed(trained, mesh), _placed(opt_state, mesh))
    return steps.train_step.lower(setup, state, _step_batch(work, mesh))


def _step_batch(work: Workload, mesh: Mesh) -> StepBatch:
    """Full rows, with room for as many places as a response may have tokens."""
    arm, parts, groups = work.arm, work.arm.accumulate, batch_multiple(mesh)
    preferred = arm.batch_size if FORGET[arm.objective].preferred else 0
    rows = batch_rows((work.train_rows + preferred) // parts, mesh)
    response = work.train_tokens - work.prompt_tokens

    def shape(*sizes: int) -> Any:
        sharding = batch_sharding(mesh, axis=1)
        return jax.ShapeDtypeStruct((parts, *sizes), jnp.int32, sharding=sharding)

    packed = Packed(
        *(shape(rows, work.train_tokens),) * 2, *(shape(groups, rows // groups * response),) * 3
    )
    reference: Any = jax.ShapeDtypeStruct((parts, arm.batch_size // parts), jnp.float32)
    references = (reference, reference if preferred else None)
    draw: Any = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return StepBatch(packed, *references, draw)


def _capture(work: Workload, mesh: Mesh) -> Any:
    rows, tokens = batch_rows(work.prompt_rows, mesh), work.prompt_tokens
    graph, state = nnx.split(nnx.eval_shape(lambda: _zeros(work)))
    return capture._pooled.lower(
        graph,
        _placed(state, mesh),
        _rows((rows, tokens), jnp.int32, mesh),
        _rows((rows, tokens), jnp.bool, mesh),
        _rows((rows, work.poolings, tokens), jnp.float32, mesh),
        branches=False,
    )


def _decode(work: Workload, mesh: Mesh) -> Any:
    rows, slots = batch_rows(work.prompt_rows, mesh), work.prompt_tokens + work.new_tokens
    graph, state = nnx.split(nnx.eval_shape(lambda: _zeros(work)))
    empty = jax.eval_shape(
        lambda: sampler._Slots.empty(
            work.model, rows, slots, work.new_tokens, work.dtype, seen=False
        )
    )

    def decode(state: nnx.State, slots: Any, few: jax.Array, eos_ids: jax.Array) -> Any:
        # As one program, so that the weights count twice: stacked, and layer by layer.
        layers = sampler._layers(graph, state)
        fixed = {"sampling": sampler.GREEDY, "mesh": mesh}
        return sampler._advance(graph, state, layers, slots, few, eos_ids, **fixed)

    return jax.jit(decode, donate_argnames="slots").lower(
        _placed(state, mesh),
        _shaped(empty, empty.shardings(mesh)),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P())),
        jax.ShapeDtypeStruct((2,), jnp.int32, sharding=NamedSharding(mesh, P())),
    )


def _zeros(work: Workload) -> Decoder:
    """The base model in its dtype, for tracing alone."""
    abstract = checkpoint.abstract_decoder(work.model)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, work.dtype), abstract)


def _placed(state: Any, mesh: Mesh) -> Any:
    """Shapes of parameters, with the shardings that the study gives them."""
    return _shaped(state, parameter_shardings(state, mesh))


def _shaped(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
