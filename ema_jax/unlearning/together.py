"""Many adapters at once: runs of one arm on one copy of the base's weights, in one program.

Seeds, learning rates and retain weights may differ from run to run; what is compiled may not. Each
run stops by its own dev rates; what a stopped one would still learn is thrown away.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ema_jax.errors import UserError
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import BATCH, make_mesh
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.runtime.progress import Progress
from ema_jax.unlearning.batches import Data
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import ForgetBatch, Metrics, RetainBatch
from ema_jax.unlearning.optimizers import optimizer
from ema_jax.unlearning.train_step import Trainee, assemble, split, update
from ema_jax.unlearning.trainer import (
    Course,
    Trained,
    check_arm,
    check_data,
    check_finite,
)


class Member(NamedTuple):
    """What tells one run from the others; None takes the arm's own."""

    seed: int
    learning_rate: float | None = None
    retain_weight: float | None = None

    def numbers(self, arm: UnlearnConfig) -> dict[str, float]:
        """What its steps are given."""
        own = {"learning_rate": self.learning_rate, "retain_weight": self.retain_weight}
        return arm.numbers | {name: x for name, x in own.items() if x is not None}


@functools.partial(
    jax.jit, static_argnames=("graph", "program"), donate_argnames=("trainable", "moments")
)
def _step(
    graph: nnx.GraphDef,
    program: UnlearnConfig,
    numbers: Mapping[str, Float[Array, "S"]],
    trainable: nnx.State,  # every leaf [S, …]
    whole: nnx.State,
    frozen: nnx.State,  # one copy
    moments: optax.OptState,
    forget: ForgetBatch,
    retain: RetainBatch | None,
    draws: Int[Array, "S 2"],
) -> tuple[nnx.State, optax.OptState, Metrics]:
    each = jax.vmap(functools.partial(update, graph, program), in_axes=(0, 0, 0, None, *(0,) * 4))
    return each(numbers, trainable, whole, frozen, moments, forget, retain, draws)


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
        data: what they train on.
        config: the arm; its batches are each run's own.
        members: the runs.
        target: the domain whose dev refusal decides when each of them stops.
        evaluate: dev rates of a model.
        mesh: what the base lies on.
        log: gets a member's place and one row of metrics a step.

    Raises:
        UserError: an arm that trains parameters: they would be copied for each run.
        RunStoppedError: a figure of one of them is not finite.
    """
    mesh = make_mesh() if mesh is None else mesh
    if config.trainable != "lora":
        raise UserError("only adapters are trained together; train a full arm's seeds one by one")
    check_arm(base.config, config, mesh.shape)
    check_data(data, config)
    trainees = [split(base, config, member.seed) for member in members]
    graph, frozen = trainees[0].graph, trainees[0].frozen
    whole = jax.tree.map(lambda *x: jnp.stack(x), *[trainee.whole for trainee in trainees])
    first, last = config.layers or (0, base.config.num_layers - 1)
    whole = jax.device_put(whole, NamedSharding(mesh, P()))
    trainable = jax.tree.map(lambda x: jnp.array(x[:, first : last + 1], copy=True), whole)
    moments = jax.jit(jax.vmap(optimizer(config).init))(trainable)
    numbers = jax.tree.map(lambda *x: jnp.array(x), *[member.numbers(config) for member in members])

    def model(i: int) -> Decoder:
        trainee = Trainee(graph, jax.tree.map(lambda x: x[i], whole), frozen)
        return assemble(trainee, config, jax.tree.map(lambda x: x[i], trainable))

    courses = [Course(config, target, base, data, mesh) for _ in members]
    start = evaluate(base)
    for i, course in enumerate(courses):
        course.measure(0, model(i), start, {})
    ended: dict[int, Trained] = {}
    rows = NamedSharding(mesh, P(None, *BATCH))
    with Progress(f"unlearn {len(members)} runs", config.max_steps, "steps") as progress:
        step = 0
        while len(ended) < len(members):
            host = [data.host_batch(config, member.seed, step) for member in members]
            batch = jax.device_put(_stacked(host), rows)
            draws = np.array([(member.seed, step) for member in members], np.uint32)
            trainable, moments, raw = _step(
                graph,
                config.program,
                numbers,
                trainable,
                whole,
                frozen,
                moments,
                *batch,
                draws,
            )
            step += 1
            figures = {name: np.asarray(value) for name, value in raw.items()}
            for i, course in enumerate(courses):
                if i in ended:
                    continue
                metrics = {name: float(value[i]) for name, value in figures.items()}
                if step == 1:
                    course.first_loss = metrics["forget_loss"]
                log(i, {"step": step, **metrics})
                check_finite(metrics, step, data, config, members[i].seed)
                if course.due(step):
                    course.measure(step, model(i), evaluate(model(i)), metrics)
                if course.stopped:
                    done = (course.stopped, course.first_loss, course.trajectory)
                    ended[i] = Trained(model(i), step, *done)
            progress.update(1, running=str(len(members) - len(ended)))
    return [ended[i] for i in range(len(members))]


def _stacked(batches: Sequence[Any]) -> Any:
    """Batches of several runs as one, padded to the longest of them."""

    def join(*leaves: np.ndarray) -> np.ndarray:
        width = max(x.shape[-1] for x in leaves)
        padded = [np.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),)) for x in leaves]
        return np.stack(padded)

    return jax.tree.map(join, *batches)
