"""A small run with checkpoints, also as one process, or several, that a test can kill.

training_worker.py BASE DIR STEPS DATA,FSDP,TENSOR
"""

import dataclasses
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ema_jax.data.chat import TokenExample
from ema_jax.models import checkpoint, lora
from ema_jax.models.sharding import host_array, make_mesh
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.runtime import cli, distributed
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.metrics import MetricsWriter
from ema_jax.unlearning.reference import reference_log_probs
from ema_jax.unlearning.run_checkpoints import Checkpoints
from ema_jax.unlearning.trainer import unlearn

STEPS = 24
CONFIG = UnlearnConfig(
    lora=lora.LoRAConfig(rank=2, alpha=4.0, dropout=0.1),
    retain_weight=2.0,
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=3,
    batch_size=8,
    retain_batch_size=8,
    max_steps=STEPS,
    eval_every=5,
)


def random_examples(number: int, seed: int) -> list[TokenExample]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(97, size=rng.integers(low, high)).tolist())

    return [TokenExample(ids(3, 7), ids(2, 6)) for _ in range(number)]


def train(base, folder: Path, *, every: int = 1, log=None, config=CONFIG, mesh=None, **more):
    """Trains, or resumes, and returns what `unlearn` does."""
    forget, retain = random_examples(9, 1), random_examples(11, 2)
    with (
        MetricsWriter(folder, "arm", 0) as metrics,
        Checkpoints(folder / "state", every=every, **more) as checkpoints,
    ):

        def both(row):
            metrics(row)
            if log is not None:
                log(row)

        return unlearn(
            base,
            forget,
            retain,
            reference_log_probs(base, forget, 4, mesh),
            config,
            seed=0,
            target="t",
            evaluate=lambda model: Evaluation({"t": 1.0}, 0.0),
            mesh=mesh,
            log=both,
            checkpoints=checkpoints,
        )


def arrays(model) -> dict:
    state = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): host_array(leaf[...]) for path, leaf in state}


def main(argv) -> None:
    distributed.initialise(heartbeat_seconds=10)
    folder, steps = Path(argv[2]), int(argv[3])
    mesh = make_mesh([int(n) for n in argv[4].split(",")])
    base = checkpoint.load(argv[1], mesh=mesh)
    config = dataclasses.replace(CONFIG, max_steps=steps)
    # Slow enough to be hit in the middle.
    trained = train(base, folder, config=config, mesh=mesh, log=lambda row: time.sleep(0.05))
    made = arrays(trained.model)
    distributed.first_only(lambda: np.savez(folder / "model.npz", **made), "model")


def run(argv) -> None:
    """`main`, ending as every command does."""
    cli.log_to_stderr()
    try:
        main(argv)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        cli.exit_with("stopped", error, error.exit_code)


def fork(arguments: Sequence[str], programs: Path, limit: int | None) -> None:
    """The worker in a fork, what it says in `DIR/said.txt`.

    Args:
        arguments: of the worker.
        programs: folder of compiled programs.
        limit: the largest file that it may write, in bytes: a disk that is full.
    """
    os.dup2(os.open(f"{arguments[1]}/said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    # JAX has read its environment.
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run(["", *arguments])


if __name__ == "__main__":
    run(sys.argv)
