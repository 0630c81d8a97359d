"""Utility guards against PyTorch, and without the whole vocabulary in memory."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import VOCABULARY, load_torch

from ema_jax.data.batching import Batch
from ema_jax.data.chat import TokenExample
from ema_jax.models import checkpoint
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import make_mesh
from ema_jax.unlearning import utility as utility_lib
from ema_jax.unlearning.utility import utility


def examples() -> list[TokenExample]:
    rng = np.random.default_rng(0)
    drawn = [tuple(map(int, rng.integers(0, VOCABULARY, 60))) for _ in range(5)]
    return [TokenExample(row[: 3 + i], row[3 + i : 50 - 9 * i]) for i, row in enumerate(drawn)]


def by_torch(model, base) -> dict[str, float]:
    nll, divergence, tokens = 0.0, 0.0, 0
    for item in examples():
        ids = torch.tensor([item.prompt + item.response])
        ours, kept = (
            torch.log_softmax(m(ids).logits[0].double(), -1)[len(item.prompt) - 1 : -1]
            for m in (model, base)
        )
        nll -= sum(float(row[token]) for row, token in zip(ours, item.response, strict=True))
        divergence += float((kept.exp() * (kept - ours)).sum())
        tokens += len(item.response)
    return {"benign_nll": nll / tokens, "kl_to_base": divergence / tokens}


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("chunk", [7, 32, 1000])
def test_utility_against_torch(tiny, monkeypatch, chunk, shape):
    monkeypatch.setattr(utility_lib, "_CHUNK", chunk)
    jax.clear_caches()  # the chunk is no argument of the compiled function
    mesh = make_mesh(shape)
    folders = tiny("qwen2"), tiny("mistral")
    with torch.no_grad():
        expected = by_torch(*map(load_torch, folders))
    model, base = (checkpoint.load(folder, mesh=mesh) for folder in folders)
    found = utility(model, base, examples(), batch_size=2, mesh=mesh)
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected["kl_to_base"] > 0.01


def test_the_vocabulary_never_stands_for_the_whole_batch(tiny):
    config = checkpoint.load(tiny("qwen2")).config
    rows, length, vocabulary = 4, 513, 60_000
    big = nnx.eval_shape(
        lambda: Decoder(dataclasses.replace(config, vocab_size=vocabulary), nnx.Rngs(0))
    )
    graph, state = nnx.split(big)
    ids = jax.ShapeDtypeStruct((rows, length), np.int32)
    flags = jax.ShapeDtypeStruct((rows, length), bool)
    batch = Batch(tokens=ids, mask=flags, response=flags)
    compiled = utility_lib._totals.lower(graph, state, graph, state, batch).compile()
    whole = 4 * rows * length * vocabulary
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2
