"""What the phases of accelerator.py share: where figures go, how long is left, and a model.

Imports nothing of JAX or PyTorch before it is called, as some phases use only one of them.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = "Qwen--Qwen2.5-7B-Instruct"
RANK, ALPHA = 16, 32.0
# The paper's cells: forget and retain rows of a step, and their tokens.
ROWS, LENGTH, TINY_ROWS, TINY_LENGTH = (16, 32), 256, (4, 4), 64
# Where `machine` has not run: an H100's, as measured once.
CEILINGS = {"flops": 708e12, "bytes": 2.57e12}


@dataclasses.dataclass(frozen=True)
class Run:
    """One phase of one run.

    Attributes:
        out: folder of `results.jsonl`, one figure a line.
        phase: its name.
        start: of the whole run, as `time.time` says; tells runs in one folder apart.
        deadline: when the phase has to have ended.
        tiny: a rehearsal on a CPU.
    """

    out: Path
    phase: str
    start: float
    deadline: float
    tiny: bool

    def say(self, **figures: Any) -> None:
        """A figure as a line, on disk before the next one is measured."""
        at = round(time.time() - self.start, 1)
        line = json.dumps({"run": self.start, "phase": self.phase, "at_s": at} | figures)
        with open(self.out / "results.jsonl", "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)

    @property
    def left(self) -> float:
        """Seconds that the phase still has."""
        return self.deadline - time.time()

    def attempt(self, measure: Callable[..., None], *given: Any, seconds: float) -> None:
        """Measures, if the phase has that many seconds left; a failure is a line, not the end."""
        name = [measure.__name__, *map(str, given)]
        if self.left < seconds:
            return self.say(skipped=name, left_s=round(self.left))
        try:
            return measure(*given)
        except Exception as error:  # out of memory, a kernel that the device does not have, …
            return self.say(failed=name, error=f"{type(error).__name__}: {error}"[:400])

    def timed(self, step: Callable[[], Any], seconds: float, least=3, most=30) -> list[float]:
        """Wall seconds of calls that wait for the device, after one that is not counted."""
        if self.tiny:
            least, most = 1, 2
        step()
        found: list[float] = []
        begin = time.perf_counter()
        while len(found) < least or (time.perf_counter() - begin < seconds and len(found) < most):
            if found and self.left < 5:
                break
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
        return found

    def median(self, step: Callable[[], Any], seconds: float, **limits: int) -> float:
        """Median of `timed`."""
        return statistics.median(self.timed(step, seconds, **limits))

    def ceiling(self, name: str) -> float:
        """The machine's FLOP/s (`flops`) or bytes/s (`bytes`), as `machine` measured them."""
        path = self.out / "ceilings.json"
        return (json.loads(path.read_text()) if path.exists() else CEILINGS)[name]


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and range of a step's seconds."""
    return {
        "step_s": round(statistics.median(seconds), 4),
        "spread_s": [round(min(seconds), 4), round(max(seconds), 4)],
    }


def hf_config(tiny: bool) -> dict[str, Any]:
    """The architecture measured, as its config.json has it."""
    package = Path(__file__).parents[1] / "ema_jax"
    tiny_path = package / "organism" / "checkpoints" / "qwen2" / "config.json"
    path = tiny_path if tiny else package / "models" / "shapes" / f"{SHAPE}.json"
    return json.loads(path.read_text())


def drawn_lengths(rows: int, length: int, seed: int) -> list[tuple[int, int]]:
    """Tokens of prompts and responses; the median response takes a fifth of a row, one row all."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(length / 4 * rng.lognormal(0, 0.4, rows), 4, length // 2).astype(int)
    responses = np.clip(length / 5 * rng.lognormal(0, 0.8, rows), 4, length - prompts).astype(int)
    responses[0] = length - prompts[0]
    return list(zip(prompts.tolist(), responses.tolist(), strict=True))


def full_lengths(rows: int, length: int) -> list[tuple[int, int]]:
    """Rows without padding, half prompt and half response."""
    return [(length // 2, length - length // 2)] * rows


def random_model(run: Run):
    """A decoder with random weights made on the device, stack by stack; nothing on the host."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ema_jax.models.checkpoint import abstract_decoder
    from ema_jax.models.config import DecoderConfig
    from ema_jax.models.sharding import make_mesh, parameter_shardings

    config = DecoderConfig.from_hf(hf_config(run.tiny))
    dtype = jnp.float32 if run.tiny else jnp.bfloat16

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 3:  # layer by layer: a stack in float32 would not fit beside the others
            keys = jax.random.split(key, shape[0])
            return jax.lax.map(lambda key: draw(key, shape[1:]), keys)
        matrix = min(shape) > config.num_layers  # others are norms and biases of all layers
        return 0.02 * jax.random.normal(key, shape, dtype) if matrix else jnp.ones(shape, dtype)

    graph, state = nnx.split(abstract_decoder(config))
    leaves, tree = jax.tree.flatten(state)
    make = jax.jit(draw, static_argnums=1)
    drawn = [make(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    state = jax.tree.unflatten(tree, drawn)
    return nnx.merge(graph, jax.device_put(state, parameter_shardings(state, make_mesh())))


def peak_gib() -> float | None:
    """Most memory that the process has used so far."""
    from ema_jax.runtime.devices import peak_memory_gib

    peak = peak_memory_gib()
    return None if peak is None else round(peak, 2)
