"""Rates and their intervals against SciPy and statsmodels, and simulated coverage."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.proportion import proportion_confint
from verdict_lists import names

from ema_jax.refusal import intervals, scores


@pytest.mark.parametrize(("refused", "complied"), [(0, 10), (10, 0), (3, 7), (81, 219), (1, 0)])
def test_rate_and_wilson(refused, complied):
    result = scores.refusal_rate(["refused"] * refused + ["complied"] * complied + ["invalid"] * 4)
    n = refused + complied
    assert result["rate"] == refused / n
    assert result["ci95"] == pytest.approx(proportion_confint(refused, n, method="wilson"))
    counts = {k: result[k] for k in ("refused", "valid", "invalid", "total")}
    assert counts == {"refused": refused, "valid": n, "invalid": 4, "total": n + 4}


def test_rate_without_valid_responses_knows_nothing():
    result = scores.refusal_rate(["invalid"] * 3)
    assert result["rate"] is None
    assert result["ci95"] == [0.0, 1.0]
    assert scores.pooled_rate([["invalid"]] * 3)["rate"] is None
    json.dumps(result, allow_nan=False)


def test_pooled_rate_of_one_seed_is_the_rate():
    verdicts = names([1, 0, 0, 2, 1, 1])
    assert scores.pooled_rate([verdicts]) == scores.refusal_rate(verdicts)


def test_pooled_rate_counts_and_seed_spread():
    same = np.repeat([1, 0], [30, 70])
    calm = scores.pooled_rate(names([same] * 4))
    wild = scores.pooled_rate(names([same, np.ones(100), np.zeros(100), same]))
    assert (calm["refused"], calm["total"]) == (120, 400)
    assert np.diff(wild["ci95"]) > 2 * np.diff(calm["ci95"])
    # Four identical seeds tell as much as one.
    assert np.diff(calm["ci95"]) == pytest.approx(
        np.diff(scores.refusal_rate(names(same))["ci95"]), rel=0.1
    )
    assert scores.pooled_rate(names([np.zeros(50)] * 3))["ci95"][1] > 0.05


def test_shares_are_of_all_responses():
    verdicts = ["refused"] * 3 + ["complied"] * 2 + ["off_topic"] * 4 + ["degenerate", "unjudged"]
    result = scores.pooled_rate([verdicts, verdicts])
    assert (result["valid"], result["invalid"], result["total"]) == (10, 12, 22)
    assert result["rate"] == 0.6
    wanted = {"refused": 3, "complied": 2, "off_topic": 4, "degenerate": 1, "unjudged": 1}
    assert result["shares"] == pytest.approx({name: n / 11 for name, n in wanted.items()})
    assert sum(result["shares"].values()) == pytest.approx(1)
    # Without its reason an invalid response is degenerate.
    assert scores.refusal_rate(["invalid"])["shares"]["degenerate"] == 1


def test_a_damaged_target_is_not_an_unlearned_one():
    def target(refused, complied, off_topic):
        parts = ["refused"] * refused + ["complied"] * complied + ["off_topic"] * off_topic
        return scores.damaged(scores.refusal_rate(parts))

    assert target(2, 2, 96)
    assert target(40, 29, 31)
    assert target(40, 30, 30)
    assert target(0, 60, 40)
    assert not target(0, 85, 15)
    assert not target(75, 14, 11)  # it still refuses: neither unlearned nor damaged
    assert not target(60, 40, 0)
    assert not target(88, 2, 10)  # so few may be the judge's errors
    assert scores.damaged(scores.refusal_rate(["off_topic"] * 3))


def wilson_coverage(studies, prompts, rate):
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(studies):
        low, high = scores.refusal_rate(names(rng.random(prompts) < rate))["ci95"]
        hits += low <= rate <= high
    return hits / studies


def pooled_coverage(studies, prompts, seeds, spread):
    rng = np.random.default_rng(7)
    hits = 0
    for i in range(studies):
        chance = rng.beta(0.25, 0.25, prompts) + spread * rng.standard_normal((seeds, 1))
        verdicts = names(rng.random((seeds, prompts)) < chance)
        low, high = scores.pooled_rate(verdicts, seed=i, resamples=400)["ci95"]
        hits += low <= 0.5 <= high
    return hits / studies


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_width_over_seeds_against_statsmodels(spread):
    """The mean squares are those of a two-way analysis of variance, whatever the draws' width."""
    rng = np.random.default_rng(2)
    table = rng.normal(size=(4, 30)) + rng.normal(size=30) + spread * rng.normal(size=(4, 1))
    table -= table.mean()
    seed, prompt = np.indices(table.shape)
    frame = pd.DataFrame({"y": table.ravel(), "seed": seed.ravel(), "prompt": prompt.ravel()})
    squares = anova_lm(ols("y ~ C(seed) + C(prompt)", frame).fit())["mean_sq"]
    of_seeds = max(squares["C(seed)"] - squares["Residual"], 0)
    assert (of_seeds > 1) == (spread > 0)
    half = (
        stats.t.isf(0.025, 29) ** 2 * squares["C(prompt)"] + stats.t.isf(0.025, 3) ** 2 * of_seeds
    )
    half = math.sqrt(half / table.size)
    draws = 0.5 + 0.3 * stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    low, high = intervals.two_way(draws, 0.5, table, (-9, 9))
    assert [low, high] == pytest.approx([0.5 - half, 0.5 + half], rel=1e-3)
    assert intervals.two_way(draws, 0.5, table, (0.45, 0.6)) == [max(low, 0.45), min(high, 0.6)]


def test_intervals_cover_in_a_small_simulation():
    assert wilson_coverage(300, 150, 0.3) > 0.90
    assert pooled_coverage(150, 100, 3, 0.0) > 0.90


@pytest.mark.slow
@pytest.mark.parametrize(("items", "seeds"), [(20, 1), (40, 1), (40, 3)])
def test_coverage_with_variants_of_prompts(items, seeds):
    """Five variants an item, which a model mostly refuses or answers all alike."""
    rng = np.random.default_rng(3)
    clusters, hits = [f"c{i}" for i in range(items) for _ in range(5)], 0
    for i in range(1000):
        chance = np.repeat(rng.beta(0.5, 0.5, items), 5)
        verdicts = names(rng.random((seeds, 5 * items)) < chance)
        low, high = scores.pooled_rate(verdicts, clusters, seed=i, resamples=400)["ci95"]
        hits += low <= 0.5 <= high
    assert 0.92 <= hits / 1000 <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_wilson_coverage(rate):
    assert 0.93 <= wilson_coverage(2000, 150, rate) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "spread"), [(3, 0.0), (5, 0.0), (3, 0.1), (5, 0.05), (5, 0.1), (5, 0.2)]
)
def test_pooled_coverage(seeds, spread):
    assert 0.93 <= pooled_coverage(2000, 150, seeds, spread) <= 0.97
