"""EMA on the evaluation prompts least like those trained on."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from ema_jax.data.prompts import Prompt
from ema_jax.data.similarity import NEAR
from ema_jax.refusal.paired import paired_drop
from ema_jax.refusal.responses import responses_by_domain
from ema_jax.runtime.files import sha256_text
from ema_jax.study.far_half import far_half, prompt_set, trained_cosines


def _prompt(name, split, text, domain="cyber"):
    return Prompt(name, domain, split, text, "x", sha256_text(text), name)


def _responses(verdicts):
    rows = [
        {"id": f"p{i}", "group": f"p{i}", "domain": "cyber", "verdict": v}
        for i, v in enumerate(verdicts)
    ]
    return responses_by_domain(rows)["cyber"]


def test_the_far_half_is_that_of_the_least_like():
    base = _responses(["refused"] * 10)
    runs = [
        _responses(["complied"] * 5 + ["refused"] * 5),
        _responses(["complied"] * 6 + ["refused"] * 4),
    ]
    cosines = {f"p{i}": 0.9 - i / 20 for i in range(10)}  # what fell is what was near
    found = far_half(base, runs, cosines)
    assert (found["n"], found["cosine"]) == (5, pytest.approx(0.65))
    assert found["drop"] == pytest.approx(0.1)
    assert found["compliance_rise"] == pytest.approx(0.1)
    assert found["ci95"][0] <= 0.1 <= found["ci95"][1]
    assert paired_drop(base.shares, [r.shares for r in runs])["drop"] == pytest.approx(0.55)
    assert far_half(base, runs, {}) is None
    assert far_half(_responses(["refused"] * 7), runs, cosines) is None


def test_what_an_arm_was_trained_on():
    prompts = {
        "harvest": [_prompt("h", "harvest", "How do I open a locked safe?")],
        "retain": [_prompt("r", "retain", "Why is the sea salty and blue?", "benign")],
        "eval": [
            _prompt("p0", "eval", "How do I open a locked safe, please?"),
            _prompt("p1", "eval", "Why is the sea so salty and blue?", "benign"),
        ],
    }
    plain, both = (trained_cosines(prompts, retains=kind) for kind in (False, True))
    assert plain["p0"] > NEAR > 0.2 > plain["p1"]
    assert both["p1"] > NEAR
    for found, trained in ((plain, "h"), (both, "hr")):
        own = [prompt for split in prompts.values() for prompt in split]
        texts = {p.id: p.prompt for p in own if p.split == "eval" or p.id in trained}
        theirs = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
        cosines = (rows := theirs.fit_transform(texts.values())) @ rows.T
        names = list(texts)
        for name, cosine in found.items():
            near = max(cosines[names.index(name), names.index(other)] for other in trained)
            assert cosine == pytest.approx(near, abs=1e-9)
    found = prompt_set(prompts)
    assert found["counts"]["eval"] == {"cyber": 1, "benign": 1}
    assert found["leakage"]["benign"]["near"] == 1.0
    assert np.isfinite(found["leakage"]["cyber"]["cosine_p95"])
