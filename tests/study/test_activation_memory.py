"""Memory of a study's concepts does not grow with its prompts: activations stay on the disk."""

import dataclasses
import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
from flax import nnx
from small_study import small_config

from ema_jax import config as ema
from ema_jax.concepts import capture as capturing
from ema_jax.data.domains import BENIGN
from ema_jax.data.prompts import Prompt
from ema_jax.models.hub import ModelSource
from ema_jax.organism import CHECKPOINTS
from ema_jax.study import concept_summaries
from ema_jax.study.session import ModelSession

DOMAINS = ("bias", "safety")
LAYERS, WIDTH, ROWS = 3, 1024, 64


class FakeDecoder(nnx.Module):
    """A model of which only sizes are asked; its activations are drawn, see `batches`."""

    config = SimpleNamespace(num_layers=LAYERS, hidden_size=WIDTH)


def batches(function, examples, pad, *, start, **settings):
    rng = np.random.default_rng(0)
    for first in range(start, len(examples), ROWS):
        indices = range(first, min(first + ROWS, len(examples)))
        taps = rng.normal(size=(LAYERS + 1, len(indices), 1, WIDTH)).astype(np.float32)
        yield list(indices), (taps,)


def measured(session, folder, per_domain):
    """Largest memory of capture and drift, activations and drift."""
    prompts = [
        Prompt(f"{d}{i}", d, "concept", f"{d} {i}", "x", "0", "g", "", "")
        for d, i in itertools.product((*DOMAINS, BENIGN), range(per_domain))
    ]
    tracemalloc.start()
    pooled = session.capture(FakeDecoder(), prompts, folder)["last_token"]
    drift = concept_summaries.concept_drift(pooled, pooled, DOMAINS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak, pooled, drift


def test_memory_does_not_grow_with_the_prompts(monkeypatch, tmp_path):
    monkeypatch.setattr(capturing, "map_batches", batches)
    config = ema.read(small_config())
    concepts = dataclasses.replace(config.concepts, poolings=("last_token",), contrast="shared")
    config = dataclasses.replace(config, concepts=concepts)
    session = ModelSession(config, ModelSource("x", CHECKPOINTS / "qwen2", None, "f"))
    vars(session)["chat"] = SimpleNamespace(prompt_tokens=lambda text: (1, 2, 3))
    few, *_ = measured(session, tmp_path / "few", 300)
    many, pooled, drift = measured(session, tmp_path / "many", 1200)
    more = sum(x.nbytes for x in pooled.values()) * (1200 - 300) / 1200
    assert many - few < more / 4
    assert drift["erasure"]["refusal"] == [0] * (LAYERS + 1)
    whole = np.concatenate([pooled[d] for d in DOMAINS]).mean(axis=0, dtype=np.float64)
    expected = (whole - pooled[BENIGN].mean(axis=0, dtype=np.float64)).astype(np.float32)
    together = concept_summaries._together(pooled, DOMAINS)
    np.testing.assert_allclose(together, expected, rtol=1e-6, atol=1e-8)
