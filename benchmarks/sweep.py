"""A sweep of 64 cells by two workers, compared with separate runs of `ema_jax.main` per cell.

python benchmarks/sweep.py --separate=4

The cells are small (few prompts and steps): measured is what a sweep saves around the training. The
training itself gets no cheaper.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = """
import sys
sys.path.insert(0, {configs!r})
import tiny_sweep

def get_config():
    config = tiny_sweep.get_config()
    config.prompts.counts = {{"harvest": 16, "retain": 8, "dev": 2, "eval": 8, "concept": 8}}
    config.harvest.min_examples = 2
    config.harvest.samples = 1
    config.unlearn.max_steps = config.unlearn.eval_every = 4
    config.arms = {{"npo": {{}}, "npo_retain": {{"retain_weight": 4.0}}}}
    config.concepts.permutations = 20
    return config
"""
# One cell of the grid as a study of its own.
ALONE = """
import sys
sys.path.insert(0, {folder!r})
import small

def get_config():
    config = small.get_config()
    config.grid = {{}}
    config.target, config.seeds = {target!r}, (0,)
    config.arms = {{{arm!r}: config.arms[{arm!r}]}}
    return config
"""
CELLS = [(target, arm) for target in ("cybersecurity", "safety") for arm in ("npo", "npo_retain")]


def start(module: str, config: Path, workdir: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", module, f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def finish(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.wait():
            raise SystemExit(f"{process.args} ended with {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--separate", type=int, default=4, help="studies to run one by one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sweep = folder / "small.py"
        sweep.write_text(SMALL.format(configs=str(ROOT / "configs")))
        begin = time.perf_counter()
        logs = [folder / f"worker_{i}.log" for i in range(options.workers)]
        finish([start("ema_jax.sweep", sweep, folder / "sweep", log) for log in logs])
        swept = time.perf_counter() - begin
        cells = len((folder / "sweep/sweep.csv").read_text().splitlines()) - 1

        def alone(i: int) -> subprocess.Popen:
            target, arm = CELLS[i % len(CELLS)]
            config = folder / f"alone_{i}.py"
            config.write_text(ALONE.format(folder=str(folder), target=target, arm=arm))
            return start("ema_jax.main", config, folder / f"run_{i}", folder / f"run_{i}.log")

        finish([alone(-1)])  # compiles: the following ones find its programs
        begin = time.perf_counter()
        for i in range(0, options.separate, options.workers):
            finish([alone(j) for j in range(i, min(i + options.workers, options.separate))])
        separate = (time.perf_counter() - begin) / options.separate * cells
    figures = {"sweep": swept, "separate": separate, "ratio": separate / swept}
    rounded = {name: round(value, 2) for name, value in figures.items()}
    print(json.dumps({"cells": cells, "cores": os.cpu_count(), **rounded}, indent=2))


if __name__ == "__main__":
    main()
