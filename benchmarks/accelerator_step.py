"""The train step in accelerator.py: its figures by shape, and the kernels that it consists of."""

import gzip
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from accelerator_run import (
    ALPHA,
    LENGTH,
    RANK,
    ROWS,
    TINY_LENGTH,
    TINY_ROWS,
    Run,
    drawn_lengths,
    full_lengths,
    peak_gib,
    random_model,
    summary,
)

from ema_jax.data.chat import TokenExample
from ema_jax.models.decoder import Decoder
from ema_jax.models.lora import LoRAConfig
from ema_jax.models.sharding import make_mesh
from ema_jax.runtime.devices import GIB, find_accelerator
from ema_jax.unlearning import train_step as steps
from ema_jax.unlearning.batches import Data, StepBatch
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.throughput import flops_per_token


class Shape(NamedTuple):
    """What one step is compiled for."""

    remat: Literal["full", "projections", "none"]
    rows: tuple[int, int]  # forget and retain
    length: int

    @property
    def arm(self) -> UnlearnConfig:
        return UnlearnConfig(
            lora=LoRAConfig(rank=RANK, alpha=ALPHA),
            retain_weight=1.0,
            batch_size=self.rows[0],
            retain_batch_size=self.rows[1],
            remat=self.remat,
        )


# The first is the paper's cells' own, as 80 GB take it, and what `theirs` and `trace` measure.
SHAPES = (
    Shape("projections", ROWS, LENGTH),
    Shape("full", ROWS, LENGTH),
    Shape("none", (4, 8), 256),
)


def shapes(tiny: bool) -> Sequence[Shape]:
    if tiny:
        return (Shape("projections", TINY_ROWS, TINY_LENGTH), Shape("full", (2, 2), TINY_LENGTH))
    return SHAPES


class Step:
    """A train step with its state, and two batches of its shape: full rows, and drawn lengths."""

    def __init__(self, model: Decoder, shape: Shape):
        self.shape, self._words = shape, model.config.vocab_size
        self._mesh = make_mesh()
        self.setup = steps.prepare(model, shape.arm, 0, self._mesh)
        self.state = steps.init_state(self.setup)
        rows = enumerate(shape.rows)
        self.full = self._batch([full_lengths(n, shape.length) for n in shape.rows])
        self.drawn = self._batch([drawn_lengths(n, shape.length, seed) for seed, n in rows])

    def _batch(self, sizes: Sequence[Sequence[tuple[int, int]]]) -> StepBatch:
        """A step's batch as training makes it; it holds every example once."""
        rng = np.random.default_rng(0)

        def words(number: int) -> tuple[int, ...]:
            return tuple(rng.integers(0, self._words, number).tolist())

        forget, retain = ([TokenExample(words(p), words(r)) for p, r in side] for side in sizes)
        data = Data(forget, np.zeros(len(forget), np.float32), retain)
        return data.host_batch(self.shape.arm, 0, 0).placed(self._mesh)

    def compile(self, batch: StepBatch) -> "Program":
        begin = time.time()
        program = steps.train_step.lower(self.setup, self.state, batch).compile()
        return Program(self, batch, program, round(time.time() - begin, 1))


class Program(NamedTuple):
    """A step compiled for a batch: a call takes one step on it and waits for it."""

    step: Step
    batch: StepBatch
    compiled: Any
    compile_s: float

    def __call__(self) -> None:
        self.step.state, metrics = self.compiled(self.step.setup, self.step.state, self.batch)
        jax.block_until_ready(metrics)


def train(run: Run) -> None:
    """Seconds, tokens a second and MFU of a step at several shapes."""
    begin = time.time()
    model = jax.block_until_ready(random_model(run))
    run.say(weights_made_s=round(time.time() - begin, 1), peak_gib=peak_gib())
    first, *others = shapes(run.tiny)
    step = Step(model, first)
    # Two by themselves, so that their figures are there even if nothing else compiles in time.
    _compile_and_report(run, model, [(step, step.drawn), (step, step.full)])
    rest = [Step(model, shape) for shape in others]
    _compile_and_report(run, model, [(step, step.full) for step in rest])
    os._exit(0)  # whatever still compiles is not waited for


def _compile_and_report(run: Run, model: Decoder, wanted: Sequence[tuple[Step, StepBatch]]) -> None:
    """Compiles side by side. Nothing is timed meanwhile, as XLA's autotuner runs kernels too."""
    pool = ThreadPoolExecutor(len(wanted))
    jobs = [(step, pool.submit(step.compile, batch)) for step, batch in wanted]
    wait([job for _, job in jobs], timeout=max(run.left - 12 * len(jobs), 1))

    def measure(program: Program) -> None:
        _report(run, model, program)

    for step, job in jobs:
        if not job.done():
            run.say(skipped=["measure", str(step.shape)], why="not compiled in time")
        elif job.exception():
            run.say(failed=["measure", str(step.shape)], error=str(job.exception())[:400])
        else:
            run.attempt(measure, job.result(), seconds=8)


def _report(run: Run, model: Decoder, program: Program) -> None:
    shape, batch = program.step.shape, program.batch
    found = run.timed(program, 5)
    seconds = statistics.median(found)
    real, padded = int(np.count_nonzero(np.asarray(batch.rows.segments))), batch.rows.tokens.size
    scored = np.count_nonzero(np.asarray(batch.rows.examples) >= 0) / real  # responses
    rate = real * flops_per_token(model.config, shape.arm, shape.length, scored=scored) / seconds
    sheet = find_accelerator(jax.devices()[0].device_kind)
    memory = program.compiled.memory_analysis()
    run.say(
        remat=shape.remat,
        rows=shape.rows,
        length=shape.length,
        lengths="full" if batch is program.step.full else "drawn",
        packed=batch.rows.tokens.shape[1:],
        places=batch.rows.places.shape[2],
        fill=round(real / padded, 3),
        **summary(found),
        tokens_per_s=round(padded / seconds),
        real_tokens_per_s=round(real / seconds),
        # Of real tokens: what padding costs is not counted as work.
        tflops=round(rate / 1e12, 2),
        mfu=sheet and round(rate / sheet.flops, 3),
        mfu_of_measured=round(rate / run.ceiling("flops"), 3),
        peak_gib=peak_gib(),
        argument_gib=round(memory.argument_size_in_bytes / GIB, 2),
        temp_gib=round(memory.temp_size_in_bytes / GIB, 2),
        compile_s=program.compile_s,
    )


# The trace.

_KINDS = (
    ("between devices", r"nccl"),
    ("copies", r"memcpy|memset|copy"),
    ("attention", r"cudnn|flash|fmha"),
    ("Triton products", r"gemm_fusion|triton_gemm|nested_gemm"),
    ("cuBLAS products", r"nvjet|cublas|cutlass|xmma|gemm|gemv|splitk|^dot"),
    ("elementwise", r"fusion|reduce|wrapped|loop_|input_|transpose|concatenate|scatter|triton"),
)


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name as XLA and NVIDIA's libraries choose them."""
    for kind, pattern in _KINDS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "other"


def summarise(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Longest kernels and shares by kind, of a profiler's events on the device's streams.

    Without streams (on a CPU) it takes the events that name an operation of the program.
    """
    events = list(events)
    named: dict[str, dict] = {"process_name": {}, "thread_name": {}}
    for e in events:
        if e.get("ph") == "M" and e.get("name") in named:
            named[e["name"]][e["pid"], e.get("tid", 0)] = e["args"].get("name", "")
    devices = {pid for (pid, _), name in named["process_name"].items() if "/device:" in name}
    streams = {
        at
        for at, name in named["thread_name"].items()
        if at[0] in devices and name.startswith("Stream")
    }
    kernels = [
        e
        for e in events
        if e.get("ph") == "X"
        and ((e["pid"], e.get("tid")) in streams if streams else "hlo_op" in e.get("args", {}))
    ]
    spent: Counter[str] = Counter()
    for e in kernels:
        spent[e["name"]] += e.get("dur", 0)
    total = sum(spent.values()) or 1
    kinds: Counter[str] = Counter()
    for name, microseconds in spent.items():
        kinds[kind_of(name)] += microseconds
    return {
        "kernels": len(kernels),
        "kernels_ms": round(total / 1e3, 2),
        "busy_ms": round(_covered(kernels) / 1e3, 2),
        "shares": {kind: round(x / total, 3) for kind, x in kinds.most_common()},
        "longest_ms": [[name[:80], round(x / 1e3, 2)] for name, x in spent.most_common(25)],
    }


def _covered(events: Iterable[Mapping[str, Any]]) -> float:
    """Microseconds in which at least one event runs."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted((e["ts"], e["ts"] + e.get("dur", 0)) for e in events):
        covered += max(stop - max(start, end), 0)
        end = max(end, stop)
    return covered


def trace(run: Run) -> None:
    """One step of the first shape under the profiler, on drawn lengths."""
    step = Step(random_model(run), shapes(run.tiny)[0])
    take = step.compile(step.drawn)
    take()
    folder, options = run.out / "trace", jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        take()
    newest = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest) as file:
        events = json.load(file)["traceEvents"]
    run.say(step="one", **summarise(e for e in events if e))
