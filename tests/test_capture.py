"""Captured activations against transformers' own, prompt by prompt, on the embedded models."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from small_study import EMBEDDED

from ema_jax.concepts.capture import POOLINGS, capture
from ema_jax.concepts.vectors import concept_vectors
from ema_jax.data.chat import Chat
from ema_jax.models import checkpoint, lora
from ema_jax.models.sharding import make_mesh
from ema_jax.organism import CHECKPOINTS, corpus

BOTH = ("last_token", "prompt_mean")
TOLERANCE = 1e-5


@functools.cache
def embedded(family: str):
    folder = CHECKPOINTS / family
    chat = Chat.load(folder)
    rows = corpus.study_prompts(5, {"concept": 2})
    prompts = [chat.prompt_tokens(row["prompt"]) for row in rows]
    assert len({len(ids) for ids in prompts}) > 5, "prompts of many lengths, so that padding shows"
    return checkpoint.load(folder), prompts, [row["domain"] for row in rows]


def hidden_states(model, ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What enters every block and leaves the last `[L+1, T, d]`; and that after the final norm."""
    kept = {}
    hook = model.model.norm.register_forward_pre_hook(lambda _, x: kept.update(last=x[0]))
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    inner = torch.cat([*states[:-1], kept["last"]])
    return inner.numpy(), states[-1][0].numpy()


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within 1e-5 of the scale of each layer."""
    scale = np.maximum(np.abs(theirs).max(axis=(0, 2), keepdims=True), 1.0)
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=TOLERANCE)


@pytest.mark.parametrize("family", EMBEDDED)
def test_equals_transformers_one_prompt_at_a_time(family):
    model, prompts, _ = embedded(family)
    reference = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / family).eval()
    states = [hidden_states(reference, ids) for ids in prompts]
    ours = capture(model, prompts, poolings=BOTH)
    depth = model.config.num_layers + 1
    assert ours["last_token"].shape == (len(prompts), depth, model.config.hidden_size)
    assert ours["last_token"].dtype == np.float32
    assert_close(ours["last_token"], np.stack([inner[:, -1] for inner, _ in states]))
    assert_close(ours["prompt_mean"], np.stack([inner[:, 1:].mean(1) for inner, _ in states]))
    # transformers' last hidden state has the final norm in it, and ours must not.
    normed = np.stack([after[-1] for _, after in states])
    weight = reference.model.norm.weight.detach().numpy()
    last = ours["last_token"][:, -1].astype(np.float64)
    epsilon = model.config.norm_epsilon
    again = last / np.sqrt(np.mean(last**2, axis=-1, keepdims=True) + epsilon) * weight
    np.testing.assert_allclose(again, normed, atol=1e-4)
    assert np.abs(last - normed).max() > 0.1


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_order_and_padding_change_nothing(batch_size):
    model, prompts, domains = embedded("qwen2")
    expected = capture(model, prompts, poolings=BOTH, batch_size=len(prompts))
    order = np.random.default_rng(batch_size).permutation(len(prompts))
    # A prompt far longer than the others pads them all, where a batch holds it.
    long = tuple(np.concatenate([prompts[i] for i in range(4)]).tolist())
    shuffled = capture(
        model, [long, *(prompts[i] for i in order)], poolings=BOTH, batch_size=batch_size
    )
    for name in BOTH:
        assert_close(shuffled[name][1:], expected[name][order])
    by_domain = {
        d: expected["last_token"][[i for i, x in enumerate(domains) if x == d]]
        for d in dict.fromkeys(domains)
    }
    again = {
        d: shuffled["last_token"][[1 + k for k, i in enumerate(order) if domains[i] == d]]
        for d in by_domain
    }
    vectors, others = concept_vectors(by_domain), concept_vectors(again)
    for domain, vector in vectors.items():
        np.testing.assert_allclose(others[domain], vector, atol=TOLERANCE * np.abs(vector).max())


def test_one_pooling_alone_is_the_same_and_keeps_its_name():
    model, prompts, _ = embedded("qwen2")
    both = capture(model, prompts, poolings=BOTH)
    assert tuple(both) == BOTH
    (alone,) = capture(model, prompts, poolings=("prompt_mean",)).values()
    assert_close(alone, both["prompt_mean"])
    assert tuple(capture(model, prompts[:1])) == ("last_token",)


def test_adapters_count_and_fresh_ones_change_nothing():
    model, prompts, _ = embedded("qwen2")
    (plain,) = capture(model, prompts).values()
    adapted = lora.attach(model, lora.LoRAConfig(rank=2), jax.random.key(0))
    (fresh,) = capture(adapted, prompts).values()
    assert_close(fresh, plain)
    factor = adapted.blocks.v_proj.lora_b
    factor[...] = 0.1 * jax.random.normal(jax.random.key(1), factor.shape)
    (changed,) = capture(adapted, prompts).values()
    (merged,) = capture(lora.merge(adapted), prompts).values()
    assert_close(changed, merged)
    np.testing.assert_array_equal(changed[:, 0], plain[:, 0])  # the embeddings have no adapter
    assert np.abs(changed[:, 1:] - plain[:, 1:]).max() > 0.01


def test_the_same_on_a_mesh():
    model, prompts, _ = embedded("qwen2")
    mesh = make_mesh((2, 2, 2))
    spread = checkpoint.load(CHECKPOINTS / "qwen2", mesh=mesh)
    ours = capture(spread, prompts, poolings=BOTH, batch_size=6, mesh=mesh)
    for name, expected in capture(model, prompts, poolings=BOTH).items():
        assert_close(ours[name], expected)


@pytest.mark.parametrize("name", sorted(POOLINGS))
@pytest.mark.parametrize("length", [1, 2, 9])
def test_poolings_are_averages(name, length):
    weights = POOLINGS[name](length)
    assert weights.shape == (length,)
    assert weights.sum() == pytest.approx(1)
    assert weights[-1] > 0
