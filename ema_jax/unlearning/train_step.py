"""The train step: loss, gradient and update as one compiled program of `(setup, state, batch)`.

One program for adapters and for parameters, from one device to a mesh. The reference model is a
number per forget example, computed once, so a step costs what plain fine-tuning costs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt32

from ema_jax.models import lora
from ema_jax.models.decoder import Decoder, LoRAParam
from ema_jax.models.sharding import parameter_shardings
from ema_jax.unlearning.batches import StepBatch
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import (
    LossBatch,
    LossContext,
    Metrics,
    part_places,
    total_loss,
)
from ema_jax.unlearning.optimizers import optimizer
from ema_jax.unlearning.remat import choose_remat

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """Everything that the steps of a run share and none of them changes.

    A pytree: the arrays are arguments of the compiled step, the static fields are its cache key.

    Attributes:
        graph: the model's structure.
        program: the settings that a step is compiled for (`UnlearnConfig.program`).
        mesh: the mesh that the arrays lie on.
        initial: the trained variables as they were before training: all layers, in the base's
            dtype.
        frozen: all other variables.
        traced_settings: the settings that may differ without a new compilation
            (`UnlearnConfig.traced_settings`).
    """

    graph: nnx.GraphDef = dataclasses.field(metadata=_STATIC)
    program: UnlearnConfig = dataclasses.field(metadata=_STATIC)
    mesh: Mesh = dataclasses.field(metadata=_STATIC)
    initial: nnx.State
    frozen: nnx.State
    traced_settings: Mapping[str, Any]  # floats, or traced scalars

    @property
    def config(self) -> UnlearnConfig:
        """The arm's settings, those that are traced included."""
        return dataclasses.replace(self.program, **self.traced_settings)


class TrainState(NamedTuple):
    """Everything that a step changes; all of it is donated."""

    trainable: nnx.State  # float32, of all layers or of `UnlearnConfig.layers`
    opt_state: optax.OptState


def select_trainable(config: UnlearnConfig) -> Any:
    """The filter of the variables that gradients are taken for."""
    kind = LoRAParam if config.trainable == "lora" else nnx.Param
    if config.trainable == "lora" or not (config.layers or config.modules):
        return kind

    def chosen(path: tuple, value: Any) -> bool:
        named = not config.modules or any(module in path for module in config.modules)
        return issubclass(getattr(value, "type", type(value)), kind) and "blocks" in path and named

    return chosen


def prepare(
    base: Decoder, config: UnlearnConfig, seed: int, mesh: Mesh, tokens: int = 0
) -> TrainSetup:
    """The setup of one run, sharing the base's arrays; adapters, where they train, are fresh.

    `tokens` of a forward pass decide what `unlearn.remat = "auto"` keeps (`choose_remat`).
    """
    itemsize = base.embed[...].dtype.itemsize
    choice = choose_remat(base.config, config, tokens, itemsize, mesh)
    logging.info(choice.why)
    config = dataclasses.replace(config, remat=choice.name)
    if config.trainable == "lora":
        model = lora.attach(base, config.lora, jax.random.key(seed))
    else:
        model = nnx.merge(*nnx.split(base))
    graph, *variables = nnx.split(model, select_trainable(config), ...)
    initial, frozen = variables
    return TrainSetup(graph, config.program, mesh, initial, frozen, config.traced_settings)


def init_state(setup: TrainSetup) -> TrainState:
    """The state before the first step: a float32 copy of what is trained, and a fresh optimizer."""
    layers = setup.program.layers

    def cut(x: Array) -> Array:
        chosen = x[slice(layers[0], layers[1] + 1)] if layers else x
        return jnp.array(chosen, jnp.float32, copy=True)

    # The step donates what it trains, and the base must outlive it. It lies as the step returns
    # it: with inputs that lie otherwise, its second call would compile it again.
    trainable = jax.tree.map(cut, setup.initial)
    trainable = jax.device_put(trainable, parameter_shardings(trainable, setup.mesh))
    init = optimizer(setup.config).init
    shardings = parameter_shardings(jax.eval_shape(init, trainable), setup.mesh)
    return TrainState(trainable, jax.jit(init, out_shardings=shardings)(trainable))


def assemble(setup: TrainSetup, trainable: nnx.State) -> Decoder:
    """The model with the trained variables in place, in the base's dtype."""
    layers = setup.program.layers

    def paste(part: Array, initial: Array) -> Array:
        part = part.astype(initial.dtype)
        if not layers:
            return part
        return jax.lax.dynamic_update_slice_in_dim(initial, part, layers[0], axis=0)

    pasted = jax.tree.map(paste, trainable, setup.initial)
    return nnx.merge(setup.graph, pasted, setup.frozen)


def loss_and_gradient(
    setup: TrainSetup, trainable: nnx.State, batch: StepBatch
) -> tuple[nnx.State, Metrics]:
    """Gradient of the weighted sum of losses, and the metrics of the batch."""
    config = setup.config
    parts, forgotten = batch.reference.shape
    places = part_places(batch.rows.examples, forgotten)
    # Means over tokens are over those of the whole batch, whatever part an example is in.
    totals = jnp.maximum(jnp.sum(places, axis=(1, 2, 3)), 1) / parts

    def loss_of(
        trainable: nnx.State, examples: LossBatch, key: jax.Array
    ) -> tuple[Float[Array, ""], Metrics]:
        model = assemble(setup, trainable)

        def base() -> Decoder:
            return lora.detach(nnx.merge(setup.graph, setup.initial, setup.frozen))

        if config.trainable == "lora" and config.lora.dropout:
            model = lora.with_dropout(model, config.lora, key)
        return total_loss(LossContext(model, base, config, examples))

    gradient = jax.grad(loss_of, has_aux=True)
    key = dropout_key(batch.draw)
    examples = LossBatch(
        batch.rows, batch.reference, batch.preferred_reference, jnp.tile(totals, (parts, 1))
    )

    def part(carry: nnx.State, own: tuple[LossBatch, jax.Array]) -> tuple[nnx.State, Metrics]:
        got, metrics = gradient(trainable, *own)
        return jax.tree.map(lambda sum_, x: sum_ + x / parts, carry, got), metrics

    if parts == 1:
        return gradient(trainable, jax.tree.map(lambda x: x[0], examples), key)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    summed, metrics = jax.lax.scan(part, zeros, (examples, jax.random.split(key, parts)))
    return summed, jax.tree.map(jnp.mean, metrics)


def dropout_key(draw: UInt32[Array, "2"]) -> jax.Array:
    """The random key of a step: a pure function of (seed, step), as the batch is."""
    return jax.random.fold_in(jax.random.key(draw[0]), draw[1])


def update(setup: TrainSetup, state: TrainState, batch: StepBatch) -> tuple[TrainState, Metrics]:
    """One optimizer step, independent of sharding; see `train_step`."""
    gradients, metrics = loss_and_gradient(setup, state.trainable, batch)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    rule = optimizer(setup.config)
    updates, opt_state = rule.update(gradients, state.opt_state, state.trainable)
    return TrainState(optax.apply_updates(state.trainable, updates), opt_state), metrics


@functools.partial(jax.jit, donate_argnames="state")
def train_step(
    setup: TrainSetup, state: TrainState, batch: StepBatch
) -> tuple[TrainState, Metrics]:
    """One step of one run.

    Args:
        setup: everything that does not change; its arrays outlive the step.
        state: everything that does; donated.
        batch: examples of the step, and its draw for dropout.

    Returns:
        The next state, laid out as it came in, and the metrics as scalars on the device.
    """
    state, metrics = update(setup, state, batch)
    if setup.mesh.size > 1:
        # As it came in, whatever XLA would choose: then it is donated, and the next call is of the
        # same program.
        state = jax.lax.with_sharding_constraint(state, parameter_shardings(state, setup.mesh))
    return state, metrics
