import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import permutation_test, spearmanr
from sklearn.metrics import roc_auc_score

from ema_jax.concepts.entanglement import Calibrated, Entanglement
from ema_jax.concepts.erasure import angle_degrees, erasure, norm_ratio, probe_auroc, ranking
from ema_jax.concepts.forecast import (
    _induced,
    advice,
    category_forecast,
    early_layers,
    forecast,
    layer_profile,
    pooled_interval,
    pooled_score,
    retain_counts,
    retain_shares,
    score,
)
from ema_jax.concepts.vectors import concept_vectors
from ema_jax.errors import UserError


def random_vectors(seed=0, layers=3, width=16):
    rng = np.random.default_rng(seed)
    return {d: rng.normal(size=(layers, width)).astype(np.float32) for d in ("safety", "bias")}


@pytest.mark.parametrize(
    ("keep", "gone", "length", "angle"),
    [(1.0, 0.0, 1.0, 0.0), (0.25, 0.75, 0.25, 0.0), (-1.0, 2.0, 1.0, 180.0), (2.0, -1.0, 2.0, 0.0)],
)
def test_scaled_vectors(keep, gone, length, angle):
    base = random_vectors()
    arm = {d: np.float32(keep) * v for d, v in base.items()}
    np.testing.assert_allclose(erasure(base, arm)["bias"], gone, atol=1e-6)
    np.testing.assert_allclose(norm_ratio(base, arm)["bias"], length, rtol=1e-6)
    np.testing.assert_allclose(angle_degrees(base, arm)["bias"], angle, atol=1e-5)


def test_ablated_direction_is_all_gone_and_what_was_added_elsewhere_does_not_count():
    base, other = random_vectors(), random_vectors(1)
    arm = {}
    for d, v in base.items():
        along = (other[d] * v).sum(1, keepdims=True) / (v * v).sum(1, keepdims=True)
        arm[d] = other[d] - along * v
    np.testing.assert_allclose(erasure(base, arm)["bias"], 1, atol=1e-5)
    np.testing.assert_allclose(angle_degrees(base, arm)["bias"], 90, atol=1e-4)
    both = {d: base[d] + arm[d] for d in base}
    np.testing.assert_allclose(erasure(base, both)["bias"], 0, atol=1e-5)


def test_restated_per_layer_and_exact_at_small_angles():
    base, arm = random_vectors(), random_vectors(1)
    for layer in range(3):
        v, w = (x["bias"][layer].astype(float) for x in (base, arm))
        assert erasure(base, arm)["bias"][layer] == pytest.approx(1 - w @ v / (v @ v))
        cos = w @ v / np.sqrt((w @ w) * (v @ v))
        assert angle_degrees(base, arm)["bias"][layer] == pytest.approx(np.degrees(np.arccos(cos)))
    x = {"bias": np.array([[1.0, 0.0]])}
    turned = {"bias": np.array([[1.0, 1e-9]])}
    assert angle_degrees(x, turned)["bias"][0] == pytest.approx(np.degrees(1e-9))


def test_zero_base_vectors_are_undefined_and_left_out_of_the_ranking():
    base = random_vectors()
    base["bias"][0] = 0
    arm = {d: 0.5 * v for d, v in base.items()}
    for measure in (erasure, norm_ratio, angle_degrees):
        found = measure(base, arm)["bias"]
        assert np.isnan(found[0])
        assert np.isfinite(found[1:]).all()
    assert ranking(erasure(base, arm))[0].mean == pytest.approx(0.5)
    with pytest.raises(UserError, match="safety"):
        erasure(base, {"bias": arm["bias"]})


def models(seed=0, n=60, erased=None, signal=1.5):
    """Base and arm on the same prompts; the arm lost the share `erased[d]` of each concept."""
    erased = erased or {}
    rng = np.random.default_rng(seed)
    base, arm = {}, {}
    for d in ("safety", "bias", "benign"):
        concept = signal * rng.normal(size=(1, 4, 12)) / np.sqrt(12) * (d != "benign")
        noise = rng.normal(size=(n, 4, 12)) / 2
        base[d] = (concept + noise).astype(np.float32)
        arm[d] = ((1 - erased.get(d, 0)) * concept + noise).astype(np.float32)
    return base, arm


def test_probe_restated_with_sklearn():
    base, arm = models(erased={"bias": 0.6})
    rng = np.random.default_rng(5)
    halves = {d: np.array_split(rng.permutation(60), 2) for d in ("bias", "benign")}
    found = probe_auroc(base, arm, "bias", seed=5)
    for layer in range(4):
        folds = []
        for fit, test in ((0, 1), (1, 0)):
            b, c = (base[d][halves[d][fit], layer].mean(0) for d in ("bias", "benign"))
            x = np.concatenate([arm[d][halves[d][test], layer] for d in ("bias", "benign")])
            y = np.repeat([1, 0], [len(halves["bias"][test]), len(halves["benign"][test])])
            folds.append(roc_auc_score(y, x @ (b - c)))
        assert found[layer] == pytest.approx(np.mean(folds), abs=1e-9)


def test_probe_is_blind_after_erasure_and_chance_without_concept():
    base, arm = models(erased={"bias": 1.0})
    assert (probe_auroc(base, base, "bias") > 0.9).all()
    assert (np.abs(probe_auroc(base, arm, "bias") - 0.5) < 0.2).all()
    # Cross-fitting: with noise alone the probe must not recognise the prompts it was fitted on.
    noise, _ = models(signal=0.0, n=20)
    wide = {d: np.tile(x, (1, 20, 1)) for d, x in noise.items()}
    assert abs(probe_auroc(wide, wide, "bias").mean() - 0.5) < 0.2
    same = {d: np.ones((6, 2, 3), np.float32) for d in ("bias", "benign")}
    np.testing.assert_array_equal(probe_auroc(same, same, "bias"), 0.5)


def test_probe_needs_the_same_prompts():
    base, arm = models()
    arm["bias"] = arm["bias"][:-1]
    with pytest.raises(UserError, match="60 base and 59 arm prompts of 'bias'"):
        probe_auroc(base, arm, "bias")


def test_ranking_orders_by_erasure_with_intervals():
    base, arm = models(erased={"bias": 0.2, "safety": 0.7}, n=100)
    gone = erasure(concept_vectors(base), concept_vectors(arm))
    assert [row.domain for row in ranking(gone)] == ["safety", "bias"]
    assert ranking(gone)[0].ci95 is None
    safety, bias = ranking(gone, base, arm)
    assert safety.ci95[0] < safety.mean < safety.ci95[1]
    assert safety.ci95[0] > bias.ci95[1]


def test_ranking_interval_against_redrawn_studies():
    """The bootstrap's width against the spread over independent prompts of the same population."""
    rng = np.random.default_rng(6)
    concept = rng.normal(size=(1, 3, 10))
    means, widths = [], []
    for _ in range(60):
        noise = rng.normal(size=(2, 40, 3, 10))
        gain = rng.normal(0.5, 0.5, size=(40, 1, 1))
        base = {"bias": concept + noise[0], "benign": noise[1]}
        arm = {"bias": gain * concept + noise[0], "benign": noise[1]}
        gone = erasure(concept_vectors(base), concept_vectors(arm))
        (row,) = ranking(gone, base, arm)
        means.append(row.mean)
        widths.append((row.ci95[1] - row.ci95[0]) / 3.92)
    assert np.mean(widths) == pytest.approx(np.std(means), rel=0.25)


def made_entanglement(centred, target="cybersecurity"):
    layers = len(next(iter(centred.values())))
    flat = {d: np.zeros(layers) for d in centred}
    ci95 = {d: np.zeros((layers, 2)) for d in centred}
    arrays = {d: np.array(x, float) for d, x in centred.items()}
    return Entanglement(
        target=target,
        domains=(target, *centred),
        measures={
            "cosine": Calibrated(flat, flat, flat, flat, flat, ci95),
            "cosine_centred": Calibrated(arrays, flat, flat, flat, flat, ci95),
        },
        outlier_share=flat,
    )


def test_early_layers_are_the_declared_ones():
    assert [list(early_layers(L))[-1] for L in (1, 3, 4, 8, 28, 32)] == [1, 1, 2, 3, 10, 11]
    assert early_layers(32)[0] == 1


def test_forecast_is_the_mean_centred_cosine_over_early_layers():
    # Six blocks: layers 1 and 2 count; layer 0 and the late ones must not.
    found = forecast(
        made_entanglement(
            {"safety": [9, 0.2, 0.4, 9, 9, 9, 9], "bias": [-9, 0.5, 0.7, -9, -9, -9, -9]}
        ),
        "cybersecurity",
    )
    assert found == {"safety": pytest.approx(0.3), "bias": pytest.approx(0.6)}
    assert advice(found, k=1) == ["bias"]
    assert advice(found) == ["bias", "safety"]
    assert advice({"b": 0.1, "a": 0.1, "c": 0.0}, k=2) == ["a", "b"]


def test_category_forecast_restated():
    rng, kinds = np.random.default_rng(0), ["a"] * 10 + ["b"] * 12 + ["few"] * 7 + [""] * 11
    names = ("cybersecurity", "safety", "bias")
    made = {d: rng.normal(size=(40, 7, 16)) + rng.normal(size=16) for d in (*names, "benign")}
    categories = {"safety": kinds, "cybersecurity": kinds}
    found = category_forecast(made, categories, "cybersecurity", names)
    mean = {d: x.mean(0) for d, x in made.items()}
    vectors = np.array([mean[d] - mean["benign"] for d in names])
    centre, target = vectors.mean(0), vectors[0] - vectors.mean(0)
    # Not the target's own, and none of seven prompts; layers 1 and 2 of six blocks.
    assert list(found) == ["safety/a", "safety/b"]
    for name, part in (("safety/a", slice(10)), ("safety/b", slice(10, 22))):
        own = made["safety"][part].mean(0) - mean["benign"] - centre
        cosines = [
            own[i] @ target[i] / np.linalg.norm(own[i]) / np.linalg.norm(target[i]) for i in (1, 2)
        ]
        assert found[name] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_forecast_of_another_target_is_refused():
    with pytest.raises(UserError, match="measured against 'cybersecurity'"):
        forecast(made_entanglement({"bias": [0, 1]}), "safety")


def as_dicts(x, y):
    names = [f"d{i}" for i in range(len(x))]
    return dict(zip(names, x, strict=True)), dict(zip(names, y, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_score_against_scipy(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 6))
    found = score(*as_dicts(x, y))
    exact = permutation_test(
        (y,), lambda z: spearmanr(x, z).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert found["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    assert found["p"] == pytest.approx(exact.pvalue)
    assert found["n"] == 6


def test_score_with_ties_counts_every_ordering():
    x, y = [0.1, 0.1, 0.4, 0.6, 0.6], [0.0, 0.2, 0.2, 0.5, 0.3]
    found = score(*as_dicts(x, y))
    rho = spearmanr(x, y).statistic
    orders = [spearmanr(x, order).statistic for order in itertools.permutations(y)]
    assert found["spearman"] == pytest.approx(rho)
    assert found["p"] == pytest.approx(np.mean(np.abs(orders) >= abs(rho) - 1e-12))


def test_score_of_perfect_and_reversed_orders():
    x = [1, 2, 3, 4, 5, 6]
    assert score(*as_dicts(x, x)) == {"spearman": pytest.approx(1), "p": 2 / 720, "n": 6}
    assert score(*as_dicts(x, x[::-1]))["spearman"] == pytest.approx(-1)


def test_score_beyond_exact_orderings_is_sampled_and_repeatable():
    x, y = np.random.default_rng(3).normal(size=(2, 12))
    y += 0.5 * x
    found = score(*as_dicts(x, y))
    exact = permutation_test(
        (y,), lambda z: spearmanr(x, z).statistic, permutation_type="pairings", n_resamples=2000
    )
    assert found["p"] == pytest.approx(exact.pvalue, abs=0.03)
    assert found == score(*as_dicts(x, y))


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([1, 1, 1], [1, 2, 3], "all forecasts are equal"),
        ([1, 2, 3], [0, 0, 0], "all measured drops are equal"),
        ([1, 2, 3], [1, None, 2], "2 domains"),
        ([1, 2, np.nan], [1, 3, 2], "2 domains"),
    ],
)
def test_undefined_scores_are_null_with_a_reason(x, y, reason):
    found = score(*as_dicts(x, y))
    assert found["spearman"] is None
    assert found["p"] is None
    assert reason in found["reason"]
    json.dumps(found, allow_nan=False)


def test_unmeasured_domains_are_left_out_and_missing_ones_are_errors():
    x, y = as_dicts([1, 2, 3, 4], [1, 2, 4, None])
    assert score(x, y)["n"] == 3
    with pytest.raises(UserError, match="no measured EMA for d0"):
        score(x, {"d1": 1.0, "d2": 1.0, "d3": 1.0})


def test_layer_profile_is_spearman_per_layer():
    rng = np.random.default_rng(4)
    centred = {d: rng.normal(size=4) for d in "abcde"}
    for x in centred.values():
        x[0] = np.nan
    ema = {d: float(x) for d, x in zip("abcde", rng.normal(size=5), strict=True)}
    profile = layer_profile(made_entanglement(centred), ema)
    assert np.isnan(profile[0])
    for layer in range(1, 4):
        expected = spearmanr([centred[d][layer] for d in "abcde"], list(ema.values())).statistic
        assert profile[layer] == pytest.approx(expected)


def all_correlations(forecast, measured):
    """Spearman's correlation of every order of the measurements, the given one first."""
    orders = itertools.permutations(measured.values())
    return np.array([spearmanr(list(forecast.values()), order).statistic for order in orders])


@pytest.mark.parametrize("second", ["abcd", "wxyz"])
def test_pooled_over_cells_against_all_permutations(second):
    """Cells of the same domains are relabelled alike, 24 orders; others freely, 24 x 24."""
    rng = np.random.default_rng(0)
    cells = [
        (dict(zip(names, rng.normal(size=4), strict=True)), dict(zip(names, y, strict=True)))
        for names, y in (("abcd", [0.1, 0.4, 0.2, 0.3]), (second, [0.2, 0.1, 0.1, 0.5]))
    ]
    found = pooled_score(cells)
    one, two = (all_correlations(*cell) for cell in cells)
    every = (one + two if second == "abcd" else np.add.outer(one, two)) / 2
    assert found["spearman"] == pytest.approx(every.flat[0])
    assert found["cells"] == 2
    assert found["p"] == pytest.approx((every >= every.flat[0] - 1e-12).mean(), abs=0.006)
    # Another level of spill in one cell is no agreement.
    shifted = [cells[0], (cells[1][0], {d: x + 9 for d, x in cells[1][1].items()})]
    assert pooled_score(shifted) == found


def test_a_cell_again_is_no_further_evidence():
    """Four models in which the same domains spill, and are foreseen, are one ranking."""
    forecast = dict(zip("abcdef", [1, 2, 3, 4, 5, 6], strict=True))
    measured = dict(zip("abcdef", [2, 1, 4, 3, 6, 5], strict=True))
    p = pooled_score([(forecast, measured)])["p"]
    assert pooled_score([(forecast, measured)] * 4)["p"] == pytest.approx(p, abs=1e-9)
    exact = all_correlations(forecast, measured)
    assert p == pytest.approx((exact >= exact[0] - 1e-12).mean(), abs=0.003)


def test_permutations_on_some_names_are_uniform_and_alike():
    """What cells with other targets see of one relabelling of all domains."""
    every = np.array(list(itertools.permutations(range(5))))
    for members in ([0, 1, 2, 3], [4, 1, 2], [3]):
        seen, counts = np.unique(_induced(every, members), axis=0, return_counts=True)
        assert len(seen) == math.factorial(len(members))
        assert set(counts) == {len(every) // len(seen)}
    np.testing.assert_array_equal(_induced(every, range(5)), every)
    # 0 → 4 → 2 and 1 → 1: without 4, 0 goes to 2.
    assert _induced(np.array([[4, 1, 0, 3, 2]]), [0, 1, 2, 3]).tolist() == [[2, 1, 0, 3]]


def test_pooled_leaves_out_what_cannot_be_scored():
    flat = ({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 0.1, "b": 0.1, "c": 0.1})
    good = ({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 0.1, "b": 0.2, "c": 0.3})
    assert pooled_score([flat, ({}, {})]) == {"spearman": None, "p": None, "cells": 0}
    found = pooled_score([flat, good])
    assert (found["cells"], found["spearman"]) == (1, pytest.approx(1))
    assert found["p"] == pytest.approx(1 / 6, abs=0.006)


def test_interval_over_seeds_against_a_plain_loop():
    rng = np.random.default_rng(3)
    names = "abcdef"
    cells = [
        (
            dict(zip(names, rng.normal(size=6), strict=True)),
            [dict(zip(names, rng.normal(size=6), strict=True)) for _ in range(4)],
        )
        for _ in range(2)
    ]
    drawn = []
    for _ in range(3000):
        rho = []
        for foreseen, runs in cells:
            picked = [runs[i] for i in rng.integers(0, 4, 4)]
            mean = [np.mean([run[d] for run in picked]) for d in names]
            rho.append(spearmanr(list(foreseen.values()), mean).statistic)
        drawn.append(np.mean(rho))
    np.testing.assert_allclose(
        pooled_interval(cells), np.quantile(drawn, (0.025, 0.975)), atol=0.04
    )
    # Seeds that agree leave no doubt; one seed says nothing of others.
    same = [(foreseen, runs[:1] * 3) for foreseen, runs in cells]
    observed = pooled_score([(foreseen, runs[0]) for foreseen, runs in cells])["spearman"]
    np.testing.assert_allclose(pooled_interval(same), [observed] * 2, atol=1e-12)
    assert pooled_interval([(foreseen, runs[:1]) for foreseen, runs in cells]) is None
    assert pooled_interval([({}, [])]) is None


def test_retain_composition_follows_the_forecast_within_its_budget():
    scores = {"safety": 0.5, "bias": 0.1, "privacy": -0.3}
    shares = retain_shares(scores)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["privacy"] == pytest.approx(1 / 6)  # the lowest has half an even share
    assert shares["safety"] > shares["bias"] > shares["privacy"]
    for budget in (3, 4, 10, 32, 101):
        counts = retain_counts(scores, budget)
        assert sum(counts.values()) == budget
        assert min(counts.values()) >= 1
        assert counts["safety"] >= counts["bias"] >= counts["privacy"]
    assert retain_counts({"a": 0.2, "b": 0.2}, 6) == {"a": 3, "b": 3}
    with pytest.raises(UserError, match="2 examples for 3 domains"):
        retain_counts(scores, 2)
