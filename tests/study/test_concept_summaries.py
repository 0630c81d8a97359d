"""From activations and judged responses to the figures of a study."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from ema_jax.concepts.cka import cka
from ema_jax.concepts.erasure import erasure
from ema_jax.concepts.vectors import concept_vectors
from ema_jax.study import concept_summaries

DOMAINS = ("safety", "bias")


def judged(*rows):
    return [
        (None, SimpleNamespace(tokens=tokens), SimpleNamespace(verdict=verdict))
        for tokens, verdict in rows
    ]


def test_openers_open_more_refusals_than_answers():
    rows = [((5, 1), "refused")] * 60 + [((7,), "refused")] * 30 + [((9,), "refused")] * 10
    rows += [((7, 3), "complied")] * 40 + [((9,), "complied")] * 2 + [((8,), "complied")]
    rows += [((), "refused"), ((6,), "invalid")]
    assert concept_summaries.refusal_openers(judged(*rows)) == [5, 9]
    assert concept_summaries.refusal_openers(judged(*rows, *[((3,), "refused")] * 1)) == [
        5,
        9,
    ]  # under 1 %
    assert concept_summaries.refusal_openers(judged(((4,), "complied"))) == []


def test_the_layer_to_ablate_is_not_next_to_the_logits():
    changes = [0.0, -1.0, -3.0, -2.0, -4.0, -9.0]
    found = {"change": {"ablated": {"bias": {"bias": changes}}}}
    assert concept_summaries.most_refusing_layer(found, "bias") == 2


def test_drift_has_all_figures_of_domains_and_of_the_refusal_direction():
    rng = np.random.default_rng(0)
    base = {d: rng.normal(size=(12, 3, 16)).astype(np.float32) for d in (*DOMAINS, "benign")}
    for d in DOMAINS:
        base[d] += 2
    arm = {d: x.copy() for d, x in base.items()}
    arm["bias"] -= 1
    found = concept_summaries.concept_drift(base, arm, DOMAINS)
    gone = erasure(concept_vectors(base), concept_vectors(arm))
    for d in DOMAINS:
        np.testing.assert_allclose(found["erasure"][d], gone[d], atol=1e-6)
    assert found["erasure"]["safety"] == [0, 0, 0]
    assert np.mean(found["erasure"]["refusal"]) == pytest.approx(0.25, abs=0.1)
    assert {*found["probe_auroc"]} == {*DOMAINS, "refusal"}
    together = (np.concatenate([x[d] for d in (*DOMAINS, "benign")]) for x in (base, arm))
    np.testing.assert_allclose(found["cka"], cka(*together), atol=1e-6)
    assert [row["domain"] for row in found["ranking"]] == ["bias", "safety"]
    low, high = found["ranking"][0]["ci95"]
    assert low < found["ranking"][0]["mean"] < high


def test_intervals_of_a_sweep_are_students_over_prompts():
    x = np.random.default_rng(3).normal(size=(4, 8)).astype(np.float32)
    found = concept_summaries._mean_interval(x)
    for row, bounds in zip(x, found, strict=True):
        expected = scipy.stats.ttest_1samp(row.astype(float), 0).confidence_interval()
        np.testing.assert_allclose(bounds, (expected.low, expected.high), rtol=1e-6)
    assert np.isnan(concept_summaries._mean_interval(x[:, :1])).all()
