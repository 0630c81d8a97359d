"""Layer sweeps against one model, one candidate and one layer at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import LAYERS, VOCABULARY, load_torch, our_outputs, random_batch

from ema_jax.concepts import interventions
from ema_jax.concepts.interventions import (
    ABLATED,
    Intervention,
    ablation,
    grid,
    intervene,
    patch,
    random_like,
    steering,
    sweep,
)
from ema_jax.data.batching import pad_prompts
from ema_jax.errors import UserError
from ema_jax.models import checkpoint, lora
from ema_jax.models.cache import KVCache
from ema_jax.models.sharding import make_mesh

WIDTH = 32
REFUSING = (3, 5, 90)


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Restated in float64 from probabilities."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = p[..., list(REFUSING)].sum(-1) / p.sum(-1)
    return np.log(p / (1 - p))


def vectors(names: str = "abc", scale: float = 0.5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (LAYERS + 1, WIDTH)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name in names}


def prompts(count: int = 5) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, VOCABULARY, size=4 + 3 * i).tolist() for i in range(count)]


def padded() -> tuple[np.ndarray, np.ndarray]:
    return pad_prompts(prompts(), 16, 5, 0)


def naive(model) -> np.ndarray:
    """Log-odds of all prompts from whole forward passes."""
    return log_odds(our_outputs(model, *padded())[0][:, -1])


def at_layer(candidates: Intervention, layer: int, which: int) -> Intervention:
    def alone(leaf):
        return jnp.zeros_like(leaf[:, which]).at[layer].set(leaf[layer, which])

    return jax.tree.map(alone, candidates)


@pytest.mark.parametrize("variant", ["qwen2", "mistral_window"])
def test_sweep_equals_the_naive_loop_and_compiles_once(tiny, variant):
    model = checkpoint.load(tiny(variant))
    wanted = grid(vectors("ab"), (-2.0, 0.5))
    before = interventions._sweep._cache_size()
    found = sweep(model, prompts(), wanted.candidates, REFUSING, batch_size=5)
    assert interventions._sweep._cache_size() == before + 1
    sweep(model, prompts(), grid(vectors("cd"), (1.0, 3.0)).candidates, REFUSING, batch_size=5)
    assert interventions._sweep._cache_size() == before + 1
    assert found.changed.shape == (LAYERS + 1, 6, 5)
    clean = naive(model)
    np.testing.assert_allclose(found.clean, clean, atol=1e-4)
    for layer in range(LAYERS + 1):
        for which in range(6):
            expected = naive(intervene(model, at_layer(wanted.candidates, layer, which)))
            np.testing.assert_allclose(found.changed[layer, which], expected, atol=2e-4)
            assert np.abs(expected - clean).max() > 0.01, "an intervention that does nothing"
    assert wanted.strengths == (-2.0, 0.5, ABLATED)
    by_name = wanted.unflatten(found.changed)
    np.testing.assert_array_equal(by_name[:, 1, 2], found.changed[:, 5])


def test_against_hooks_on_transformers(tiny):
    """Steering and ablation at one layer, by a pre-hook on the block."""
    model, reference = checkpoint.load(tiny("llama")), load_torch(tiny("llama"))
    wanted, layer = grid(vectors("a"), (1.5,)), 1
    found = sweep(model, prompts(), wanted.candidates, REFUSING)
    vector = torch.tensor(vectors("a")["a"][layer])
    unit = vector / vector.norm()
    changes = (lambda x: x + 1.5 * vector, lambda x: x - (x @ unit)[..., None] * unit)
    for which, change in enumerate(changes):
        hook = reference.model.layers[layer].register_forward_pre_hook(
            lambda _, args, kwargs, change=change: ((change(args[0]), *args[1:]), kwargs),
            with_kwargs=True,
        )
        with torch.no_grad():
            logits = [reference(torch.tensor([ids])).logits[0, -1].numpy() for ids in prompts()]
        hook.remove()
        np.testing.assert_allclose(
            found.changed[layer, which], log_odds(np.stack(logits)), atol=2e-4
        )


def test_batches_chunks_and_meshes_change_nothing(tiny):
    model, candidates = checkpoint.load(tiny("qwen2")), grid(vectors("ab"), (1.0,)).candidates
    expected = sweep(model, prompts(), candidates, REFUSING, batch_size=5)
    mesh = make_mesh((2, 2, 2))
    spread = checkpoint.load(tiny("qwen2"), mesh=mesh)
    # Rows are padded to what the mesh divides, candidates are in one chunk and not in four.
    found = sweep(spread, prompts(), candidates, REFUSING, batch_size=8, mesh=mesh)
    np.testing.assert_allclose(found.changed, expected.changed, atol=1e-4)
    np.testing.assert_allclose(found.clean, expected.clean, atol=1e-4)


def test_some_layers_alone_are_as_among_all(tiny):
    model, candidates = checkpoint.load(tiny("qwen2")), grid(vectors("ab"), (1.0,)).candidates
    expected = sweep(model, prompts(), candidates, REFUSING, batch_size=5)
    some = [1, LAYERS]
    found = sweep(model, prompts(), candidates, REFUSING, layers=some, batch_size=5)
    np.testing.assert_allclose(found.changed[some], expected.changed[some], atol=1e-5)
    np.testing.assert_allclose(found.clean, expected.clean, atol=1e-5)
    assert np.isnan(np.delete(found.changed, some, axis=0)).all()


def test_a_no_op_changes_nothing_and_an_absent_one_is_not_there(tiny):
    model = checkpoint.load(tiny("qwen2"))
    nothing = steering(np.zeros((LAYERS + 1, WIDTH), np.float32))
    np.testing.assert_allclose(naive(intervene(model, nothing)), naive(model), atol=1e-5)
    back = intervene(intervene(model, steering(vectors("a")["a"])), None)
    assert nnx.split(back)[0] == nnx.split(model)[0]
    assert len(jax.tree.leaves(nnx.state(model))) == len(jax.tree.leaves(nnx.state(back)))
    assert ablation(vectors("a")["a"] * 0).remove.max() == 0


def test_ablated_everywhere_nothing_is_left_along_the_direction(tiny):
    model = checkpoint.load(tiny("qwen2"))
    direction = np.tile(vectors("a")["a"][:1], (LAYERS + 1, 1))
    ablated = intervene(model, ablation(direction))
    _, _, taps = our_outputs(ablated, *random_batch(padding="left"))
    assert np.abs(taps @ direction[0] / np.linalg.norm(direction[0])).max() < 1e-5
    some = intervene(model, ablation(direction, layers=[2]))
    _, _, taps = our_outputs(some, *random_batch(padding="left"))
    left = np.abs(taps @ direction[0]).max(axis=(1, 2))
    assert left[2] < 1e-5
    assert min(left[[0, 1, 3]]) > 0.1


def test_sampling_under_an_intervention_is_the_intervened_model(tiny):
    """Through the cache, token by token, as without one."""
    model = intervene(checkpoint.load(tiny("qwen2")), steering(vectors("a")["a"]))
    tokens, mask = random_batch(rows=2, length=7)
    whole, _, _ = our_outputs(model, tokens, mask)
    cache, rows = KVCache.empty(model.config, 2, 7, jnp.float32), []
    graph, state = nnx.split(model)

    @jax.jit
    def advance(state, tokens, cache):
        model = nnx.merge(graph, state)
        hidden, cache = model.advance(tokens, cache, model.layers())
        return model.logits(hidden), cache

    for place in range(7):
        logits, cache = advance(state, tokens[:, place], cache)
        rows.append(logits)
    np.testing.assert_allclose(np.stack(rows, axis=1), whole, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Replace:
    """The naive patch: another model's whole stream at one layer."""

    where: jax.Array
    value: jax.Array

    def __call__(self, x):
        return jnp.where(self.where, self.value, x)


jax.tree_util.register_dataclass(Replace, ["where", "value"], [])


def test_patching_equals_replacing_the_stream(tiny):
    base = checkpoint.load(tiny("qwen2"))
    other = lora.attach(base, lora.LoRAConfig(rank=2), jax.random.key(0))
    factor = other.blocks.down_proj.lora_b
    factor[...] = 0.3 * jax.random.normal(jax.random.key(1), factor.shape)
    found = patch(base, other, prompts(), REFUSING, batch_size=5)
    assert found.shape == (LAYERS + 1, 5)
    stream = jnp.asarray(our_outputs(base, *padded())[2])
    for layer in range(LAYERS + 1):
        where = jnp.arange(LAYERS + 1) == layer
        expected = naive(intervene(other, Replace(where, stream)))
        np.testing.assert_allclose(found[layer], expected, atol=2e-4)
    np.testing.assert_allclose(found[0], naive(other), atol=2e-4)
    np.testing.assert_allclose(found[-1], naive(base), atol=2e-4)
    assert np.abs(found[0] - found[-1]).min() > 0.01


def test_random_directions_are_as_long_as_the_vectors():
    vector = vectors("a")["a"]
    drawn = random_like(vector)
    np.testing.assert_allclose(
        np.linalg.norm(drawn, axis=1), np.linalg.norm(vector, axis=1), rtol=1e-5
    )
    assert np.abs((drawn * vector).sum(1)).max() < 0.7 * (vector**2).sum(1).min()
    np.testing.assert_array_equal(random_like(vector), drawn)
    assert not np.array_equal(random_like(vector, seed=1), drawn)


@pytest.mark.parametrize("ids", [(), tuple(range(VOCABULARY))])
def test_refusing_tokens_have_to_say_something(tiny, ids):
    model = checkpoint.load(tiny("qwen2"))
    with pytest.raises(UserError, match="tokens open a refusal"):
        sweep(model, prompts(), grid(vectors("a"), (1.0,)).candidates, ids)
