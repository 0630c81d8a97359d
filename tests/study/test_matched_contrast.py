"""Concepts of prompts relative to their own benign rewrites, as a session captures them."""

import numpy as np
from small_study import small_config

from ema_jax import config as ema
from ema_jax.concepts.vectors import concept_vectors
from ema_jax.data.domains import BENIGN
from ema_jax.data.prompts import Prompt
from ema_jax.models.hub import ModelSource
from ema_jax.organism import CHECKPOINTS
from ema_jax.study.session import ModelSession


def _prompt(domain, i, contrast=""):
    return Prompt(f"{domain}{i}", domain, "concept", f"{domain} {i}", "x", "0", "g", "", contrast)


def test_capture_takes_each_prompt_with_its_rewrite(monkeypatch, tmp_path):
    config = small_config()
    config.concepts.contrast = "matched"
    session = ModelSession(ema.read(config), ModelSource("x", CHECKPOINTS / "qwen2", None, "f"))
    rng, states = np.random.default_rng(0), {}

    def pooled(self, model, texts, groups, store):
        by_domain = {}
        for text, group in zip(texts, groups, strict=True):
            states.setdefault(text, rng.normal(size=(3, 4)).astype(np.float32))
            by_domain.setdefault(f"last_token/{group}", []).append(states[text])
        return {key: np.stack(rows) for key, rows in by_domain.items()}

    monkeypatch.setattr(ModelSession, "_pooled", pooled)
    prompts = [
        prompt
        for i in range(4)  # interleaved, so that rewrites must find their own prompts
        for prompt in (_prompt("bias", i, f"mild {i}"), _prompt(BENIGN, i), _prompt("safety", i))
    ]
    found = session.capture(None, prompts, tmp_path)["last_token"]
    vectors = concept_vectors(found)

    def mean(texts):
        return np.mean([states[text] for text in texts], axis=0)

    pairs = [states[f"bias {i}"] - states[f"mild {i}"] for i in range(4)]
    np.testing.assert_allclose(vectors["bias"], np.mean(pairs, axis=0), atol=1e-6)
    shared = mean(f"safety {i}" for i in range(4)) - mean(f"{BENIGN} {i}" for i in range(4))
    np.testing.assert_allclose(vectors["safety"], shared, atol=1e-6)
