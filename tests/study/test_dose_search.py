"""The search for an arm's dose in a study: with a stand-in for training, and end to end."""

import types

import numpy as np
import pytest
from small_study import small_config

from ema_jax import config as ema
from ema_jax.data.domains import BENIGN
from ema_jax.data.prompts import Prompt
from ema_jax.errors import UserError
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.report import doses
from ema_jax.runtime.files import read_json, write_json
from ema_jax.study import dose_search, runner
from ema_jax.study.arm_training import arm_settings
from ema_jax.study.artifacts import Artifacts
from ema_jax.unlearning.run_checkpoints import NonFiniteError

TARGET = "cybersecurity"


def shares(**known: float) -> dict[str, float]:
    kinds = dict.fromkeys(("refused", "complied", "off_topic", "degenerate", "unjudged"), 0.0)
    return kinds | known


def rates(refused: float, degenerate: float = 0.0) -> Evaluation:
    target = shares(refused=refused, degenerate=degenerate, complied=1 - refused - degenerate)
    refusal = {TARGET: refused / (1 - degenerate), BENIGN: 0.0}
    return Evaluation(refusal, degenerate, {TARGET: target, BENIGN: shares(complied=1.0)})


class StandIn:
    """A model that a learning rate up to 1e-4 leaves refusing and that one from 1e-3 on breaks."""

    def __init__(self, folder, monkeypatch, trials=5):
        config = small_config()
        config.dose.trials, config.dose.max_steps, config.dose.prompts = trials, 16, 2
        config.unlearn.max_steps, config.unlearn.learning_rate = 100, 1e-4
        self.config, self.artifacts = ema.read(config), Artifacts(folder)
        self.partial = folder / "trials.json"
        self.trained: list[float] = []
        self.asked: list[list[str]] = []
        domains = (TARGET, "bias", BENIGN)
        prompts = [
            Prompt(f"{d}{i}", d, "dev", f"{d} {i}", "made", "", "", "")
            for d in domains
            for i in range(3)
        ]
        self.artifacts.prompts = types.SimpleNamespace(read=lambda: {"dev": prompts})
        monkeypatch.setattr(dose_search, "train", self.train)

    def respond_and_judge(self, model, prompts, screen=None):
        self.asked.append([prompt.id for prompt in prompts])
        return types.SimpleNamespace(rates=lambda: model)

    def train(self, session, artifacts, settings, seed, evaluate, *, restore_valid):
        assert (seed, restore_valid, settings.max_steps) == (0, False, 16)
        rate = settings.learning_rate
        self.trained.append(rate)
        if rate > 5e-3:
            raise NonFiniteError("loss is nan", 3, [0], [])
        end = rates(0.9) if rate <= 1e-4 else rates(0.0, 0.9) if rate >= 1e-3 else rates(0.05)
        models = [(0, rates(0.95)), (2, rates(0.9)), (4, end)]
        points = [evaluate(model).point(step) for step, model in models]
        return types.SimpleNamespace(trajectory=[{**p, "log_ratio": 0.0} for p in points])

    def search(self):
        return dose_search.search_dose(self, self.artifacts, "npo", None, self.partial)


def test_the_search_says_what_it_tried_and_what_it_cost(tmp_path, monkeypatch):
    study = StandIn(tmp_path, monkeypatch)
    found = study.search()
    assert study.trained == [1e-4, 3e-4]
    tried = [(t["learning_rate"], t["outcome"], t["best_step"]) for t in found["trials"]]
    assert tried == [(1e-4, "too_little", 2), (3e-4, "fits", 4)]
    assert found["fits"]
    assert (found["learning_rate"], found["eval_every"], found["steps"]) == (3e-4, 1, 8)
    # The untouched model is asked once, only about target and contrast.
    assert study.asked == [[f"{d}{i}" for d in (TARGET, BENIGN) for i in range(2)]] * 5
    assert found["responses"] == 20
    assert found["trials"][0]["points"][0] == found["trials"][1]["points"][0]
    study.artifacts.dose("npo").write(found)
    settings = arm_settings(study.config, study.artifacts, "npo")
    assert (settings.learning_rate, settings.eval_every) == (3e-4, 1)
    assert settings.max_steps == 100


def test_a_search_that_was_killed_resumes_after_its_last_trial(tmp_path, monkeypatch):
    whole = StandIn(tmp_path / "whole", monkeypatch).search()
    study = StandIn(tmp_path / "killed", monkeypatch)
    write_json(study.partial, whole["trials"][:1])
    assert study.search() == whole
    assert study.trained == [3e-4]
    assert read_json(study.partial) == whole["trials"]


def test_a_search_without_success_uses_the_nearest_and_says_so(tmp_path, monkeypatch, caplog):
    study = StandIn(tmp_path, monkeypatch, trials=1)
    found = study.search()
    assert (found["fits"], found["learning_rate"], found["eval_every"]) == (False, 1e-4, 4)
    assert "no learning rate of 1 trials" in caplog.text
    assert "harvest.samples" in caplog.text


def test_a_loss_that_is_not_finite_is_too_much(tmp_path, monkeypatch):
    study = StandIn(tmp_path, monkeypatch)
    object.__setattr__(study.config.arm("npo"), "learning_rate", 1e-2)
    found = study.search()
    assert study.trained == pytest.approx([1e-2, 3.3e-3, 1.1e-3, 3.7e-4])
    assert found["trials"][0]["outcome"] == "too_much"
    assert found["fits"]


def test_the_table_of_a_report(tmp_path, monkeypatch):
    found = StandIn(tmp_path, monkeypatch).search()
    table = doses.table({"arms": {"base": {}, "npo": {"dose": found}}})
    ((title, rows),) = table.groups
    assert title == "npo (20 responses)"
    assert [(row.cells[0], row.cells[1], row.strong) for row in rows] == [
        ("0.0001", "still refuses", False),
        ("0.0003 (chosen)", "fits", True),
    ]
    assert doses.table({"arms": {"base": {}, "npo": {}}}) is None


def test_a_sweep_has_no_search():
    config = small_config()
    config.dose.trials, config.grid = 2, {"unlearn": {"beta": (0.1, 1.0)}}
    with pytest.raises(UserError, match=r"grid and dose\.trials"):
        ema.read(config)


@pytest.mark.slow
def test_a_rate_that_breaks_the_embedded_model_is_replaced_by_one_that_unlearns(tmp_path):
    config = small_config()
    config.prompts.counts = {"harvest": 160, "retain": 8, "dev": 20, "eval": 20, "concept": 8}
    config.harvest.samples = 4
    config.unlearn = {**ema.default().unlearn, "beta": 1.0, "learning_rate": 2e-2, "max_steps": 80}
    config.arms, config.concepts.sweep_prompts = {"npo": {}}, 0
    config.dose.trials, config.dose.max_steps = 6, 60
    runner.run(ema.read(config), tmp_path, only=None, dry_run=False)
    results = read_json(tmp_path / "results.json")
    arm = results["arms"]["npo"]
    found, run = arm["dose"], arm["seeds"]["0"]
    assert found["trials"][0]["outcome"] == "too_much"
    assert found["fits"]
    assert found["learning_rate"] < 2e-2
    assert run["stopped"] == "target"
    answered = run["refusal"][TARGET]["shares"]["complied"]
    assert answered >= 0.6
    assert np.isfinite(run["first_loss"])
    assert "dose/npo" in results["provenance"]["wall_seconds"]
    assert "Search for the dose" in (tmp_path / "report/index.html").read_text()
