"""Figures that `results.json` derives from those of arms, seeds and prompts."""

import numpy as np
import pytest
from scipy import stats

from ema_jax import analysis
from ema_jax.artifacts import write_jsonl
from ema_jax.config import StudyConfig
from ema_jax.refusal import scores
from ema_jax.stages import Workdir


def test_arms_with_retain_data_are_compared_by_seed():
    def run(target, bias, safety, invalid=0):
        rates = {"cybersecurity": target, "bias": bias, "safety": safety}
        counts = {"invalid": invalid, "total": 10}
        shares = {"complied": 0.9 - target}
        return {"refusal": {d: {"rate": x, "shares": shares, **counts} for d, x in rates.items()}}

    retain = {"retain_weight": 1.0}
    config = StudyConfig(
        target="cybersecurity",
        domains=("cybersecurity", "bias", "safety"),
        arms={"npo": {}, "a": retain, "b": retain},
    )
    plain = {"seeds": {"0": run(0, 0, 0), "1": run(0, 0, 0)}}
    a = {"seeds": {"0": run(0.1, 0.8, 1.0), "1": run(0.2, 0.7, 0.7, invalid=3)}}
    b = {"seeds": {"0": run(0.0, 0.9, 0.5), "1": run(0.2, 0.6, 0.6)}}
    (entry,) = analysis._comparisons({"npo": plain, "a": a, "b": b}, config)
    assert (entry["arm"], entry["minus"]) == ("a", "b")
    assert entry["target"]["difference"] == pytest.approx(0.05)
    assert entry["answered"]["difference"] == pytest.approx(-0.05)
    assert entry["others"] == scores.seed_difference([0.9, 0.7], [0.7, 0.6])
    assert entry["invalid"]["difference"] == pytest.approx(0.15)


def test_categories_are_scored_over_all_and_within_domains(tmp_path):
    rng = np.random.default_rng(0)
    rates = {f"{d}/{k}": rng.random() for d in ("bias", "safety") for k in "abcde"}
    sizes = dict.fromkeys(rates, 20) | {"bias/e": 5}
    forecast = {name: -x for name, x in rates.items()} | {"bias/not asked": 0.5}

    def rows(refuse):
        for name, n in sizes.items():
            domain, _, kind = name.partition("/")
            for i in range(n):
                verdict = "refused" if refuse(name, i / n) else "complied"
                yield {"domain": domain, "category": kind, "verdict": verdict}

    workdir = Workdir(tmp_path)
    write_jsonl(workdir / "responses/base.jsonl", rows(lambda name, x: True))
    for seed in (0, 1):
        kept = rows(lambda name, x, seed=seed: x < rates[name] - 0.1 * seed)
        write_jsonl(workdir / f"responses/npo.seed_{seed}.jsonl", kept)
    found = analysis._categories(workdir, {"category_score": forecast}, "npo", (0, 1))
    assert set(found["score"]) == set(found["drop"]) == set(rates) - {"bias/e"}
    left = [np.mean([np.mean(np.arange(20) / 20 < rates["safety/a"] - 0.1 * s)]) for s in (0, 1)]
    assert found["drop"]["safety/a"] == pytest.approx(1 - np.mean(left))
    pairs = np.array([(found["score"][name], found["drop"][name]) for name in found["score"]])
    assert found["spearman"] == pytest.approx(stats.spearmanr(*pairs.T).statistic)
    assert found["p"] < 0.01
    assert found["within_domains"]["cells"] == 2
    assert found["within_domains"]["p"] < 0.01
    assert analysis._categories(workdir, {}, "npo", (0, 1)) is None
