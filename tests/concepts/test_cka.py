"""Debiased CKA against its definition, term by term, and against what it must not do."""

import numpy as np
import pytest

from ema_jax.concepts.cka import cka, cka_layers


def unbiased_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. (2012), equation 5, in its own words."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return (
        np.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


def restated(x: np.ndarray, y: np.ndarray) -> float:
    k, m = (np.asarray(z, np.float64) @ np.asarray(z, np.float64).T for z in (x, y))
    return unbiased_hsic(k, m) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))


def test_restated_layer_by_layer():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3, 8)).astype(np.float32) + 5
    y = (x @ rng.normal(size=(8, 6)) + rng.normal(size=(20, 3, 6))).astype(np.float32)
    expected = [restated(x[:, i], y[:, i]) for i in range(3)]
    np.testing.assert_allclose(cka(x, y), expected, atol=1e-5)
    layers = cka_layers(x)
    for i in range(3):
        for j in range(3):
            assert layers[i, j] == pytest.approx(restated(x[:, i], x[:, j]), abs=1e-5)


def test_blind_to_noise_and_to_rotation_and_scale():
    """With fewer prompts than dimensions the biased form is near one for noise."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 64, 1, 1024)).astype(np.float32)
    assert abs(cka(x, y)[0]) < 0.1
    turned = 3 * x @ np.linalg.qr(rng.normal(size=(1024, 1024)))[0].astype(np.float32) + 7
    assert cka(x, turned)[0] == pytest.approx(1, abs=1e-4)


def test_undefined_where_all_prompts_agree():
    x = np.random.default_rng(2).normal(size=(9, 2, 16)).astype(np.float32)
    x[:, 0] = x[0, 0]
    found = cka(x, x)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(1)
    assert np.isnan(cka_layers(x)[0]).all()


def test_needs_the_same_prompts():
    x = np.zeros((6, 1, 2))
    with pytest.raises(ValueError, match="same prompts"):
        cka(x, x[:5])
    with pytest.raises(ValueError, match="four prompts"):
        cka(x[:3], x[:3])
