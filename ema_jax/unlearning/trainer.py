"""Unlearn, the paper's second phase: NPO on the forget set, with or without a retain set.

One train step for adapters and for full fine-tuning. The reference model is a number per forget
example, computed once, so a step costs what plain fine-tuning costs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ema_jax.data.chat import Batch, TokenExample, bucket, pad_examples
from ema_jax.errors import RunStoppedError
from ema_jax.models import lora as lora_lib
from ema_jax.models.decoder import Decoder, LoRAParam
from ema_jax.models.sharding import (
    batch_rows,
    host_array,
    make_mesh,
    parameter_shardings,
    place_batch,
)
from ema_jax.progress import Progress
from ema_jax.unlearning.objectives import (
    cross_entropy,
    npo_loss,
    sequence_log_probs,
    token_log_probs,
)


@dataclasses.dataclass(frozen=True)
class UnlearnConfig:
    """One arm: what is trained, on what loss, and when it stops.

    Attributes:
        trainable: `lora` (adapters) or `full` (all parameters).
        lora: the adapters' shape.
        beta: NPO's inverse temperature.
        forget_weight: of the NPO loss.
        retain_weight: of the cross-entropy on the retain set; 0 leaves the retain set out.
        learning_rate: peak, after `warmup_steps` linear steps, constant from there.
        warmup_steps: see above.
        clip_norm: largest global gradient norm.
        batch_size: forget examples a step.
        retain_batch_size: retain examples a step.
        max_steps: the limit.
        min_steps: no stopping before: the retain set needs time to mend what the first steps
            break.
        eval_every: steps between evaluations on the dev split.
        stop_at: the target's dev refusal rate at which training stops.
        max_invalid: share of invalid dev responses, in the worst domain, past which an arm
            without retain data stops as collapsed and one with it is not done.
        remat: recompute blocks in the backward pass, for large models.
    """

    trainable: str = "lora"
    lora: lora_lib.LoRAConfig = lora_lib.LoRAConfig()
    beta: float = 0.1
    forget_weight: float = 1.0
    retain_weight: float = 0.0
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    clip_norm: float = 1.0
    batch_size: int = 16
    retain_batch_size: int = 32
    max_steps: int = 200
    min_steps: int = 0
    eval_every: int = 10
    stop_at: float = 0.1
    max_invalid: float = 0.2
    remat: bool = False


class Evaluation(NamedTuple):
    """Dev rates of the model being trained."""

    refusal: Mapping[str, float]  # NaN where no response is valid
    invalid_rate: float  # of the domain where it is highest


class Trained(NamedTuple):
    """The outcome of a run."""

    model: Decoder
    steps: int
    stopped: str  # "target" or "limit"
    first_loss: float
    trajectory: list[dict[str, Any]]


class _ForgetBatch(NamedTuple):
    batch: Batch
    reference: Float[Array, "B"]


def select_trainable(config: UnlearnConfig) -> type[nnx.Param]:
    """The variable type that gradients are taken for."""
    return LoRAParam if config.trainable == "lora" else nnx.Param


@functools.partial(
    jax.jit,
    static_argnames=("graph", "optimizer", "config"),
    donate_argnames=("trainable", "moments"),
)
def _train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: UnlearnConfig,
    trainable: nnx.State,
    frozen: nnx.State,
    moments: optax.OptState,
    forget: _ForgetBatch,
    retain: Batch | None,
) -> tuple[nnx.State, optax.OptState, dict[str, Float[Array, ""]]]:
    def loss_of(trainable: nnx.State) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        model = nnx.merge(graph, trainable, frozen)
        batch = forget.batch
        log_probs = token_log_probs(model, batch.tokens, batch.mask, remat=config.remat)
        sums = sequence_log_probs(log_probs, batch.response)
        forget_loss = npo_loss(sums, forget.reference, config.beta)
        metrics = {"forget_loss": forget_loss, "log_ratio": jnp.mean(sums - forget.reference)}
        loss = config.forget_weight * forget_loss
        if retain is not None:
            kept = token_log_probs(model, retain.tokens, retain.mask, remat=config.remat)
            metrics["retain_loss"] = cross_entropy(kept, retain.response)
            loss += config.retain_weight * metrics["retain_loss"]
        return loss, metrics | {"loss": loss}

    gradients, metrics = jax.grad(loss_of, has_aux=True)(trainable)
    metrics["gradient_norm"] = optax.global_norm(gradients)
    updates, moments = optimizer.update(gradients, moments, trainable)
    return optax.apply_updates(trainable, updates), moments, metrics


@functools.partial(jax.jit, static_argnames=("graph",))
def _sequence_log_probs(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> Float[Array, "B"]:
    model = nnx.merge(graph, state)
    log_probs = token_log_probs(model, batch.tokens, batch.mask)
    return sequence_log_probs(log_probs, batch.response)


def reference_log_probs(
    model: Decoder, examples: Sequence[TokenExample], batch_size: int, mesh: Mesh | None = None
) -> Float[np.ndarray, "N"]:
    """log π_ref of every response, summed over its tokens: the reference model as numbers."""
    mesh = make_mesh() if mesh is None else mesh
    graph, state = nnx.split(lora_lib.detach(model))
    length = _padded_length(examples)
    rows = batch_rows(batch_size, mesh)
    parts = []
    for start in range(0, len(examples), rows):
        chunk = examples[start : start + rows]
        batch = place_batch(pad_examples(chunk, length, rows, 0), mesh)
        parts.append(host_array(_sequence_log_probs(graph, state, batch))[: len(chunk)])
    return np.concatenate(parts)


def batch_indices(size: int, rows: int, seed: int, step: int) -> np.ndarray:
    """Which examples step `step` takes: a pure function of seed and step.

    Epochs are permutations; a batch may span two of them.
    """
    flat = np.arange(step * rows, (step + 1) * rows)
    epochs, places = flat // size, flat % size
    chosen = np.empty(rows, int)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(size)
        here = epochs == epoch
        chosen[here] = order[places[here]]
    return chosen


@functools.cache
def _optimizer(config: UnlearnConfig) -> optax.GradientTransformation:
    schedule = optax.warmup_constant_schedule(
        0.0 if config.warmup_steps else config.learning_rate,
        config.learning_rate,
        config.warmup_steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm), optax.adamw(schedule, weight_decay=0.0)
    )


def unlearn(
    base: Decoder,
    forget: Sequence[TokenExample],
    retain: Sequence[TokenExample],
    reference: Float[np.ndarray, "N"],
    config: UnlearnConfig,
    *,
    seed: int,
    target: str,
    evaluate: Callable[[Decoder], Evaluation],
    mesh: Mesh | None = None,
    log: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> Trained:
    """Trains one arm from the base until the target's dev refusal is low or the steps run out.

    Args:
        base: the untouched model; its arrays are shared, not copied, under adapters.
        forget: refusals of the target domain.
        retain: what must not change; unused where `config.retain_weight` is 0.
        reference: log π_ref of the forget responses (`reference_log_probs`).
        config: the arm.
        seed: of adapters and batches.
        target: the domain whose dev refusal decides when to stop.
        evaluate: dev rates of a model.
        mesh: what the base lies on.
        log: gets one row of metrics a step.

    Raises:
        RunStoppedError: the loss or the gradient is not finite.
    """
    mesh = make_mesh() if mesh is None else mesh
    if config.trainable == "lora":
        model = lora_lib.attach(base, config.lora, jax.random.key(seed))
    else:
        model = nnx.merge(*nnx.split(base))
    graph, *states = nnx.split(model, select_trainable(config), ...)
    trainable, frozen = states
    # The step donates what it trains, and the base must outlive it. Both lie as the step gives
    # them back: with inputs that lie otherwise, its second call would compile it again.
    trainable = jax.tree.map(jnp.copy, trainable)
    trainable = jax.device_put(trainable, parameter_shardings(trainable, mesh))
    optimizer = _optimizer(config)
    shardings = parameter_shardings(jax.eval_shape(optimizer.init, trainable), mesh)
    moments = jax.jit(optimizer.init, out_shardings=shardings)(trainable)
    batches = _batches(forget, retain, reference, config, seed, mesh)

    def current() -> Decoder:
        return nnx.merge(graph, trainable, frozen)

    trajectory: list[dict[str, Any]] = []
    first_loss, stopped, step = math.nan, "limit", 0

    def measure(metrics: Mapping[str, float]) -> Evaluation:
        rates = evaluate(current())
        refusal = {d: None if math.isnan(rate) else rate for d, rate in rates.refusal.items()}
        point = {"step": step, "refusal": refusal, "invalid_rate": rates.invalid_rate}
        trajectory.append(point | dict(metrics))
        return rates

    rates = measure({})
    with Progress(f"unlearn seed {seed}", config.max_steps, "steps") as progress:
        while step < config.max_steps:
            trainable, moments, raw = _train_step(
                graph, optimizer, config, trainable, frozen, moments, *next(batches)
            )
            metrics = {name: float(host_array(value)) for name, value in raw.items()}
            step += 1
            if step == 1:
                first_loss = metrics["forget_loss"]
            log({"step": step, **metrics})
            progress.update(loss=metrics["loss"], target=rates.refusal[target])
            bad = [name for name, value in metrics.items() if not math.isfinite(value)]
            if bad:
                raise RunStoppedError(
                    f"unlearn: {bad[0]} is {metrics[bad[0]]} at step {step}; "
                    "lower unlearn.learning_rate"
                )
            if step % config.eval_every == 0 or step == config.max_steps:
                rates = measure(metrics)
                if step < config.min_steps:
                    continue
                if rates.invalid_rate > config.max_invalid:
                    if config.retain_weight:  # which mends garble, given time
                        continue
                    logging.warning(
                        "step %d: %.0f %% of a domain's dev responses are invalid, stopping",
                        step,
                        100 * rates.invalid_rate,
                    )
                    stopped = "invalid"
                    break
                if rates.refusal[target] <= config.stop_at:
                    stopped = "target"
                    break
    return Trained(current(), step, stopped, first_loss, trajectory)


def _batches(
    forget: Sequence[TokenExample],
    retain: Sequence[TokenExample],
    reference: np.ndarray,
    config: UnlearnConfig,
    seed: int,
    mesh: Mesh,
) -> Iterator[tuple[_ForgetBatch, Batch | None]]:
    rows = batch_rows(config.batch_size, mesh)
    retain_rows = batch_rows(config.retain_batch_size, mesh)
    length = _padded_length(forget)
    retain_length = _padded_length(retain) if retain else 0
    step = 0
    while True:
        chosen = batch_indices(len(forget), rows, seed, step)
        batch = pad_examples([forget[i] for i in chosen], length, rows, 0)
        placed = place_batch(_ForgetBatch(batch, reference[chosen]), mesh)
        kept = None
        if config.retain_weight and retain:
            chosen = batch_indices(len(retain), retain_rows, seed + 1, step)
            kept = pad_examples([retain[i] for i in chosen], retain_length, retain_rows, 0)
            kept = place_batch(kept, mesh)
        yield placed, kept
        step += 1


def _padded_length(examples: Sequence[TokenExample]) -> int:
    return bucket(max(len(item.prompt) + len(item.response) for item in examples))
