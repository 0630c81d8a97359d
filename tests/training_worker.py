"""A small run with checkpoints, also as a process that a test can kill: its BASE and DIR."""

import sys
import time
from pathlib import Path

import numpy as np
from flax import nnx

from ema_jax import cli
from ema_jax.data.chat import TokenExample
from ema_jax.models import checkpoint, lora
from ema_jax.unlearning.checkpointing import Checkpoints
from ema_jax.unlearning.metrics import MetricsWriter
from ema_jax.unlearning.trainer import Evaluation, UnlearnConfig, reference_log_probs, unlearn

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


def train(base, folder: Path, *, every: int = 1, log=None, config=CONFIG, **more):
    """Trains, or goes on, and returns what `unlearn` does."""
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
            reference_log_probs(base, forget, 4),
            config,
            seed=0,
            target="t",
            evaluate=lambda model: Evaluation({"t": 1.0}, 0.0),
            log=both,
            checkpoints=checkpoints,
        )


def arrays(model) -> dict:
    state = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}


def main(argv) -> None:
    base, folder = checkpoint.load(argv[1]), Path(argv[2])
    # Slow enough to be hit in the middle.
    trained = train(base, folder, log=lambda row: time.sleep(0.05))
    np.savez(folder / "model.npz", **arrays(trained.model))


if __name__ == "__main__":
    cli.log_to_stderr()
    try:
        main(sys.argv)
    except Exception as error:  # as every command ends
        if not hasattr(error, "exit_code"):
            raise
        cli._exit("stopped", error, error.exit_code)
