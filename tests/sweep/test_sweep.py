"""Grids, leases, and workers that share a folder: every cell once, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats
from results_schema import assert_valid
from small_study import small_config, smallest_config

from ema_jax import config as ema
from ema_jax.errors import AskedToStopError, RunStoppedError, UserError
from ema_jax.runtime import files
from ema_jax.runtime.leases import Holder, Leases
from ema_jax.study import runner
from ema_jax.study.workdir import Workdir
from ema_jax.sweep import table, worker
from ema_jax.sweep.grid import cells, points
from ema_jax.sweep.worker import StudyGrid

ROOT = Path(__file__).parents[2]
GRID = {"target": ("cybersecurity", "safety"), "unlearn": {"beta": (0.1, 0.2)}}


def study(grid=None, seeds=(0, 1), **changes):
    config = small_config()
    config.grid = GRID if grid is None else grid
    config.seeds = seeds
    config.update(changes)
    return ema.read(config)


def test_a_grid_is_every_combination():
    found = points(study())
    assert [(p.config.target, p.config.unlearn.beta) for p in found] == [
        (target, beta) for target in GRID["target"] for beta in GRID["unlearn"]["beta"]
    ]
    assert found[1].values == {"target": "cybersecurity", "unlearn.beta": 0.2}
    # What a point does not change itself it has from the config.
    assert all(p.config.unlearn.lora.rank == 4 and not p.config.grid for p in found)
    # β is used in training alone: two groups, one a target, share what comes before.
    assert len({p.group for p in found}) == 2
    assert found[0].group == found[1].group != found[2].group
    made = cells(found)
    assert [cell.number for cell in made] == list(range(16))
    assert len({cell.name for cell in made}) == 16


def test_names_stay_when_the_grid_grows():
    before = {cell.name for cell in cells(points(study()))}
    more = {"target": GRID["target"], "unlearn": {"beta": (0.05, 0.1, 0.2)}}
    after = {cell.name for cell in cells(points(study(more, seeds=(0, 1, 2))))}
    assert before < after


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"unlearn": {"beta": 0.1}}, "an axis needs a tuple"),
        ({"unlearn": {"beta": ()}}, "an axis needs a tuple"),
        ({"unlearn": {"bet": (0.1,)}}, "did you mean 'beta'"),
        ({"unlearn": {"beta": (0.1, -1.0)}}, "beta = -1.0 is not above zero"),
        ({"target": ("safety", "safety")}, "given twice"),
        ({"target": ("chemical_weapons",)}, "deny-listed"),
    ],
)
def test_bad_grids_are_refused(grid, said):
    with pytest.raises(UserError, match=said):
        points(study(grid))


def test_a_grid_is_not_run_as_a_study(tmp_path):
    with pytest.raises(UserError, match=r"ema_jax\.sweep"):
        runner.run(study(), tmp_path, dry_run=True)


def test_a_lease_is_held_by_one_process(tmp_path):
    leases = Leases(tmp_path, expiry=60)
    with leases.take("a") as held:
        assert leases.take("a") is None
        assert leases.take("b") is not None
        assert Holder.read(held.path.read_text()) == Holder.this()
    assert leases.take("a") is not None  # let go


def test_a_silent_lease_is_void_and_only_one_takes_it_over(tmp_path):
    assert Leases(tmp_path, expiry=0.2).take("a") is not None  # not entered: nothing renews it
    taken, gate = [], threading.Barrier(8)

    def rush():
        leases = Leases(tmp_path, expiry=0.2)
        assert leases.take("a") is None
        time.sleep(0.3)
        gate.wait()
        taken.append(leases.take("a"))

    threads = [threading.Thread(target=rush) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([lease for lease in taken if lease is not None]) == 1


def test_a_lease_that_is_held_does_not_expire(tmp_path):
    leases = Leases(tmp_path, expiry=0.2)
    with leases.take("a"):
        time.sleep(0.6)
        assert leases.take("a") is None


def fake_stages(monkeypatch, log: Path, seconds: float = 0.0, diverges: str = ""):
    """Stages that leave manifests and only what the table reads; each is noted."""

    def run(self):
        only = self.workdir._only
        with open(log, "a") as file:
            file.write(json.dumps([str(self.workdir.path.name), list(only), self.runs]) + "\n")
        time.sleep(seconds)
        if only == worker.SHARED:
            for stage in only:
                self.workdir.run(stage, self.settings().get(stage, {}), [], lambda context: [])
            rows = [{"domain": d, "verdict": "refused"} for d in self.config.domains]
            write(self.workdir / "responses/base.jsonl", rows)
        if "unlearn" not in only:
            return
        ((arm, seed),) = self.runs
        if arm == diverges:
            raise RunStoppedError("loss is nan")
        name = f"{arm}.seed_{seed}"
        rows = [{"domain": d, "verdict": "complied"} for d in self.config.domains]
        write(self.workdir / "responses/base.jsonl", [r | {"verdict": "refused"} for r in rows])
        write(self.workdir / f"responses/{name}.jsonl", rows)
        write(self.workdir / f"trajectories/{name}.json", {"steps": 4, "stopped": "limit"})
        utility = {"benign_nll": 1.0, "kl_to_base": 0.5}
        write(self.workdir / f"evaluations/{name}.json", {"utility": utility})

    def write(path: Path, value):
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = value if isinstance(value, list) else [value]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(worker.Study, "run", run)
    monkeypatch.setattr(worker.compilation, "keep_programs", lambda folder: None)


def notes(log: Path) -> list:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_shared_stages_once_a_group_and_every_cell_once(tmp_path, monkeypatch):
    fake_stages(monkeypatch, tmp_path / "log")
    StudyGrid(study(), tmp_path / "sweep").work(expiry=60)
    done = notes(tmp_path / "log")
    assert sum(only == list(worker.SHARED) for _, only, _ in done) == 2
    runs = [(point, *run[0]) for point, only, run in done if "unlearn" in only]
    assert len(runs) == len(set(runs)) == 16
    assert sum(only == ["analyse"] for _, only, _ in done) == 4
    rows = pd.read_csv(tmp_path / "sweep/sweep.csv")
    assert list(rows["cell"]) == list(range(16))
    assert set(rows["unlearn.beta"]) == {0.1, 0.2}
    assert set(rows["mean_off_target_drop"]) == set(rows["mean_off_target_rise"]) == {1.0}
    assert set(rows["target_answered"]) == {1.0}
    assert set(rows["status"]) == {"done"}
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "sweep/sweep.parquet"), rows)
    page = (tmp_path / "sweep/report/index.html").read_text()
    assert page.count("npo_retain") >= 4
    # Nothing is run again, and a larger grid runs what is new.
    StudyGrid(study(), tmp_path / "sweep").work(expiry=60)
    assert len(notes(tmp_path / "log")) == len(done)
    StudyGrid(study(seeds=(0, 1, 2)), tmp_path / "sweep").work(expiry=60)
    more = [run for _, only, run in notes(tmp_path / "log")[len(done) :] if "unlearn" in only]
    assert sorted(seed for ((_, seed),) in more) == [2] * 8


def test_a_cell_that_was_asked_to_stop_is_resumed_and_did_not_diverge(tmp_path, monkeypatch):
    fake_stages(monkeypatch, tmp_path / "log")
    run, left = worker.Study.run, ["once"]

    def asked(self):
        if "unlearn" in self.workdir._only and left:
            left.pop()
            raise AskedToStopError("saved at step 3")
        run(self)

    monkeypatch.setattr(worker.Study, "run", asked)
    with pytest.raises(AskedToStopError):
        StudyGrid(study(), tmp_path / "sweep").work(expiry=60)
    assert not list((tmp_path / "sweep/claims").iterdir())
    StudyGrid(study(), tmp_path / "sweep").work(expiry=60)
    assert set(pd.read_csv(tmp_path / "sweep/sweep.csv")["status"]) == {"done"}


def test_the_table_pairs_prompts_where_invalid_responses_differ(tmp_path):
    (point,) = points(study({"target": ("cybersecurity",)}))
    verdicts = {
        "base": ["refused", "refused", "complied", "invalid"],
        "npo.seed_0": ["invalid", "complied", "complied", "complied"],
    }
    for name, given in verdicts.items():
        rows = [
            {"domain": d, "group": str(i), "verdict": v, "reason": "off_topic"}
            for d in point.config.domains
            for i, v in enumerate(given)
        ]
        files.write_jsonl(tmp_path / f"responses/{name}.jsonl", rows)
    run = {"steps": 4, "stopped": "limit"}
    files.write_json(tmp_path / "trajectories/npo.seed_0.json", run)
    files.write_json(tmp_path / "evaluations/npo.seed_0.json", {"utility": {}})
    found = table._figures(tmp_path, cells([point])[0])
    # Two pairs are valid, and one of them lost; rates over valid responses fall by 2/3.
    assert found["worst_drop"] == found["mean_off_target_drop"] == 0.5
    assert found["worst_rise"] == found["mean_off_target_rise"] == 0.5
    assert found["rate_bias"] == 0


def test_the_summary_averages_every_figure_over_seeds():
    fixed = {"point": "p", "arm": "npo", "unlearn.beta": 0.1}
    rows = [
        {**fixed, "seed": k, "status": "done", "target_rate": x, "response_perplexity": 2.0 + x}
        for k, x in enumerate((0.24, 0.26))
    ]
    rows.append(dict.fromkeys(rows[0]) | fixed | {"seed": 2, "status": "stopped"})
    (made,) = table.summarised(rows, {"point", "arm", "unlearn.beta"})
    low, high = made.pop("target_rate_lo"), made.pop("target_rate_hi")
    expected = scipy.stats.ttest_1samp([0.24, 0.26], 0).confidence_interval()
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert made == {
        **{
            "point": rows[0]["point"],
            "arm": "npo",
            "unlearn.beta": 0.1,
            "target_rate": pytest.approx(0.25),
            "target_rate_max": 0.26,
        },
        **{"response_perplexity": pytest.approx(2.25), "seeds": 2, "stopped": 1},
    }
    # A seed whose target has no valid response is not averaged away.
    rows[1]["target_rate"] = None
    (made,) = table.summarised(rows, {"point", "arm", "unlearn.beta"})
    assert [made[f"target_rate{end}"] for end in ("", "_lo", "_hi", "_max")] == [None] * 4
    assert made["response_perplexity"] == pytest.approx(2.25)
    assert table._interval([0.0, 0.5], 0.0) == (0.0, 1.0)  # a rate has no other values
    assert table._interval([-0.9, 0.1], -1.0) == (-1.0, 1.0)
    assert table._interval([0.1, None], 0.0) == (None, None)


def test_workers_beside_each_other_do_every_cell_once(tmp_path, monkeypatch):
    fake_stages(monkeypatch, tmp_path / "log", seconds=0.02)
    monkeypatch.setattr(worker.table, "write", lambda *_: None)
    threads = [
        threading.Thread(target=StudyGrid(study(), tmp_path / "sweep").work, kwargs={"expiry": 60})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = [(point, *run[0]) for point, only, run in notes(tmp_path / "log") if "unlearn" in only]
    assert len(runs) == len(set(runs)) == 16


def test_an_array_job_takes_one_cell_and_the_last_one_writes_the_table(tmp_path, monkeypatch):
    fake_stages(monkeypatch, tmp_path / "log")
    for number in range(16):
        assert not (tmp_path / "sweep/sweep.csv").exists()
        StudyGrid(study(), tmp_path / "sweep").work(only=number, expiry=60)
    assert len(pd.read_csv(tmp_path / "sweep/sweep.csv")) == 16


def test_a_diverged_cell_is_a_row_and_stops_no_other(tmp_path, monkeypatch):
    fake_stages(monkeypatch, tmp_path / "log", diverges="npo")
    StudyGrid(study(), tmp_path / "sweep").work(expiry=60)
    rows = pd.read_csv(tmp_path / "sweep/sweep.csv")
    assert dict(rows.groupby("arm")["status"].first()) == {"npo": "stopped", "npo_retain": "done"}
    assert rows[rows["arm"] == "npo"]["target_rate"].isna().all()
    analysed = [run for _, only, run in notes(tmp_path / "log") if only == ["analyse"]]
    assert {arm for run in analysed for arm, _ in run} == {"npo_retain"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "stages").mkdir()
    with pytest.raises(UserError, match="holds a study"):
        StudyGrid(study(), tmp_path)


CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from small_study import small_config

def get_config():
    config = small_config()
    config.prompts.counts = {{"harvest": 8, "retain": 8, "dev": 2, "eval": 4, "concept": 4}}
    config.unlearn.max_steps = config.unlearn.eval_every = 2
    config.harvest.min_examples = 2
    config.concepts.permutations = 20
    config.grid = {{"target": ("cybersecurity", "safety"), "unlearn": {{"beta": {betas}}}}}
    config.seeds = tuple(range({seeds}))
    return config
"""


def config_file(folder: Path, betas: str, seeds: int) -> Path:
    path = folder / "config.py"
    path.write_text(CONFIG.format(tests=str(ROOT / "tests/helpers"), betas=betas, seeds=seeds))
    return path


def start(config: Path, folder: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ema_jax.sweep", f"--config={config}", f"--workdir={folder}"]
    with open(log, "a") as file:
        return subprocess.Popen(
            [*command, "--expiry_seconds=5"],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
            stdout=file,
            stderr=file,
        )


@pytest.mark.slow
def test_sixty_four_cells_by_two_workers_of_which_one_is_killed_twice(tmp_path):
    config, folder = config_file(tmp_path, "(0.1, 0.2)", 8), tmp_path / "sweep"
    steady = start(config, folder, tmp_path / "steady.log")
    killed = 0
    victim = start(config, folder, tmp_path / "victim.log")
    while victim.poll() is None or steady.poll() is None:
        finished = len(list((folder / "finished").glob("*.seed_*.json")))
        if killed < 2 and finished >= 10 * (killed + 1) and victim.poll() is None:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            killed += 1
            victim = start(config, folder, tmp_path / "victim.log")
        time.sleep(0.2)
    assert killed == 2
    assert (steady.returncode, victim.returncode) == (0, 0)
    rows = pd.read_csv(folder / "sweep.csv")
    assert list(rows["cell"]) == list(range(64))
    assert len(rows.drop_duplicates(["target", "unlearn.beta", "arm", "seed"])) == 64
    assert set(rows["status"]) == {"done"}


@pytest.mark.usefixtures("optimised")
def test_a_point_of_a_sweep_is_the_study_that_it_stands_for(tmp_path):
    """One real cell: the same figures as by `ema_jax.main`, in a folder that it goes on with."""
    config = smallest_config()
    config.concepts.sweep_prompts = 0  # interventions, which are not compared here
    config.arms = {"npo": {}}
    plain = ema.read(config)
    runner.run(plain, tmp_path / "alone", only=worker.SHARED, dry_run=False)
    runner.run(plain, tmp_path / "alone", only=("unlearn", "evaluate", "analyse"), dry_run=False)
    config.grid = {"target": ("cybersecurity",)}
    StudyGrid(ema.read(config), tmp_path / "sweep").work(expiry=60)
    (point,) = (tmp_path / "sweep/points").iterdir()
    folders = (point, tmp_path / "alone")
    ours, alone = (json.loads((folder / "results.json").read_text()) for folder in folders)
    for key in ("arms", "ema", "utility", "forecast", "erasure"):
        assert ours[key] == alone[key], key
    assert_valid(ours)
    rows = pd.read_csv(tmp_path / "sweep/sweep.csv")
    target = alone["arms"]["npo"]["seeds"]["0"]["refusal"]["cybersecurity"]["rate"]
    assert list(rows["target_rate"]) == [target]
    assert Workdir(point).manifest("unlearn/npo/seed_0") is not None
    runner.run(plain, point, only=("analyse",), dry_run=False)
