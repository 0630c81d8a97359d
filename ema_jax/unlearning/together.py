"""Many adapters at once: runs of one arm on one copy of the base's weights, in one program.

Seeds, learning rates and retain weights may differ from run to run; no other setting may. Each run
stops by its own dev rates; steps after that are discarded.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ema_jax.errors import UserError
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import BATCH, make_mesh
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.runtime.progress import Progress
from ema_jax.unlearning.batches import Data, StepBatch
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import Metrics
from ema_jax.unlearning.optimizers import optimizer
from ema_jax.unlearning.train_step import TrainSetup, TrainState, assemble, prepare, update
from ema_jax.unlearning.trainer import (
    RunProgress,
    Trained,
    check_arm,
    check_data,
)


class Member(NamedTuple):
    """The settings that differ from run to run; None takes the arm's own."""

    seed: int
    learning_rate: float | None = None
    retain_weight: float | None = None

    def traced_settings(self, arm: UnlearnConfig) -> dict[str, float]:
        """The arm's settings that its steps take as arguments, with this run's own."""
        own = {"learning_rate": self.learning_rate, "retain_weight": self.retain_weight}
        return arm.traced_settings | {name: x for name, x in own.items() if x is not None}


@functools.partial(jax.jit, donate_argnames="state")
def _step(
    setup: TrainSetup, state: TrainState, batch: StepBatch
) -> tuple[TrainState, dict[str, Float[Array, "S"]]]:
    """One step of S runs: leaves are `[S, …]`, but those of `setup.frozen`, which all share."""

    def one(
        initial: nnx.State, settings: Mapping[str, Any], state: TrainState, batch: StepBatch
    ) -> tuple[TrainState, Metrics]:
        own = dataclasses.replace(setup, initial=initial, traced_settings=settings)
        return update(own, state, batch)

    return jax.vmap(one)(setup.initial, setup.traced_settings, state, batch)


def unlearn_together(
    base: Decoder,
    data: Data,
    config: UnlearnConfig,
    members: Sequence[Member],
    *,
    target: str,
    evaluate: Callable[[Decoder], Evaluation],
    mesh: Mesh | None = None,
    log: Callable[[int, Mapping[str, Any]], None] = lambda member, row: None,
) -> list[Trained]:
    """Trains adapters of several runs at once; each ends as `unlearn` alone would end it.

    (To the rounding of float32: products of several runs are summed in another order.)

    Args:
        base: the untouched model; one copy serves all.
        data: the training data, the same for all.
        config: the arm; its batches are each run's own.
        members: the runs.
        target: the domain whose dev refusal decides when each of them stops.
        evaluate: dev rates of a model.
        mesh: the mesh that the base lies on.
        log: gets a member's index and one row of metrics per step.

    Raises:
        UserError: an arm that trains parameters: they would be copied for each run.
        NonFiniteError: a metric of one of them is not finite.
    """
    mesh = make_mesh() if mesh is None else mesh
    if config.trainable != "lora":
        raise UserError("only adapters are trained together; train a full arm's seeds one by one")
    check_arm(base.config, config, mesh.shape)
    check_data(data, config)
    setups = [prepare(base, config, member.seed, mesh) for member in members]
    whole = NamedSharding(mesh, P())
    setup = dataclasses.replace(
        setups[0],
        initial=jax.device_put(_stack([each.initial for each in setups]), whole),
        traced_settings=_stack([member.traced_settings(config) for member in members]),
    )
    first, last = config.layers or (0, base.config.num_layers - 1)
    trainable = jax.tree.map(lambda x: jnp.array(x[:, first : last + 1], copy=True), setup.initial)
    state = TrainState(trainable, jax.jit(jax.vmap(optimizer(config).init))(trainable))

    def model(i: int) -> Decoder:
        initial, trainable = jax.tree.map(lambda x: x[i], (setup.initial, state.trainable))
        return assemble(dataclasses.replace(setup, initial=initial), trainable)

    runs = [RunProgress(config, target, base, data, member.seed, mesh) for member in members]
    start = evaluate(base)
    for i, run in enumerate(runs):
        run.measure(0, model(i), start, {})
    ended: dict[int, Trained] = {}
    rows = NamedSharding(mesh, P(None, *BATCH))
    with Progress(f"unlearn {len(members)} runs", config.max_steps, "steps") as progress:
        step = 0
        while len(ended) < len(members):
            host = _padded([data.host_batch(config, member.seed, step) for member in members])
            forget, retain = jax.device_put((host.forget, host.retain), rows)
            state, metrics = _step(setup, state, StepBatch(forget, retain, host.draw))
            step += 1
            values = {name: np.asarray(value) for name, value in metrics.items()}
            for i, run in enumerate(runs):
                if i in ended:
                    continue
                own = {name: float(value[i]) for name, value in values.items()}
                log(i, {"step": step, **own})
                run.check(step, own)
                if run.due(step):
                    run.measure(step, model(i), evaluate(model(i)), own)
                if run.stopped:
                    ended[i] = _ended(run, setups[i], model(i), step)
            progress.update(1, running=str(len(members) - len(ended)))
    return [ended[i] for i in range(len(members))]


def _ended(run: RunProgress, setup: TrainSetup, model: Decoder, step: int) -> Trained:
    if run.stopped != "invalid":
        return run.outcome(model, step, step)
    valid = assemble(setup, run.valid_state(setup).trainable)
    return run.outcome(valid, run.valid_step, step)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _padded(batches: Sequence[StepBatch]) -> StepBatch:
    """Batches of several runs as one in NumPy, padded to the longest of them."""

    def join(*leaves: np.ndarray) -> np.ndarray:
        width = max(x.shape[-1] for x in leaves)
        padded = [np.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),)) for x in leaves]
        return np.stack(padded)

    return jax.tree.map(join, *batches)
