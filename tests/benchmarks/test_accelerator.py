"""The script for a day with an accelerator, rehearsed on a CPU; and how it sums figures up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What an image for accelerators need not have.
ABSENT = ("ml_collections", "datasets", "tensorboardX", "statsmodels", "pandas", "matplotlib")


# Phases in one process: a start each is the business of those that are run as commands.
_IN_ONE = """
import sys, time
from pathlib import Path
from accelerator import measure
from accelerator_run import Run
for phase in sys.argv[2:]:
    measure(Run(Path(sys.argv[1]), phase, 0.0, time.time() + 600, True))
"""


def environment(folder: Path) -> dict[str, str]:
    """One device, and without what is absent."""
    for name in ABSENT:
        path = folder / "absent" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise ImportError({name!r})")
    return os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(folder / "absent"),
        "JAX_COMPILATION_CACHE_DIR": str(folder),
    }


def figures(folder: Path) -> list[dict]:
    """What was measured, a line each."""
    return list(map(json.loads, (folder / "out" / "results.jsonl").read_text().splitlines()))


def rehearse(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """Runs the script; its figures."""
    command = [sys.executable, BENCHMARKS / "accelerator.py", "--tiny", f"--out={folder / 'out'}"]
    done = subprocess.run(
        [*command, *arguments], env=environment(folder), capture_output=True, text=True
    )
    return done, figures(folder)


def by_phase(rows: list[dict]) -> dict[str, list]:
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(row["phase"], []).append(row)
    return found


def check(done: subprocess.CompletedProcess, rows: list[dict], folder: Path) -> dict[str, list]:
    """Figures by phase, after what holds for every run."""
    assert done.returncode == 0, done.stdout + (folder / "out" / "log.txt").read_text()
    found = by_phase(rows)
    ended = {row["ended"]: row["exit"] for row in found.pop("all")}
    assert ended == dict.fromkeys(found, 0)
    assert all(phase in done.stdout for phase in found)
    return found


def test_phases_are_processes_whose_figures_stand_in_a_table(tmp_path):
    phases = ("machine", "load")
    done, rows = rehearse(tmp_path, "--phases", *phases, "--seconds=600")
    found = check(done, rows, tmp_path)
    assert tuple(found) == phases
    assert any(row.get("product_tflops", 0) > 0 for row in found["machine"])
    assert [row["load"] for row in found["load"][1:]] == ["first", "second"]


def test_the_cheap_phases(tmp_path):
    phases = ("decode", "capture", "pieces")
    (tmp_path / "out").mkdir()
    variables = environment(tmp_path)
    variables["PYTHONPATH"] += f"{os.pathsep}{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent}"
    command = [sys.executable, "-c", _IN_ONE, str(tmp_path / "out"), *phases]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = by_phase(figures(tmp_path))
    assert tuple(found) == phases
    assert not any("failed" in row or "skipped" in row for rows in found.values() for row in rows)
    assert [row["model"] for row in found["decode"]] == ["base", "adapters"]
    assert all(row["share_of_bound"] > 0 and row["tokens_per_s"] > 0 for row in found["decode"])
    assert found["capture"][-1]["prompts_per_s"] > 0
    assert {row["piece"] for row in found["pieces"]} == {"attention", "head"}


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    done, rows = rehearse(tmp_path, "--seconds=900")
    found = check(done, rows, tmp_path)
    assert [row["right"] for row in found["parity"]] == [True]
    drawn = [row for row in found["train"] if row.get("lengths") == "drawn"]
    assert 0.3 < drawn[0]["fill"] <= 1
    assert drawn[0]["real_tokens_per_s"] <= drawn[0]["tokens_per_s"]
    full = [row["remat"] for row in found["train"] if row.get("lengths") == "full"]
    assert full == ["projections", "full"]
    steps = {(row.get("recompute"), row.get("lengths")) for row in found["theirs"]}
    assert {(False, "full"), (True, "full"), (False, "drawn")} <= steps
    assert sum(found["trace"][0]["shares"].values()) == pytest.approx(1, abs=0.01)


def test_a_phase_without_time_is_left_out_and_the_exit_code_says_so(tmp_path):
    begin = time.monotonic()
    done, rows = rehearse(tmp_path, "--phases", "load", "--seconds=1")
    assert done.returncode == 1
    assert [row["skipped"] for row in rows] == ["load"]
    assert "skipped load" in done.stdout
    assert time.monotonic() - begin < 30


@pytest.fixture
def beside(monkeypatch):
    """Lets a test import the script's modules."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_kernels_are_told_apart(beside):
    from accelerator_step import kind_of, summarise

    expected = {
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "cuBLAS products",
        "gemm_fusion_dot_1234": "Triton products",
        "loop_multiply_fusion_12": "elementwise",
        "input_reduce_fusion": "elementwise",
        "MemcpyD2D": "copies",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "ncclDevKernel_AllReduce": "between devices",
    }
    assert {name: kind_of(name) for name in expected} == expected

    def kernel(name: str, start: int, stop: int, thread: int = 1) -> dict:
        return {"ph": "X", "pid": 1, "tid": thread, "name": name, "ts": start, "dur": stop - start}

    def named(kind: str, name: str, thread: int = 0) -> dict:
        return {"ph": "M", "name": kind, "pid": 1, "tid": thread, "args": {"name": name}}

    events = [
        named("process_name", "/device:GPU:0"),
        named("thread_name", "Stream #14(Compute)", 1),
        named("thread_name", "Stream #15(MemcpyD2D)", 2),
        named("thread_name", "XLA Ops", 3),
        kernel("nvjet_a", 0, 600),
        kernel("loop_add_fusion", 700, 900),
        kernel("MemcpyD2D", 500, 700, 2),
        kernel("dot.3", 0, 900, 3),  # the same again, as XLA's operations
    ]
    found = summarise(events)
    assert found["shares"] == {"cuBLAS products": 0.6, "elementwise": 0.2, "copies": 0.2}
    assert (found["kernels"], found["kernels_ms"], found["busy_ms"]) == (3, 1.0, 0.9)
    assert found["longest_ms"][0] == ["nvjet_a", 0.6]


def test_drawn_rows_have_room_and_one_is_full(beside):
    from accelerator_run import drawn_lengths

    found = drawn_lengths(32, 256, 1)
    assert found == drawn_lengths(32, 256, 1)
    assert all(min(p, r) > 0 and p + r <= 256 for p, r in found)
    assert sum(found[0]) == 256
    assert 0.4 < sum(map(sum, found)) / (32 * 256) < 0.65
