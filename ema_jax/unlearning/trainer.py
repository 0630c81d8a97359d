"""Unlearn, the paper's second phase: any objective on the forget set, with or without a retain set.

The loop around the train step: batches, evaluation, when to stop, checkpoints, figures.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float

from ema_jax.data.chat import TokenExample
from ema_jax.errors import UserError
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import host_array, make_mesh, place_batch, validate
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.runtime.devices import find_accelerator, peak_memory_gib
from ema_jax.runtime.progress import Progress
from ema_jax.unlearning.batches import Data, batch_indices
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.metrics import Profile
from ema_jax.unlearning.objectives import FORGET
from ema_jax.unlearning.run_checkpoints import Checkpoints, NonFiniteError, stop_requested
from ema_jax.unlearning.throughput import flops_per_token
from ema_jax.unlearning.train_step import (
    assemble,
    init_moments,
    reference_log_probs,
    response_log_probs,
    select_trainable,
    split,
    train_step,
    trainable_part,
)

__all__ = [
    "Evaluation",
    "Trained",
    "UnlearnConfig",
    "batch_indices",
    "reference_log_probs",
    "select_trainable",
    "unlearn",
]

# Forget examples and leading positions whose log-ratio is followed: NPO's drop hides in the first
# tokens of a refusal, where the sum does not show it.
PROBED, POSITIONS = 32, 16


class Trained(NamedTuple):
    """The outcome of a run."""

    model: Decoder
    steps: int
    stopped: str  # "target", "invalid" or "limit"
    first_loss: float
    trajectory: list[dict[str, Any]]


class Course:
    """How one run goes: what was measured so far, and whether it is over."""

    def __init__(self, config: UnlearnConfig, target: str, base: Decoder, data: Data, mesh: Mesh):
        self.config, self.target = config, target
        self.trajectory: list[dict[str, Any]] = []
        self.first_loss, self.stopped = math.nan, ""
        self._data, self._mesh = data.forget[:PROBED], mesh
        self._kept = response_log_probs(base, self._data, POSITIONS, mesh)

    def measure(self, step: int, model: Decoder, rates: Evaluation, metrics: Mapping) -> None:
        """Adds a point to the trajectory and decides whether the run is over."""
        now = response_log_probs(model, self._data, POSITIONS, self._mesh)
        ratios = now - self._kept
        known = ~np.isnan(ratios)
        means = np.sum(np.where(known, ratios, 0), axis=0) / np.maximum(known.sum(axis=0), 1)
        point = rates.point(step)
        point["log_ratio_by_position"] = means[known.any(axis=0)].tolist()
        self.trajectory.append(point | dict(metrics))
        if step:
            self.stopped = self._verdict(step, rates)

    def _verdict(self, step: int, rates: Evaluation) -> str:
        """Whether the run is over: the target is no longer refused, and it is answered."""
        config = self.config
        if step >= config.min_steps:
            rate = rates.refusal[self.target]  # NaN where no response is valid
            damaged = rates.degenerate_rate > config.max_invalid
            damaged |= not rate > config.stop_at and (
                rates.unanswered(self.target) > config.max_invalid
            )
            if rate <= config.stop_at and not damaged:
                return "target"
            if damaged and not config.retains:  # retain data repairs it, given time
                logging.warning(
                    "step %d: %.0f %% of a domain's dev responses are degenerate, %.0f %% of the "
                    "target's are neither refusals nor answers; stopping",
                    step,
                    100 * rates.degenerate_rate,
                    100 * rates.unanswered(self.target),
                )
                return "invalid"
        return "limit" if step >= config.max_steps else ""

    def due(self, step: int) -> bool:
        """Whether the model is evaluated after this step."""
        return step % self.config.eval_every == 0 or step == self.config.max_steps

    def notes(self) -> dict[str, float]:
        """Rates to show beside the progress: of the target, and the mean of the others.

        `answered`: the share of the target's responses that are answers to their prompts.
        """
        point = self.trajectory[-1]
        rates = {d: r for d, r in point["refusal"].items() if r is not None}
        others = [rate for domain, rate in rates.items() if domain != self.target]
        shown = {"target": rates[self.target]} if self.target in rates else {}
        if self.target in point.get("shares", {}):
            shown["answered"] = point["shares"][self.target][COMPLIED]
        return shown | ({"others": sum(others) / len(others)} if others else {})

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        first = None if math.isnan(self.first_loss) else self.first_loss
        # A copy: checkpoints are written in the background.
        return {"trajectory": list(self.trajectory), "first_loss": first, "stopped": self.stopped}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `to_json`."""
        self.trajectory, self.stopped = list(saved["trajectory"]), saved["stopped"]
        self.first_loss = math.nan if saved["first_loss"] is None else saved["first_loss"]


def check_finite(
    metrics: Mapping[str, float], step: int, data: Data, config: Any, seed: int
) -> None:
    """Stops a run whose figures are not numbers, naming the batch that did it.

    Raises:
        NonFiniteError: always, if one is not.
    """
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        forget, retain = data.indices(config, seed, step - 1)
        raise NonFiniteError(
            f"unlearn: {bad[0]} is {metrics[bad[0]]} at step {step}; lower unlearn.learning_rate",
            step,
            forget.tolist(),
            retain.tolist(),
        )


def check_arm(
    decoder: DecoderConfig, config: UnlearnConfig, shape: Mapping[str, int], where: str = "unlearn"
) -> None:
    """Checks an arm against a model and a mesh, before anything is loaded or compiled.

    Args:
        decoder: the architecture.
        config: the arm.
        shape: devices along each axis of the mesh.
        where: how the messages name the arm.

    Raises:
        UserError: batches or heads that the mesh does not divide, or layers that are not there.
    """
    batches = {f"{where}.batch_size": config.batch_size}
    if config.retains:
        batches[f"{where}.retain_batch_size"] = config.retain_batch_size
    validate(decoder, shape, {} if config.trainable == "ablation" else batches, config.accumulate)
    last = decoder.num_layers - 1
    if max(config.layers, default=0) > last:
        raise UserError(f"{where}.layers = {config.layers}: the model's last block is {last}")
    if config.feature_layer > decoder.num_layers:
        raise UserError(
            f"{where}.feature_layer = {config.feature_layer}: the model has {decoder.num_layers}"
        )


def check_data(data: Data, config: UnlearnConfig) -> None:
    """Checks that there is a preferred response for each forget prompt, where one is wanted."""
    if FORGET[config.objective].preferred and len(data.preferred) != len(data.forget):
        raise UserError(
            f"objective {config.objective} wants a preferred response for each of "
            f"{len(data.forget)} forget prompts and has {len(data.preferred)}"
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
    preferred: Sequence[TokenExample] = (),
    mesh: Mesh | None = None,
    log: Callable[[Mapping[str, Any]], None] = lambda row: None,
    checkpoints: Checkpoints | None = None,
    profile: Profile | None = None,
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
        preferred: responses wanted to the forget prompts, in their order, for dpo and sft.
        mesh: what the base lies on.
        log: gets one row of metrics a step.
        checkpoints: where the state is kept; a run that is found there goes on.
        profile: takes a trace of some steps.

    Raises:
        UserError: see `check_arm` and `check_data`.
        RunStoppedError: the loss or the gradient is not finite (`NonFiniteError`), a checkpoint
            could not be written, or SIGTERM came and there are checkpoints to go on from.
    """
    mesh = make_mesh() if mesh is None else mesh
    data = Data(forget, reference, retain, preferred)
    check_arm(base.config, config, mesh.shape)
    check_data(data, config)
    if config.objective == "dpo":
        numbers = reference_log_probs(base, preferred, config.batch_size, mesh)
        data = Data(forget, reference, retain, preferred, numbers)
    trainee = split(base, config, seed)
    trainable = trainable_part(trainee, config, mesh)
    moments, step = init_moments(config, trainable, mesh), 0
    course = Course(config, target, base, data, mesh)
    saved = checkpoints.latest(_abstract((trainable, moments))) if checkpoints else None
    if saved is None:
        model = assemble(trainee, config, trainable)
        course.measure(step, model, evaluate(model), {})
    else:
        (trainable, moments), step = saved.state, saved.step
        course.restore(saved.progress)
        logging.info("unlearn seed %d: goes on from step %d", seed, step)

    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(stop_requested()) if checkpoints else lambda: False
        if profile is not None:
            stack.callback(profile.stop)
        meter = Meter(base, config, mesh)
        progress = stack.enter_context(Progress(f"unlearn seed {seed}", config.max_steps, "steps"))
        progress.update(step)
        host = data.host_batch(config, seed, step)
        while not course.stopped:
            if profile is not None:
                profile.at(step)
            meter.start(host)
            draw = np.array([seed, step], np.uint32)
            trainable, moments, raw = train_step(
                trainee.graph,
                config.program,
                mesh,
                config.numbers,
                trainable,
                trainee.whole,
                trainee.frozen,
                moments,
                *place_batch(host, mesh),
                draw,
            )
            step += 1
            host = data.host_batch(config, seed, step)  # while the device is at work
            metrics = {name: float(host_array(value)) for name, value in raw.items()}
            speed = meter.stop()
            if step == 1:
                course.first_loss = metrics["forget_loss"]
            log({"step": step, **metrics, **speed})
            shown = {k: v for k, v in speed.items() if k in ("tokens_per_second", "mfu")}
            progress.update(1, loss=metrics["loss"], **course.notes(), **shown)
            check_finite(metrics, step, data, config, seed)
            if course.due(step):
                model = assemble(trainee, config, trainable)
                course.measure(step, model, evaluate(model), metrics)
            if checkpoints is not None:
                stop = asked()
                if checkpoints.due(step) or course.stopped or stop:
                    checkpoints.save(step, (trainable, moments), course.to_json())
                if course.stopped or stop:
                    checkpoints.wait()
                if stop and not course.stopped:
                    raise checkpoints.stopped(step)
    model = assemble(trainee, config, trainable)
    return Trained(model, step, course.stopped, course.first_loss, course.trajectory)


class Meter:
    """Tokens a second, MFU and memory of one step after another."""

    def __init__(self, base: Decoder, config: UnlearnConfig, mesh: Mesh):
        self._base, self._config = base, config
        device = find_accelerator(mesh.devices.flat[0].device_kind)
        self._peak = None if device is None else device.flops * mesh.size

    def start(self, host: tuple) -> None:
        """Before a step on a batch in NumPy."""
        forget, retain = host
        batches = [forget.preferred, None if retain is None else retain.batch]
        batches += [] if self._config.objective == "sft" else [forget.batch]
        masks = [batch.mask for batch in batches if batch is not None]
        self._tokens = sum(int(mask.sum()) for mask in masks)
        self._flops = sum(
            mask.sum() * flops_per_token(self._base.config, self._config, mask.shape[1])
            for mask in masks
        )
        self._start = time.monotonic()

    def stop(self) -> dict[str, float]:
        """The figures, once the step's own are there."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        figures = {"tokens_per_second": self._tokens / seconds}
        if self._peak is not None:
            figures["mfu"] = float(self._flops / seconds / self._peak)
        memory = peak_memory_gib()
        return figures if memory is None else figures | {"memory_gib": memory}


def _abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
