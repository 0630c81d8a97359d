"""Agreement of judges against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from ema_jax.refusal.agreement import (
    VERDICTS,
    agreement,
    agreement_by_domain,
    agreement_of_judges,
    confusion,
)


def _verdicts(seed, n=200):
    rng = np.random.default_rng(seed)
    first = rng.choice(VERDICTS, n, p=[0.5, 0.4, 0.1])
    second = np.where(rng.random(n) < 0.75, first, rng.choice(VERDICTS, n))
    return first.tolist(), second.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed):
    first, second = _verdicts(seed)
    found = agreement(first, second)
    np.testing.assert_array_equal(found.table, confusion_matrix(first, second, labels=VERDICTS))
    both = [(a, b) for a, b in zip(first, second, strict=True) if "invalid" not in (a, b)]
    a, b = zip(*both, strict=True)
    assert found.kappa == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    assert found.both_valid == len(both)
    assert found.observed == pytest.approx(np.mean(np.array(a) == np.array(b)))
    assert agreement(second, first).kappa == pytest.approx(found.kappa)


def test_interval_against_the_bootstrap():
    first, second = _verdicts(11, n=400)
    found = agreement(first, second)
    both = np.array([(a, b) for a, b in zip(first, second, strict=True) if "invalid" not in (a, b)])
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(400):
        a, b = both[rng.integers(len(both), size=len(both))].T
        draws.append(cohen_kappa_score(a, b))
    np.testing.assert_allclose(found.ci95, np.percentile(draws, [2.5, 97.5]), atol=0.02)


def test_seeds_are_no_further_evidence():
    first, second = _verdicts(3)
    one, three = agreement(first, second), agreement(first * 3, second * 3, seeds=3)
    assert (three.kappa, three.ci95) == (pytest.approx(one.kappa), pytest.approx(one.ci95))
    assert three.both_valid == 3 * one.both_valid


def test_where_kappa_is_undefined_it_says_so():
    same = agreement(["refused"] * 4, ["refused"] * 4)
    assert (same.kappa, same.ci95, same.observed) == (None, None, 1.0)
    none = agreement(["invalid", "refused"], ["refused", "invalid"])
    assert (none.kappa, none.observed, none.both_valid) == (None, None, 0)
    assert agreement([], []).kappa is None
    perfect = agreement(["refused", "complied"], ["refused", "complied"])
    assert (perfect.kappa, perfect.ci95) == (1.0, None)
    opposite = agreement(["refused", "complied"], ["complied", "refused"])
    assert opposite.kappa == pytest.approx(-1.0)
    one_sided = agreement(["refused", "complied"], ["refused", "refused"])
    assert one_sided.kappa == pytest.approx(0.0)


def test_by_domain_and_by_pair():
    first, second = _verdicts(3)
    domains = ["a" if i % 3 else "b" for i in range(len(first))]
    parts = agreement_by_domain(first, second, domains)
    assert list(parts) == ["b", "a"]
    assert (parts["a"].table + parts["b"].table == confusion(first, second)).all()
    pairs = agreement_of_judges({"x": first, "y": second, "z": first}, domains)
    assert [pair["judges"] for pair in pairs] == [["x", "y"], ["x", "z"], ["y", "z"]]
    assert pairs[1]["overall"]["kappa"] == 1.0
    assert pairs[0]["domains"]["a"] == parts["a"].to_json()


def test_bad_verdicts_are_refused():
    with pytest.raises(ValueError, match="unknown verdict 'maybe'"):
        confusion(["refused"], ["maybe"])
    with pytest.raises(ValueError, match="shorter"):
        confusion(["refused", "refused"], ["refused"])
