"""Objectives against PyTorch and against NumPy restatements of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tiny_models import load_torch, random_batch, torch_outputs

from ema_jax.models import checkpoint
from ema_jax.models.sharding import AXES
from ema_jax.unlearning import log_probs as log_probs_lib
from ema_jax.unlearning.log_probs import cross_entropy
from ema_jax.unlearning.objectives import npo_loss


@pytest.mark.parametrize(("variant", "chunk"), [("qwen2", 3), ("mistral", 5), ("qwen2", 128)])
def test_token_log_probs_equal_torch_whatever_the_chunk(tiny, monkeypatch, variant, chunk):
    monkeypatch.setattr(log_probs_lib, "_logits_at_once", lambda mesh, words: 4 * chunk * words)
    tokens, mask = random_batch(padding="right")
    ours = log_probs_lib.token_log_probs(checkpoint.load(tiny(variant)), tokens, mask)
    logits = torch.tensor(torch_outputs(load_torch(tiny(variant)), tokens, mask)[0])
    targets = torch.tensor(tokens[:, 1:, None].astype(np.int64))
    expected = torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, targets)[..., 0].numpy()
    assert ours.shape == expected.shape
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours[mask[:, 1:]], expected[mask[:, 1:]], atol=1e-4)


def test_no_chunk_has_more_logits_than_fit(monkeypatch):
    monkeypatch.setattr(log_probs_lib, "_logits_at_once", lambda mesh, words: 1000)
    sizes = []

    def chunk(x):
        sizes.append(x.shape)
        return x

    x = jnp.arange(4.0 * 23).reshape(4, 23)
    chunks = log_probs_lib.map_chunks(chunk, 50, x, longest=32)
    assert set(sizes) == {(4, 5)}, "4 · 5 · 50 logits"
    whole = jnp.moveaxis(chunks, 0, 1).reshape(4, 25)
    np.testing.assert_array_equal(whole, jnp.pad(x, ((0, 0), (0, 2))))
    log_probs_lib.map_chunks(chunk, 1, x, longest=3)
    assert sizes[-1] == (4, 3)


def mesh_of(kind: str, devices: int = 1) -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="any")
    return AbstractMesh((1, devices, 1), AXES, (AxisType.Auto,) * 3, abstract_device=device)


def test_chunks_are_larger_where_memory_is():
    found = {
        kind: log_probs_lib._logits_at_once(mesh_of(kind), 32_000)
        for kind in ("NVIDIA H100 80GB HBM3", "TPU v5p", "TPU v5 lite", "NVIDIA L4", "cpu")
    }
    assert list(found.values()) == [1 << 28, 1 << 28, 1 << 25, 1 << 25, 1 << 22]
    outside = jax.typeof(jnp.ones(1)).sharding.mesh
    assert log_probs_lib._logits_at_once(outside, 152_064) == 64 * 152_064


@pytest.mark.parametrize("logits", [1, 2000, 1 << 28])
def test_a_loss_and_its_gradient_are_the_same_whatever_the_chunk(tiny, monkeypatch, logits):
    monkeypatch.setattr(log_probs_lib, "_logits_at_once", lambda mesh, words: logits)
    model = checkpoint.load(tiny("qwen2"))
    tokens, mask = random_batch(padding="right")
    hidden, targets = model(tokens, mask).hidden[:, :-1], jnp.asarray(tokens)[:, 1:]
    weights = jax.random.normal(jax.random.key(0), targets.shape)

    def whole(hidden):
        words = jax.nn.log_softmax(model.logits(hidden))
        return jnp.take_along_axis(words, targets[..., None], axis=-1)[..., 0]

    def chunked(hidden):
        return log_probs_lib.target_log_probs(model, hidden, targets)

    def gradient(log_probs):
        return jax.grad(lambda hidden: jnp.sum(weights * log_probs(hidden)))(hidden)

    np.testing.assert_allclose(chunked(hidden), whole(hidden), atol=1e-5)
    np.testing.assert_allclose(gradient(chunked), gradient(whole), atol=1e-5)

    def frozen(hidden):
        return log_probs_lib.target_log_probs(
            model, hidden, targets, used=weights != 0, frozen_head=True
        )

    weights = weights.at[:, 4:].set(0)  # what is not looked at is not computed
    np.testing.assert_allclose(frozen(hidden)[:, :4], whole(hidden)[:, :4], atol=1e-5)
    np.testing.assert_allclose(gradient(frozen), gradient(whole), atol=1e-5)
    assert jnp.all(frozen(hidden)[:, 4:] == 0) == (logits == 1)


def test_a_frozen_head_is_as_exact_in_bfloat16_as_a_trained_one(tiny):
    exact = checkpoint.load(tiny("qwen2"))
    rounded = checkpoint.load(tiny("qwen2"), dtype="bfloat16")
    tokens, mask = random_batch(padding="right")
    hidden, targets = exact(tokens, mask).hidden[:, :-1], jnp.asarray(tokens)[:, 1:]
    weights = jax.random.normal(jax.random.key(0), targets.shape)

    def gradient(model, dtype, frozen_head):
        def loss(hidden):
            found = log_probs_lib.target_log_probs(model, hidden, targets, frozen_head=frozen_head)
            return jnp.sum(weights * found)

        return jax.grad(loss)(hidden.astype(dtype)).astype(jnp.float32)

    true = gradient(exact, jnp.float32, False)
    errors = [
        jnp.linalg.norm(gradient(rounded, jnp.bfloat16, frozen_head) - true)
        for frozen_head in (True, False)
    ]
    assert 0 < errors[0] < 1.2 * errors[1] < 0.01 * jnp.linalg.norm(true)


def test_a_frozen_head_is_multiplied_with_twice_and_a_trained_one_three_times(tiny):
    """Logits and their slopes; else the logits again in the backward pass."""
    model = checkpoint.load(tiny("qwen2"))
    hidden, targets = jnp.ones((1, 8, model.config.hidden_size)), jnp.ones((1, 8), int)

    def products(frozen_head):
        def loss(hidden):
            found = log_probs_lib.target_log_probs(model, hidden, targets, frozen_head=frozen_head)
            return jnp.sum(found)

        return str(jax.make_jaxpr(jax.grad(loss))(hidden)).count("dot_general[")

    assert [products(True), products(False)] == [2, 3]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


numbers = st.lists(st.floats(-300, 0), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(policy=numbers, beta=st.sampled_from([0.05, 0.1, 0.5, 2.0]), shift=st.floats(-30, 30))
def test_npo_equals_its_formula(policy, beta, shift):
    policy = np.array(policy, np.float32)
    reference = np.float32(policy[::-1] + shift)
    ratio = policy.astype(np.float64) - reference
    expected = -2 / beta * np.mean(log_sigmoid(-beta * ratio))
    got = npo_loss(jnp.asarray(policy), jnp.asarray(reference), beta)
    assert float(got) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_npo_at_equality_and_its_gradient(beta):
    same = jnp.array([-12.0, -3.5, -80.0])
    assert float(npo_loss(same, same, beta)) == pytest.approx(2 / beta * np.log(2), rel=1e-6)
    ratio = np.array([-30.0, 0.0, 4.0])
    gradient = jax.grad(npo_loss)(jnp.asarray(ratio), jnp.zeros(3), beta)
    expected = 2 / (1 + np.exp(-beta * ratio)) / 3
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_npo_tends_to_gradient_ascent():
    ratio = jnp.array([-1.0, 2.0, 0.5])
    gradient = jax.grad(npo_loss)(ratio, jnp.zeros(3), 1e-4)
    np.testing.assert_allclose(gradient, np.full(3, 1 / 3), rtol=1e-3)


def test_npo_is_finite_far_away():
    far = jnp.array([1e4, -1e4])
    value, gradient = jax.value_and_grad(npo_loss)(far, jnp.zeros(2), 1.0)
    assert np.isfinite(value)
    np.testing.assert_allclose(gradient, [1.0, 0.0], atol=1e-6)


def test_masks_choose_the_response():
    generator = np.random.default_rng(0)
    log_probs = -generator.random((3, 7)).astype(np.float32)
    response = np.zeros((3, 8), bool)
    response[0, 3:6] = response[1, 7:] = True
    # Padded and prompt places may hold anything, infinities included.
    poisoned = np.where(response[:, 1:], log_probs, -np.inf)
    sums = [log_probs[0, 2:5].sum(), log_probs[1, 6], 0.0]
    assert float(cross_entropy(poisoned, response)) == pytest.approx(-sum(sums) / 4, rel=1e-6)
    assert float(cross_entropy(poisoned, np.zeros_like(response))) == 0.0
    gradient = jax.grad(cross_entropy)(jnp.asarray(log_probs), response)
    np.testing.assert_allclose(gradient, -0.25 * response[:, 1:])


def test_cross_entropy_equals_torch(tiny):
    tokens, mask = random_batch(padding="right")
    response = mask & (np.arange(mask.shape[1]) >= 3)
    log_probs = log_probs_lib.token_log_probs(
        checkpoint.load(tiny("llama")), tokens, mask, remat=True
    )
    reference = load_torch(tiny("llama"))
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            labels=torch.tensor(np.where(response, tokens, -100).astype(np.int64)),
        ).loss
    assert float(cross_entropy(log_probs, response)) == pytest.approx(float(expected), abs=1e-5)
