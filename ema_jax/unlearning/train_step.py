"""The train step: loss, gradient, update, as one compiled program.

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
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ema_jax.data.chat import Batch
from ema_jax.models import lora as lora_lib
from ema_jax.models.decoder import Decoder, LoRAParam
from ema_jax.models.sharding import parameter_shardings
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import ForgetBatch, Metrics, Pass, RetainBatch, total_loss
from ema_jax.unlearning.optimizers import optimizer


def select_trainable(config: UnlearnConfig) -> Any:
    """The filter of the variables that gradients are taken for."""
    kind = LoRAParam if config.trainable == "lora" else nnx.Param
    if config.trainable == "lora" or not (config.layers or config.modules):
        return kind

    def chosen(path: tuple, value: Any) -> bool:
        named = not config.modules or any(module in path for module in config.modules)
        return issubclass(getattr(value, "type", type(value)), kind) and "blocks" in path and named

    return chosen


class Trainee(NamedTuple):
    """A model in three parts. What is trained is a float32 copy of `whole`, or of some layers."""

    graph: nnx.GraphDef
    whole: nnx.State  # the variables that are trained, as they were at first
    frozen: nnx.State


def split(base: Decoder, config: UnlearnConfig, seed: int) -> Trainee:
    """The model to train, sharing the base's arrays; with fresh adapters where these train."""
    if config.trainable == "lora":
        model = lora_lib.attach(base, config.lora, jax.random.key(seed))
    else:
        model = nnx.merge(*nnx.split(base))
    return Trainee(*nnx.split(model, select_trainable(config), ...))


def trainable_part(trainee: Trainee, config: UnlearnConfig, mesh: Mesh) -> nnx.State:
    """A float32 copy of what is to be trained, laid out as the step gives it back."""

    def cut(x: Array) -> Array:
        layers = x[slice(config.layers[0], config.layers[1] + 1)] if config.layers else x
        return jnp.array(layers, jnp.float32, copy=True)

    # The step donates what it trains, and the base must outlive it. It lies as the step gives it
    # back: with inputs that lie otherwise, its second call would compile it again.
    trainable = jax.tree.map(cut, trainee.whole)
    return jax.device_put(trainable, parameter_shardings(trainable, mesh))


def assemble(trainee: Trainee, config: UnlearnConfig, trainable: nnx.State) -> Decoder:
    """The model with what is trained in its place, in the base's dtype."""

    def paste(part: Array, whole: Array) -> Array:
        part = part.astype(whole.dtype)
        if not config.layers:
            return part
        return jax.lax.dynamic_update_slice_in_dim(whole, part, config.layers[0], axis=0)

    pasted = jax.tree.map(paste, trainable, trainee.whole)
    return nnx.merge(trainee.graph, pasted, trainee.frozen)


def init_moments(config: UnlearnConfig, trainable: nnx.State, mesh: Mesh) -> optax.OptState:
    """The optimizer's first state, laid out like the parameters it belongs to."""
    init = optimizer(config).init
    shardings = parameter_shardings(jax.eval_shape(init, trainable), mesh)
    return jax.jit(init, out_shardings=shardings)(trainable)


def loss_and_gradient(
    trainee: Trainee,
    config: UnlearnConfig,
    trainable: nnx.State,
    forget: ForgetBatch,
    retain: RetainBatch | None,
    key: jax.Array,
) -> tuple[nnx.State, Metrics]:
    """Gradient of the weighted sum, and the figures of it."""

    def loss_of(
        trainable: nnx.State, forget: ForgetBatch, retain: RetainBatch | None, key: jax.Array
    ) -> tuple[Float[Array, ""], Metrics]:
        model = assemble(trainee, config, trainable)

        def base() -> Decoder:
            untouched = nnx.merge(trainee.graph, trainee.whole, trainee.frozen)
            return lora_lib.detach(untouched)

        if config.trainable == "lora" and config.lora.dropout:
            model = lora_lib.with_dropout(model, config.lora, key)
        return total_loss(Pass(model, base, config), forget, retain)

    gradient = jax.grad(loss_of, has_aux=True)
    parts = config.accumulate
    if parts == 1:
        return gradient(trainable, forget, retain, key)

    # Means over tokens are over those of the whole batch, whatever part a row is in.
    total, preferred_total = _average(forget.batch, parts), _average(forget.preferred, parts)
    retain_total = _average(retain.batch if retain else None, parts)

    def part(carry: nnx.State, rows: tuple) -> tuple[nnx.State, Metrics]:
        forget, retain, key = rows
        forget = forget._replace(total=total, preferred_total=preferred_total)
        retain = retain._replace(total=retain_total) if retain else None
        got, metrics = gradient(trainable, forget, retain, key)
        return jax.tree.map(lambda sum_, x: sum_ + x / parts, carry, got), metrics

    def in_parts(x: Array) -> Array:  # each part has rows from all over the mesh
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    rows = (*jax.tree.map(in_parts, (forget, retain)), jax.random.split(key, parts))
    summed, metrics = jax.lax.scan(part, jax.tree.map(jnp.zeros_like, trainable), rows)
    return summed, jax.tree.map(jnp.mean, metrics)


def _average(batch: Batch | None, parts: int) -> Array | None:
    """Response tokens a part."""
    if batch is None:
        return None
    return jnp.maximum(jnp.sum(batch.response[:, 1:]) / parts, 1 / parts)


def dropout_key(draw: Int[Array, "2"]) -> jax.Array:
    """The random key of a step: a pure function of (seed, step), as the batch is."""
    return jax.random.fold_in(jax.random.key(draw[0]), draw[1])


def update(
    graph: nnx.GraphDef,
    program: UnlearnConfig,
    numbers: Mapping[str, Any],  # floats or traced scalars, by field
    trainable: nnx.State,
    whole: nnx.State,
    frozen: nnx.State,
    moments: optax.OptState,
    forget: ForgetBatch,
    retain: RetainBatch | None,
    draw: Int[Array, "2"],
) -> tuple[nnx.State, optax.OptState, Metrics]:
    """What a step does, wherever its arrays lie; see `train_step`."""
    config = dataclasses.replace(program, **numbers)
    gradients, metrics = loss_and_gradient(
        Trainee(graph, whole, frozen), config, trainable, forget, retain, dropout_key(draw)
    )
    metrics["gradient_norm"] = optax.global_norm(gradients)
    updates, moments = optimizer(config).update(gradients, moments, trainable)
    return optax.apply_updates(trainable, updates), moments, metrics


@functools.partial(
    jax.jit,
    static_argnames=("graph", "program", "mesh"),
    donate_argnames=("trainable", "moments"),
)
def train_step(
    graph: nnx.GraphDef,
    program: UnlearnConfig,
    mesh: Mesh,
    numbers: Mapping[str, float],
    trainable: nnx.State,
    whole: nnx.State,
    frozen: nnx.State,
    moments: optax.OptState,
    forget: ForgetBatch,
    retain: RetainBatch | None,
    draw: Int[Array, "2"],
) -> tuple[nnx.State, optax.OptState, Metrics]:
    """One step of one run.

    Args:
        graph: of the model, as `split` gave it.
        program: the arm's `program`.
        mesh: what the arrays lie on.
        numbers: the arm's `numbers`, which may change from call to call.
        trainable: what is trained; donated.
        whole: see `Trainee`.
        frozen: see `Trainee`.
        moments: the optimizer's state; donated.
        forget: forget examples.
        retain: retain examples.
        draw: (seed, step), from which dropout is drawn.
    """
    *trained, metrics = update(
        graph, program, numbers, trainable, whole, frozen, moments, forget, retain, draw
    )
    if mesh.size > 1:
        # As they came in, whatever XLA would choose: then they are donated, and the next call is
        # of the same program.
        shardings = parameter_shardings(trained, mesh)
        trained = jax.lax.with_sharding_constraint(trained, shardings)
    return *trained, metrics
