"""Captured activations against transformers' own, prompt by prompt, on the embedded models."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from small_study import EMBEDDED

from ema_jax.concepts.capture import (
    Moments,
    capture,
    pooling,
    template_tail,
    token_moments,
)
from ema_jax.concepts.store import ActivationStore
from ema_jax.concepts.vectors import LAYER_CONVENTION, concept_vectors, layers_as
from ema_jax.data import corpus
from ema_jax.data.chat import Chat
from ema_jax.errors import UserError
from ema_jax.models import checkpoint, lora
from ema_jax.models.sharding import make_mesh
from ema_jax.organism import CHECKPOINTS
from ema_jax.runtime.files import read_tensors

BOTH = ("last_token", "prompt_mean")
TOLERANCE = 1e-5


@functools.cache
def embedded(family: str):
    folder = CHECKPOINTS / family
    chat = Chat.load(folder)
    rows = corpus.study_prompts(5, {"concept": 2})
    texts = [" ".join([row["prompt"]] * (1 + i % 3)) for i, row in enumerate(rows)]
    prompts = [chat.prompt_tokens(text) for text in texts]
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


def assert_close(actual: np.ndarray, reference: np.ndarray) -> None:
    """Within 1e-5 of the scale of each layer."""
    scale = np.maximum(np.abs(reference).max(axis=(0, 2), keepdims=True), 1.0)
    np.testing.assert_allclose(actual / scale, reference / scale, atol=TOLERANCE)


@pytest.mark.parametrize("family", EMBEDDED)
def test_equals_transformers_one_prompt_at_a_time(family):
    model, prompts, _ = embedded(family)
    reference = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / family).eval()
    states = [hidden_states(reference, ids) for ids in prompts]
    actual = capture(model, prompts, poolings=BOTH)
    depth = model.config.num_layers + 1
    assert actual["last_token"].shape == (len(prompts), depth, model.config.hidden_size)
    assert actual["last_token"].dtype == np.float32
    assert_close(actual["last_token"], np.stack([inner[:, -1] for inner, _ in states]))
    assert_close(actual["prompt_mean"], np.stack([inner[:, 1:].mean(1) for inner, _ in states]))
    # transformers' last hidden state has the final norm in it, and this one must not.
    normed = np.stack([after[-1] for _, after in states])
    weight = reference.model.norm.weight.detach().numpy()
    last = actual["last_token"][:, -1].astype(np.float64)
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
    actual = capture(spread, prompts, poolings=BOTH, batch_size=6, mesh=mesh)
    for name, expected in capture(model, prompts, poolings=BOTH).items():
        assert_close(actual[name], expected)


@pytest.mark.parametrize("name", ["last_token", "prompt_mean", "token:-1", "response_mean"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_poolings_are_averages_over_their_own_tokens(name, length):
    weights = pooling(name)(length, 3)
    assert weights.shape == (length + 3,)
    assert weights.sum() == pytest.approx(1)
    place = length if name == "response_mean" else length - 1
    assert weights[place] > 0
    inside = slice(length, None) if name == "response_mean" else slice(0, length)
    assert weights[inside].sum() == pytest.approx(1)


@pytest.mark.parametrize("name", ["first", "token:3", "token:-0", "token:"])
def test_unknown_poolings_are_named(name):
    with pytest.raises(UserError, match=f"pooling '{name}' is none of last_token"):
        pooling(name)


def test_what_does_not_fit_is_said_before_the_first_batch():
    model, prompts, _ = embedded("qwen2")
    for change, message in (
        ({"poolings": ("token:-999",)}, "has only"),
        ({"poolings": ("response_mean",)}, "pass responses"),
        ({"streams": ("logits",)}, "stream 'logits'"),
    ):
        with pytest.raises(UserError, match=message):
            capture(model, prompts, **change)


def test_positions_responses_and_branches_against_hooks_on_transformers():
    model, prompts, _ = embedded("qwen2")
    prompts = prompts[:4]
    responses = [tuple(reversed(ids[2 : 5 + i])) for i, ids in enumerate(prompts)]
    reference = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "qwen2").eval()
    seen: dict[str, list] = {"attention": [], "mlp": []}
    for layer in reference.model.layers:
        layer.self_attn.register_forward_hook(lambda *a: seen["attention"].append(a[2][0]))
        layer.mlp.register_forward_hook(lambda *a: seen["mlp"].append(a[2]))
    expected: dict[str, list] = {}
    for prompt, response in zip(prompts, responses, strict=True):
        inner, _ = hidden_states(reference, (*prompt, *response))
        streams = {"residual": inner}
        for name, tensors in seen.items():
            streams[name] = np.stack([x.reshape(-1, x.shape[-1]).numpy() for x in tensors])
            tensors.clear()
        for name, x in streams.items():
            prefix = "" if name == "residual" else f"{name}/"
            expected.setdefault(f"{prefix}token:-3", []).append(x[:, len(prompt) - 3])
            response_mean = x[:, len(prompt) :].mean(1)
            expected.setdefault(f"{prefix}response_mean", []).append(response_mean)
    actual = capture(
        model,
        prompts,
        poolings=("token:-3", "response_mean"),
        streams=("residual", "attention", "mlp"),
        responses=responses,
    )
    assert actual.keys() == expected.keys()
    for key, x in actual.items():
        assert_close(x, np.stack(expected[key]))


def test_the_definition_of_refusal_direction():
    """Its code restated: the mean, in float64, of what enters each block at the last positions."""
    model, prompts, domains = embedded("qwen2")
    tail = template_tail(prompts)
    assert 2 <= tail <= 8
    reference = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "qwen2").eval()
    layers = reference.model.layers
    totals = {d: np.zeros((tail, len(layers), 128)) for d in dict.fromkeys(domains)}
    count = domains.count(domains[0])

    def add_to(domain, number):
        def hook(_, args):
            totals[domain][:, number] += args[0][0, -tail:].double().numpy() / count

        return hook

    for ids, domain in zip(prompts, domains, strict=True):
        handles = [
            layer.register_forward_pre_hook(add_to(domain, number))
            for number, layer in enumerate(layers)
        ]
        with torch.no_grad():
            reference(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
    names = [f"token:-{k}" for k in range(tail, 0, -1)]
    actual = capture(model, prompts, poolings=names)
    for position, name in enumerate(names):
        by_domain = {d: actual[name][[i for i, x in enumerate(domains) if x == d]] for d in totals}
        for domain, vector in concept_vectors(by_domain).items():
            direction = totals[domain][position] - totals["benign"][position]
            found = layers_as(vector, "refusal_direction")
            assert list(found) == list(range(len(layers)))
            np.testing.assert_allclose(np.stack([*found.values()]), direction, atol=1e-5)


def test_a_store_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    model, prompts, _ = embedded("qwen2")
    path, settings = tmp_path / "kept.safetensors", {"poolings": BOTH, "batch_size": 3}
    expected = capture(model, prompts, **settings)
    settings |= {"store": path, "model_hash": "abc"}
    committed, commit = [], ActivationStore.commit

    def dies(self, done, rows):
        if len(committed) == 2:
            raise KeyboardInterrupt
        committed.append(rows)
        commit(self, done, rows)

    with monkeypatch.context() as patched:
        patched.setattr(ActivationStore, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            capture(model, prompts, **settings)
    assert not path.exists()
    later = []
    with monkeypatch.context() as patched:
        patched.setattr(
            ActivationStore, "commit", lambda s, *a: later.append(a[1]) or commit(s, *a)
        )
        found = capture(model, prompts, **settings)
    places = [i for rows in committed + later for i in rows["last_token"][0]]
    assert sorted(places) == list(range(len(prompts)))
    for name in BOTH:
        np.testing.assert_array_equal(found[name], expected[name])
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]
    tensors, metadata = read_tensors(path)
    np.testing.assert_array_equal(tensors["prompt_mean"], expected["prompt_mean"])
    assert metadata["layer_convention"] == LAYER_CONVENTION
    # Whole, it is not made again; for other inputs it is not taken.
    again = capture(model, prompts, **settings)
    np.testing.assert_array_equal(again["last_token"], expected["last_token"])
    for change in ({"model_hash": "other"}, {"poolings": ("last_token",)}):
        with pytest.raises(UserError, match="of other prompts, poolings or models"):
            capture(model, prompts, **settings | change)
    with pytest.raises(UserError, match="of other prompts"):
        capture(model, prompts[::-1], **settings)


def test_groups_have_arrays_of_their_own(tmp_path):
    model, prompts, _ = embedded("qwen2")
    names = ["even" if i % 2 == 0 else "odd" for i in range(len(prompts))]
    whole = capture(model, prompts, batch_size=4)["last_token"]
    for store in (None, tmp_path / "kept"):
        found = capture(model, prompts, batch_size=4, groups=names, store=store)
        assert sorted(found) == ["last_token/even", "last_token/odd"]
        np.testing.assert_array_equal(found["last_token/even"], whole[::2])
        np.testing.assert_array_equal(found["last_token/odd"], whole[1::2])


def test_half_a_store_of_another_model_is_not_taken_up(tmp_path):
    shapes = {"a": (3, 2)}
    first = ActivationStore(tmp_path / "x", shapes, {"model_hash": "1"})
    first.commit(1, {"a": ([2], np.ones((1, 2)))})
    assert ActivationStore(tmp_path / "x", shapes, {"model_hash": "1"}).done == 1
    other = ActivationStore(tmp_path / "x", shapes, {"model_hash": "2"})
    assert other.done == 0
    np.testing.assert_array_equal(other.finish()["a"], 0)
    assert json.dumps(read_tensors(tmp_path / "x")[1]) == '{"model_hash": "2"}'


def test_token_moments_against_numpy():
    model, prompts, _ = embedded("qwen2")
    reference = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "qwen2").eval()
    states = np.concatenate([hidden_states(reference, ids)[0][:, 1:] for ids in prompts], axis=1)
    last = model.config.num_layers
    found = token_moments(model, prompts, (0, last), batch_size=8)
    assert found.tokens == states.shape[1]
    for place, layer in enumerate((0, last)):
        rows = states[layer].astype(np.float64)
        np.testing.assert_allclose(found.mean[place], rows.mean(0), atol=1e-5)
        covariance = np.cov(rows.T)
        np.testing.assert_allclose(
            found.covariance[place], covariance, atol=1e-4 * np.abs(covariance).max()
        )


def test_moments_merge_without_cancellation():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 3)) + np.array([3000.0, 0, -1])

    def of(x):
        centred = x - x.mean(0)
        return Moments(len(x), x.mean(0)[None], (centred.T @ centred)[None])

    merged = functools.reduce(Moments.merged, map(of, np.array_split(rows, [7, 8, 40])))
    np.testing.assert_allclose(merged.covariance[0], np.cov(rows.T), rtol=1e-9)
