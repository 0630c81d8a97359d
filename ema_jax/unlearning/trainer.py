"""Unlearn, the paper's second phase: any objective on the forget set, with or without a retain set.

The loop around the train step: batches, evaluation, when to stop, checkpoints, metrics.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from ema_jax.data.chat import TokenExample
from ema_jax.errors import UserError
from ema_jax.models import lora
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import batch_multiple, host_array, make_mesh, validate
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.runtime.devices import find_accelerator, peak_memory_gib
from ema_jax.runtime.progress import Progress
from ema_jax.unlearning.batches import Data, StepBatch
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.metrics import Profile
from ema_jax.unlearning.objectives import FORGET, Metrics
from ema_jax.unlearning.reference import leading_log_probs, reference_log_probs
from ema_jax.unlearning.run_checkpoints import Checkpoints, NonFiniteError, stop_requested
from ema_jax.unlearning.throughput import flops_per_token
from ema_jax.unlearning.train_step import (
    TrainSetup,
    TrainState,
    assemble,
    init_state,
    prepare,
    train_step,
)

# Forget examples and leading positions whose log-ratio is followed: NPO's drop hides in the first
# tokens of a refusal, where the sum does not show it.
PROBED, POSITIONS = 32, 16

Log = Callable[[Mapping[str, Any]], None]


class Trained(NamedTuple):
    """The outcome of a run."""

    model: Decoder
    steps: int  # that the model had
    stopped: str  # "target" (low refusal, and answers), "invalid" (damaged) or "limit" (of steps)
    first_loss: float
    trajectory: list[dict[str, Any]]
    last_step: int  # of the run: beyond `steps` where an earlier, undamaged model is given back


class RunProgress:
    """The evaluations of one run so far, and whether the run is over."""

    def __init__(
        self, config: UnlearnConfig, target: str, base: Decoder, data: Data, seed: int, mesh: Mesh
    ):
        self.config, self.target = config, target
        self.trajectory: list[dict[str, Any]] = []
        self.first_loss, self.stopped = math.nan, ""
        self._data, self._seed, self._mesh = data, seed, mesh
        self._probed = data.forget[:PROBED]
        self._reference = leading_log_probs(base, self._probed, POSITIONS, mesh)

    def measure(self, step: int, model: Decoder, rates: Evaluation, metrics: Mapping) -> None:
        """Adds a point to the trajectory and decides whether the run is over."""
        policy = leading_log_probs(model, self._probed, POSITIONS, self._mesh)
        ratios = policy - self._reference
        known = ~np.isnan(ratios)
        means = np.sum(np.where(known, ratios, 0), axis=0) / np.maximum(known.sum(axis=0), 1)
        point = rates.point(step)
        point["log_ratio_by_position"] = means[known.any(axis=0)].tolist()
        self.trajectory.append(point | dict(metrics))
        if step:
            self.stopped = self._verdict(step, rates)

    def _verdict(self, step: int, rates: Evaluation) -> str:
        """Why the run is over (see `Trained.stopped`); "" while it is not."""
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
                    "target's are neither refusals nor answers; stopping. The last evaluation "
                    "that found no such damage was after step %d",
                    step,
                    100 * rates.degenerate_rate,
                    100 * rates.unanswered(self.target),
                    self.valid_step,
                )
                return "invalid"
        return "limit" if step >= config.max_steps else ""

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Checks the metrics of one step, and keeps the loss of the first.

        Raises:
            NonFiniteError: one of them is NaN or infinite; it names the step's batch.
        """
        if step == 1:
            self.first_loss = metrics["forget_loss"]
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            forget, retain = self._data.indices(self.config, self._seed, step - 1)
            raise NonFiniteError(
                f"unlearn: {bad[0]} is {metrics[bad[0]]} at step {step}; "
                "lower unlearn.learning_rate",
                step,
                forget.tolist(),
                retain.tolist(),
            )

    def due(self, step: int) -> bool:
        """Whether the model is evaluated after this step."""
        return step % self.config.eval_every == 0 or step == self.config.max_steps

    def rates(self) -> dict[str, float]:
        """Latest dev rates for the progress line: of the target, and the mean of the others.

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
        """The progress as a checkpoint stores it."""
        first = None if math.isnan(self.first_loss) else self.first_loss
        # A copy: checkpoints are written in the background.
        return {"trajectory": list(self.trajectory), "first_loss": first, "stopped": self.stopped}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `to_json`."""
        self.trajectory, self.stopped = list(saved["trajectory"]), saved["stopped"]
        self.first_loss = math.nan if saved["first_loss"] is None else saved["first_loss"]

    @property
    def valid_step(self) -> int:
        """Step of the newest evaluation that found the model undamaged."""
        most = self.config.max_invalid
        undamaged = (
            point["step"]
            for point in reversed(self.trajectory)
            if not Evaluation.of_point(point).damaged(self.target, most)
        )
        return next(undamaged, 0)

    def valid_state(self, setup: TrainSetup) -> TrainState:
        """The state after `valid_step`, trained once more.

        Steps are a pure function of the seed, so no state needs to be kept for it.
        """
        state, groups = init_state(setup), batch_multiple(self._mesh)
        for step in range(self.valid_step):
            batch = self._data.host_batch(self.config, self._seed, step, groups)
            state, _ = train_step(setup, state, batch.placed(self._mesh))
        return state

    def outcome(self, model: Decoder, steps: int, last_step: int) -> Trained:
        """The result of the run, which is over."""
        return Trained(model, steps, self.stopped, self.first_loss, self.trajectory, last_step)


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
        UserError: batches or heads that the mesh does not divide, layers that are not there, or
            adapters of a rank beyond the model's width.
    """
    batches = {f"{where}.batch_size": config.batch_size}
    if config.retains:
        batches[f"{where}.retain_batch_size"] = config.retain_batch_size
    validate(decoder, shape, batches if config.ablation is None else {}, config.accumulate)
    last = decoder.num_layers - 1
    if max(config.layers, default=0) > last:
        raise UserError(f"{where}.layers = {config.layers}: the model's last block is {last}")
    if config.trainable == "lora" and config.lora.rank > decoder.hidden_size:
        raise UserError(
            f"{where}.lora.rank = {config.lora.rank}: the model is only {decoder.hidden_size} wide"
        )
    if config.feature_layer > decoder.num_layers:
        raise UserError(
            f"{where}.feature_layer = {config.feature_layer}: the model has {decoder.num_layers}"
        )


def check_data(data: Data, config: UnlearnConfig) -> None:
    """Checks that each forget prompt has a preferred response, where the objective needs one."""
    if FORGET[config.objective].preferred and len(data.preferred) != len(data.forget):
        raise UserError(
            f"objective {config.objective} needs a preferred response for each of "
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
    log: Log = lambda row: None,
    checkpoints: Checkpoints | None = None,
    profile: Profile | None = None,
    restore_valid: bool = True,
) -> Trained:
    """Trains one arm from the base until the target's dev refusal is low or the steps run out.

    An arm without retain data also stops once it is damaged; it gives back its last valid model.

    Args:
        base: the untouched model; its arrays are shared, not copied, under adapters.
        forget: refusals of the target domain.
        retain: examples of the behaviour to keep; unused where `config.retain_weight` is 0.
        reference: log π_ref of the forget responses (`reference_log_probs`).
        config: the arm.
        seed: of adapters and batches.
        target: the domain whose dev refusal decides when to stop.
        evaluate: dev rates of a model.
        preferred: preferred responses to the forget prompts, in their order, for dpo and sft.
        mesh: the mesh that the base lies on.
        log: gets one row of metrics per step.
        checkpoints: where the state is kept; a run that is found there is resumed.
        profile: takes a trace of some steps.
        restore_valid: give back the last valid model, and not the damaged one.

    Raises:
        UserError: see `check_arm` and `check_data`.
        RunStoppedError: the loss or the gradient is not finite (`NonFiniteError`), a checkpoint
            could not be written, or SIGTERM or Ctrl-C came and there are checkpoints to resume
            from (`AskedToStopError`).
    """
    mesh = make_mesh() if mesh is None else mesh
    data = Data(forget, reference, retain, preferred)
    check_arm(base.config, config, mesh.shape)
    check_data(data, config)
    if config.objective == "dpo":
        numbers = reference_log_probs(base, preferred, mesh=mesh)
        data = dataclasses.replace(data, preferred_reference=numbers)
    groups = batch_multiple(mesh)
    setup = prepare(base, config, seed, mesh, data.pass_tokens(config, groups))
    state, step = init_state(setup), 0
    # As trained models are read: the same program. In float32 a merged copy, which no step needs.
    before = lora.folded(nnx.merge(setup.graph, setup.initial, setup.frozen))
    run = RunProgress(config, target, before, data, seed, mesh)
    del before

    def measure(metrics: Mapping[str, float]) -> None:
        model = lora.folded(assemble(setup, state.trainable))
        run.measure(step, model, evaluate(model), metrics)

    saved = checkpoints.latest(_abstract(tuple(state))) if checkpoints else None
    if saved is None:
        measure({})
    else:
        state, step = TrainState(*saved.state), saved.step
        run.restore(saved.progress)
        logging.info("unlearn seed %d: resuming at step %d", seed, step)

    with contextlib.ExitStack() as stack:
        stop_asked = stack.enter_context(stop_requested()) if checkpoints else lambda: False
        if profile is not None:
            stack.callback(profile.stop)
        bar = stack.enter_context(Progress(f"unlearn seed {seed}", config.max_steps, "steps"))
        bar.update(step)
        meter = Meter(base, config, mesh)
        reader = MetricsReader(run, meter, bar, log)
        batch = data.host_batch(config, seed, step, groups)
        while not run.stopped:
            if profile is not None:
                profile.at(step, state)
            work = meter.start(batch)
            state, metrics = train_step(setup, state, batch.placed(mesh))
            step += 1
            batch = data.host_batch(config, seed, step, groups)  # while the device is at work
            reader.push(step, metrics, work)
            if run.due(step):
                measure(reader.latest())
            if checkpoints is not None:
                stop = stop_asked()
                if checkpoints.due(step) or run.stopped or stop:
                    reader.latest()  # raises before a state that is not finite is saved
                    checkpoints.save(step, tuple(state), run.to_json())
                if run.stopped or stop:
                    checkpoints.wait()
                if stop and not run.stopped:
                    raise checkpoints.stopped(step)
    last = step
    if run.stopped == "invalid" and restore_valid:
        del state  # to make room for the one that is given back
        state, step = run.valid_state(setup), run.valid_step
    return run.outcome(assemble(setup, state.trainable), step, last)


class Work(NamedTuple):
    """A step that was dispatched."""

    tokens: int
    flops: float
    start: float  # seconds


class Meter:
    """Tokens per second, MFU and memory of one step after another."""

    def __init__(self, base: Decoder, config: UnlearnConfig, mesh: Mesh):
        self._base, self._config = base, config
        device = find_accelerator(mesh.devices.flat[0].device_kind)
        self._peak = None if device is None else device.flops * mesh.size
        self._end = -math.inf

    def start(self, batch: StepBatch) -> Work:
        """The work of a step on a batch in NumPy, about to be dispatched."""
        tokens = int(np.count_nonzero(batch.rows.segments))
        length = batch.rows.tokens.shape[-1]
        scored = np.count_nonzero(batch.rows.examples >= 0) / tokens
        each = flops_per_token(self._base.config, self._config, length, scored=scored)
        return Work(tokens, tokens * each, time.monotonic())

    def stop(self, work: Work) -> dict[str, float]:
        """Speed of a step that is done; it began once the step before it was done."""
        start, self._end = max(work.start, self._end), time.monotonic()
        seconds = max(self._end - start, 1e-9)
        speed = {"tokens_per_second": work.tokens / seconds}
        if self._peak is not None:
            speed["mfu"] = float(work.flops / seconds / self._peak)
        memory = peak_memory_gib()
        return speed if memory is None else speed | {"memory_gib": memory}


class MetricsReader:
    """Reads the metrics of each step one step behind, so that the device never waits for the host.

    Once read, they are logged, shown and checked, in the order of the steps.
    """

    def __init__(self, run: RunProgress, meter: Meter, bar: Progress, log: Log):
        self._run, self._meter, self._bar, self._log = run, meter, bar, log
        self._pending: tuple[int, Metrics, Work] | None = None
        self._latest: dict[str, float] = {}

    def push(self, step: int, metrics: Metrics, work: Work) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the step before."""
        self.latest()
        self._pending = step, metrics, work

    def latest(self) -> dict[str, float]:
        """Metrics of the newest step, for which this waits.

        Raises:
            NonFiniteError: see `RunProgress.check`.
        """
        if self._pending is not None:
            (step, metrics, work), self._pending = self._pending, None
            self._latest = {name: float(host_array(value)) for name, value in metrics.items()}
            speed = self._meter.stop(work)
            self._log({"step": step, **self._latest, **speed})
            shown = {k: v for k, v in speed.items() if k in ("tokens_per_second", "mfu")}
            self._bar.update(1, loss=self._latest["loss"], **self._run.rates(), **shown)
            self._run.check(step, self._latest)
        return self._latest


def _abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
