"""Order among numbers known to rounding only, against scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from ema_jax.concepts.entanglement import all_pairs
from ema_jax.concepts.erasure import probe_auroc
from ema_jax.concepts.forecast import advice, retain_counts, score
from ema_jax.concepts.probes import logistic_probe
from ema_jax.concepts.rank_agreement import auroc, centred_ranks


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("digits", [1, 12])
def test_auroc_is_scikit_learns(dtype, offset, digits):
    rng = np.random.default_rng(0)
    positive = (np.round(rng.normal(0.4, 1, (3, 40)), digits) + offset).astype(dtype)
    negative = (np.round(rng.normal(0.0, 1, (3, 55)), digits) + offset).astype(dtype)
    y = np.repeat([1, 0], [40, 55])
    expected = [
        roc_auc_score(y, np.concatenate(row)) for row in zip(positive, negative, strict=True)
    ]
    np.testing.assert_allclose(auroc(positive, negative), expected, atol=1e-12)
    np.testing.assert_allclose(auroc(positive * 1e-9, negative * 1e-9), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_that_differ_by_rounding_are_ties(dtype):
    """Around an offset, around two of them, and without any, by an order that means nothing."""
    rng = np.random.default_rng(0)
    for level in (1.0, 1e6, -3e-7):
        scores = level * (1 + np.finfo(dtype).eps * rng.integers(-1, 2, (2, 30)))
        positive, negative = scores.astype(dtype)[:, :10], scores.astype(dtype)[:, 10:]
        np.testing.assert_array_equal(auroc(positive, negative), 0.5)
        np.testing.assert_array_equal(auroc(2 * positive, negative), 1.0 if level > 0 else 0.0)
    cancelled = 1e-17 * rng.normal(size=(2, 30))
    np.testing.assert_array_equal(auroc(cancelled[:, :10], cancelled[:, 10:], noise=1e-15), 0.5)
    assert np.isnan(auroc(np.full((1, 2), np.nan), np.zeros((1, 2)))).all()


def test_ranks_are_scipys_but_for_rounding():
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=(20, 7)), 1)
    expected = rankdata(values, axis=1) - 4
    np.testing.assert_array_equal(centred_ranks(values), expected)
    moved = values * (1 + 1e-15 * rng.normal(size=values.shape))
    np.testing.assert_array_equal(centred_ranks(moved), expected)
    forecast = dict(zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True))
    drops = dict(zip("abcd", (0.3, 0.1 + 0.2, 0.4, 0.5), strict=True))
    swapped = drops | {"a": drops["b"], "b": drops["a"]}
    assert score(forecast, drops) == score(forecast, swapped)
    assert advice({"a": 0.3, "b": 0.1 + 0.2, "c": 0.0}, 1) == ["a"]
    assert retain_counts({"a": 0.3, "b": 0.1 + 0.2, "c": 0.0}, 7) == {"a": 3, "b": 3, "c": 1}


def alike(dtype, scale: float, constant: float) -> dict[str, np.ndarray]:
    """Two kinds of prompts, each as often in every domain, up to the last bit of a number."""
    rng = np.random.default_rng(0)
    kinds = constant + scale * rng.normal(size=(2, 3, 17))
    rows = np.tile(kinds, (10, 1, 1))
    names = ("safety", "bias", "benign")
    noise = np.finfo(dtype).eps / 2 * rng.integers(-1, 2, (len(names), *rows.shape))
    return {d: (rows * (1 + x)).astype(dtype) for d, x in zip(names, noise, strict=True)}


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("constant", [0.0, 10.0])
def test_probes_are_blind_where_activations_are_equal(scale, constant):
    """But for rounding: an erased concept must not be found in the last bits."""
    one = {d: x[:1].repeat(20, axis=0) for d, x in alike(np.float64, scale, constant).items()}
    one["bias"] = one["bias"][:15]  # another number of equal rows has another rounded mean
    np.testing.assert_array_equal(probe_auroc(one, one, "bias"), 0.5)
    np.testing.assert_array_equal(logistic_probe(one, "bias").auroc, 0.5)
    rng = np.random.default_rng(1)
    noise = {d: rng.normal(size=x.shape) for d, x in one.items()}
    np.testing.assert_array_equal(probe_auroc(one, noise, "bias"), 0.5)  # no concept to project on


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_transfer_between_orthogonal_concepts_is_blind(scale):
    """Every prompt of a domain alike, so that only rounding could rank one above the other."""
    rng = np.random.default_rng(0)
    ways = np.stack([np.linalg.qr(rng.normal(size=(40, 2)))[0].T for _ in range(8)], axis=1)
    rows = {"safety": ways[0], "bias": ways[1], "benign": np.zeros((8, 40))}
    acts = {d: np.tile(scale * x, (9, 1, 1)).astype(np.float32) for d, x in rows.items()}
    draws = {"permutations": 4, "splits": 4, "bootstraps": 4}
    found = all_pairs(acts, ("safety", "bias"), measures=["probe_transfer"], **draws)
    observed = found.measures["probe_transfer"].observed
    np.testing.assert_array_equal(observed, np.tile([[1, 0.5], [0.5, 1]], (8, 1, 1)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("positive", "negative"), [(0, 3), (3, 0), (0, 0)])
def test_auroc_of_nothing_is_unknown(positive, negative):
    found = auroc(np.ones((2, positive)), np.ones((2, negative)))
    np.testing.assert_array_equal(found, [np.nan, np.nan])
