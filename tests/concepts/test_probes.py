"""Logistic probes and principal directions against scikit-learn."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ema_jax.concepts.probes import logistic_probe
from ema_jax.concepts.vectors import concept_vectors, pca_vectors


def activations(signal: float, width: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    concept = signal * rng.normal(size=(1, 2, width)) / np.sqrt(width)
    return {
        d: (
            10 * (d == "offset") + rng.normal(size=(30, 2, width)) + concept * (d == "bias")
        ).astype(np.float32)
        for d in ("bias", "benign")
    }


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_probe_is_scikit_learns(penalty):
    acts = activations(3.0)
    found = logistic_probe(acts, "bias", penalty=penalty, seed=3)
    rng = np.random.default_rng(3)
    fold = np.concatenate([rng.permutation(30) % 5 for _ in range(2)])
    y = np.repeat([1, 0], 30)
    for layer in range(2):
        x = np.concatenate([acts[d][:, layer] for d in ("bias", "benign")]).astype(float)
        x /= np.sqrt(np.mean(x**2))

        def fitted(rows, x=x):
            model = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000)
            return model.fit(x[rows], y[rows])

        right, areas = [], []
        for k in range(5):
            model, held = fitted(fold != k), fold == k
            right += list(model.predict(x[held]) == y[held])
            areas.append(roc_auc_score(y[held], model.decision_function(x[held])))
        assert found.accuracy[layer] == pytest.approx(np.mean(right))
        assert found.auroc[layer] == pytest.approx(np.mean(areas), abs=1e-9)
        reference = fitted(np.ones(60, bool)).coef_[0]
        actual = (
            found.direction[layer]
            * np.linalg.norm(reference)
            / np.linalg.norm(found.direction[layer])
        )
        np.testing.assert_allclose(actual, reference, atol=1e-4 * np.abs(reference).max())


def test_probe_is_at_chance_without_a_concept_and_finds_one():
    assert abs(logistic_probe(activations(0.0), "bias").auroc.mean() - 0.5) < 0.2
    assert logistic_probe(activations(8.0), "bias").auroc.min() > 0.95
    same = {d: np.ones((8, 1, 4), np.float32) for d in ("bias", "benign")}
    assert logistic_probe(same, "bias").auroc[0] == 0.5


def test_principal_direction_is_scikit_learns_of_mirrored_differences():
    """Differences with their negatives have mean zero, so its centring takes nothing away."""
    acts = activations(5.0)
    found = pca_vectors(acts)["bias"]
    for layer in range(2):
        difference = (acts["bias"] - acts["benign"])[:, layer]
        reference = PCA(1).fit(np.concatenate([difference, -difference])).components_[0]
        along = difference.mean(0) @ reference
        np.testing.assert_allclose(found[layer], along * reference, atol=1e-4)
        assert found[layer] @ concept_vectors(acts)["bias"][layer] > 0
    unequal = {"bias": acts["bias"], "benign": acts["benign"][:20]}
    assert np.isfinite(pca_vectors(unequal)["bias"]).all()
    same = {d: np.ones((8, 1, 4), np.float32) for d in ("bias", "benign")}
    np.testing.assert_array_equal(pca_vectors(same)["bias"], 0)
