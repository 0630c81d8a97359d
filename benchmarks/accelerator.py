"""All that one accelerator can tell in eight minutes: `python benchmarks/accelerator.py`.

Phases run as processes of their own, each under a time limit, in the order of what they are worth;
a figure is a line of JSON in `--out`/results.jsonl, on disk before the next one is measured, so
that whatever ends the run costs only what was not measured yet. A table of all figures ends it.

    machine   versions, and the device's own ceilings: a large product, a copy
    parity    embedded models on the device against the CPU
    train     the step at Qwen2.5-7B's shape: rows of drawn lengths, and full rows in three variants
    decode    64 and 256 rows, base and adapters, against the device's bound
    theirs    transformers + PEFT: the first step of `train`, and `generate`
    capture   pooled activations against a bare forward pass, and the loop over batches
    pieces    attention and the loss head in variants
    load      a checkpoint against a plain read of its files
    trace     one step: its 25 longest kernels, and shares by kind

`--tiny` rehearses it all on a CPU, in small sizes that say nothing of speed. Exit code 0 if every
figure was measured, 1 if any failed or was left out; the table says which.

It runs from a checkout. An image with JAX for its device, Flax, Optax, NumPy and safetensors needs
more wheels, if it has not got them: absl-py, jaxtyping, wadler-lindig, gguf, annotated-types and
typing-inspection, which are pure Python, and pydantic with its compiled pydantic-core (of the
image's version of Python). `parity` also reads a tokenizer with transformers, and `theirs` needs
PyTorch, transformers and PEFT; without these the two fail and the others go on. A whole study needs
datasets (with multiprocess and dill), ml_collections, tensorboardX, tenacity and httpx as well.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerator_run import Run

# Most seconds of each phase, where nothing was compiled before; together more than the whole run
# may take, as few need all of theirs.
LIMITS = {
    "machine": 30,
    "parity": 140,
    "train": 190,
    "decode": 120,
    "theirs": 80,
    "capture": 45,
    "pieces": 60,
    "load": 40,
    "trace": 60,
}
_LEAST, _GRACE = 10, 5  # seconds that a phase is started for, and stopped after
_TINY_TIMES = 3  # a CPU compiles slowly


def environment(tiny: bool) -> dict[str, str]:
    """Variables of every phase; what the caller has set stays."""
    root = str(Path(__file__).resolve().parents[1])
    programs = os.path.join(tempfile.gettempdir(), "ema-jax-programs")
    chosen = {
        # `trace` takes the program that `train` compiled, and a second run takes all of them.
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # `dots` at 16 + 32 rows asks for 44 GiB in one piece, which 0.75 of 80 GB (JAX's default)
        # does not leave.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    forced = {"PYTHONPATH": path} | ({"JAX_PLATFORMS": "cpu"} if tiny else {})
    return chosen | dict(os.environ) | forced


def run_phase(phase: str, limit: float, run: Run) -> int | str:
    """Runs one phase in a process of its own; its exit code, or that it was stopped."""
    command = [sys.executable, __file__, f"--out={run.out}", f"--phase={phase}"]
    command += [f"--start={run.start}", f"--deadline={time.time() + limit}"]
    command += ["--tiny"] * run.tiny
    with open(run.out / "log.txt", "a") as log:
        job = subprocess.Popen(
            command, env=environment(run.tiny), stderr=log, start_new_session=True
        )
        try:
            return job.wait(limit + _GRACE)
        except subprocess.TimeoutExpired:
            return "stopped at its limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # and whatever it has started
            job.wait()


def measure(run: Run) -> None:
    """One phase, in this process."""
    if run.phase == "theirs":
        from accelerator_theirs import theirs as body
    elif run.phase in ("train", "trace"):
        import accelerator_step

        body = getattr(accelerator_step, run.phase)
    else:
        import accelerator_phases

        body = getattr(accelerator_phases, run.phase)
    body(run)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """All figures, a phase at a time and one of its lines in a line."""
    text, phase = [], None
    for row in rows:
        if row["phase"] != phase:
            phase = row["phase"]
            text.append(f"\n{phase}")
        figures = {key: x for key, x in row.items() if key not in ("run", "phase", "at_s")}
        longest = figures.pop("longest_ms", [])
        parts = (f"{key} {_cell(x)}" for key, x in figures.items() if x is not None)
        text.append("  " + "   ".join(parts))
        text += [f"    {ms:10.2f} ms  {name}" for name, ms in longest]
    return "\n".join(text)


def _cell(x: Any) -> str:
    if isinstance(x, Mapping):
        return ", ".join(f"{key} {_cell(value)}" for key, value in x.items())
    if isinstance(x, list | tuple):
        return " ".join(map(_cell, x))
    return f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else str(x)


def complete(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether every figure was measured and none was wrong."""
    return not any(
        "failed" in row or "skipped" in row or row.get("exit", 0) != 0 or row.get("right") is False
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"), help="a folder")
    parser.add_argument("--seconds", type=float, default=500, help="for all of it")
    parser.add_argument("--phases", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--tiny", action="store_true", help="rehearse it on a CPU")
    parser.add_argument("--phase", choices=LIMITS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    end = options.start + options.seconds
    run = Run(
        options.out,
        options.phase or "all",
        options.start,
        end if options.deadline is None else options.deadline,
        options.tiny,
    )
    if options.phase:
        measure(run)
        return 0
    run.out.mkdir(parents=True, exist_ok=True)
    # Whoever stops this stops the phase that runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for phase in options.phases:
        limit = min(LIMITS[phase] * (_TINY_TIMES if run.tiny else 1), run.left)
        if limit < _LEAST:
            run.say(skipped=phase)
            continue
        begin = time.time()
        code = run_phase(phase, limit, run)
        run.say(ended=phase, exit=code, seconds=round(time.time() - begin, 1))
    lines = map(json.loads, (run.out / "results.jsonl").read_text().splitlines())
    rows = [row for row in lines if row["run"] == run.start]
    # Lines of the whole run last: they say how each phase ended.
    print(table(sorted(rows, key=lambda row: row["phase"] == "all")))
    return 0 if complete(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
