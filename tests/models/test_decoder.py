"""The decoder against transformers, and what must hold of any causal decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import (
    FAMILIES,
    LAYERS,
    VARIANTS,
    load_torch,
    our_outputs,
    random_batch,
    torch_outputs,
)

from ema_jax.models import checkpoint

TOLERANCE = 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers_at_every_layer(tiny, variant):
    folder = tiny(variant)
    model, reference = checkpoint.load(folder), load_torch(folder)
    for padding in ("none", "left", "right"):
        tokens, mask = random_batch(padding=padding)
        logits, hidden, taps = our_outputs(model, tokens, mask)
        expected_logits, expected = torch_outputs(reference, tokens, mask)
        assert 0.3 < np.std(expected_logits) < 3, "the tolerance is meant for unit scale"
        assert np.abs(logits - expected_logits)[mask].max() <= TOLERANCE
        for layer in range(LAYERS):
            assert np.abs(taps[layer] - expected[layer])[mask].max() <= TOLERANCE, layer
        assert np.abs(hidden - expected[LAYERS])[mask].max() <= TOLERANCE
        normed = model.final_norm(jnp.asarray(taps[LAYERS]))
        np.testing.assert_allclose(normed[mask], expected[LAYERS][mask], atol=TOLERANCE)


@pytest.mark.parametrize("variant", FAMILIES)
def test_bfloat16_rounds_no_more_than_transformers(tiny, variant):
    folder = tiny(variant)
    tokens, mask = random_batch(padding="left")
    exact, _ = torch_outputs(load_torch(folder), tokens, mask)
    theirs, _ = torch_outputs(load_torch(folder, torch.bfloat16), tokens, mask)
    ours, _, _ = our_outputs(checkpoint.load(folder, dtype=jnp.bfloat16), tokens, mask)

    def error(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - exact)[mask] ** 2)))

    assert 0 < error(ours) <= 1.25 * error(theirs)


@pytest.mark.parametrize(("variant", "reach"), [("mistral", 99), ("mistral_window", 2 * LAYERS)])
def test_causal_and_windowed_by_gradient(tiny, variant, reach):
    """d hidden[t] / d embedding[s] is zero unless t - reach <= s <= t, and nonzero inside."""
    graph, state = nnx.split(checkpoint.load(tiny(variant)))
    tokens, mask = random_batch(rows=1, length=11)

    @jax.jit
    def influence(place):
        def probe(state):
            hidden = nnx.merge(graph, state)(tokens, mask).hidden
            return jnp.sum(hidden[0, place] * jnp.arange(hidden.shape[-1]))

        gradient = jax.grad(probe)(state)["embed"].get_value()
        return jnp.abs(gradient[tokens[0]]).max(axis=-1)

    for place in range(11):
        felt = np.asarray(influence(place)) > 0
        assert np.array_equal(felt, [place - reach <= s <= place for s in range(11)])


@pytest.mark.parametrize("variant", ["qwen2_window", "llama3"])
def test_padding_and_batch_order_change_nothing(tiny, variant):
    model = checkpoint.load(tiny(variant))
    tokens, mask = random_batch(rows=3, length=11, padding="right")
    logits, _, taps = our_outputs(model, tokens, mask)

    flipped, _, _ = our_outputs(model, tokens[::-1], mask[::-1])
    np.testing.assert_allclose(flipped[::-1][mask], logits[mask], atol=1e-5)

    changed, _, _ = our_outputs(model, np.where(mask, tokens, 5), mask)
    np.testing.assert_array_equal(changed[mask], logits[mask])

    left, left_mask = np.zeros_like(tokens), mask[:, ::-1]
    left[left_mask] = tokens[mask]
    moved, _, moved_taps = our_outputs(model, left, left_mask)
    np.testing.assert_allclose(moved[left_mask], logits[mask], atol=1e-5)
    np.testing.assert_allclose(moved_taps[:, left_mask], taps[:, mask], atol=1e-5)


def test_remat_gives_the_same_gradient(tiny):
    graph, state = nnx.split(checkpoint.load(tiny("qwen3")))
    tokens, mask = random_batch(rows=2, length=5)

    @jax.jit
    def gradients(state):
        def loss(state, remat):
            return jnp.sum(nnx.merge(graph, state)(tokens, mask, remat=remat).hidden ** 3)

        return [jax.grad(loss)(state, remat) for remat in (False, True)]

    plain, recomputed = gradients(state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), plain, recomputed
    )
