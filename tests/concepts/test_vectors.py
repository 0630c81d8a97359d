import json

import gguf
import numpy as np
import pytest

from ema_jax.concepts.gguf import save_control_vector
from ema_jax.concepts.vectors import (
    LAYER_CONVENTION,
    MOST_RESAMPLED,
    concept_vectors,
    layer_index,
    layers_as,
    load_concepts,
    means,
    relative_to,
    sample,
    save_concepts,
)
from ema_jax.errors import UserError
from ema_jax.runtime.files import write_tensors

METADATA = {"pooling": "last", "model_hash": "0" * 64, "contrast": "benign"}


@pytest.fixture
def activations():
    rng = np.random.default_rng(0)
    sizes = {"safety": 7, "bias": 5, "benign": 6}
    return {d: rng.normal(size=(n, 4, 8)).astype(np.float32) for d, n in sizes.items()}


def test_means_and_vectors_restated(activations):
    centre, vectors = means(activations), concept_vectors(activations)
    assert set(vectors) == {"safety", "bias"}
    for d, x in activations.items():
        exact = np.array([sum(row.astype(object)) / len(x) for row in x.transpose(1, 2, 0)[0]])
        np.testing.assert_allclose(centre[d][0], exact.astype(float), rtol=1e-6)
        assert centre[d].dtype == np.float32
    for d, v in vectors.items():
        np.testing.assert_allclose(v, centre[d] - centre["benign"], atol=1e-6)
        assert v.dtype == np.float32


def test_large_common_offset_does_not_cancel_the_vector():
    # In float32 sums an offset of 3,000 would drown a difference of 1e-3.
    rng = np.random.default_rng(1)
    noise = rng.normal(scale=1e-2, size=(2, 4000, 1, 3))
    x = (3000 + noise + np.array([1e-3, 0])[:, None, None, None]).astype(np.float32)
    exact = x[0].astype(np.float64).mean(0) - x[1].astype(np.float64).mean(0)
    vector = concept_vectors({"bias": x[0], "benign": x[1]})["bias"]
    np.testing.assert_allclose(vector, exact, rtol=1e-6)


def test_other_contrast_and_its_absence(activations):
    vectors = concept_vectors(activations, contrast="bias")
    assert set(vectors) == {"safety", "benign"}
    with pytest.raises(UserError, match="contrast set 'harmless'"):
        concept_vectors(activations, contrast="harmless")


def test_prompts_that_agree_give_exactly_zero():
    token = np.random.default_rng(2).normal(size=8).astype(np.float32)
    same = {d: np.tile(token, (n, 1, 1)) for d, n in {"bias": 7, "benign": 11}.items()}
    assert not concept_vectors(same)["bias"].any()


def test_round_trip(activations, tmp_path):
    path = tmp_path / "concepts" / "base.safetensors"
    vectors = concept_vectors(activations)
    save_concepts(path, activations, vectors, METADATA)
    back = load_concepts(path)
    assert back.metadata["layer_convention"] == LAYER_CONVENTION
    assert back.metadata["pooling"] == "last"
    assert json.loads(back.metadata["prompts"]) == {"safety": 7, "bias": 5, "benign": 6}
    for d, mean in means(activations).items():
        np.testing.assert_array_equal(back.means[d], mean)
    for d, v in vectors.items():
        np.testing.assert_array_equal(back.vectors[d], v)
    save_concepts(path, means(activations), vectors, METADATA)
    again = load_concepts(path)
    np.testing.assert_array_equal(again.means["bias"], back.means["bias"])
    assert "prompts" not in again.metadata


def test_concept_file_contract(activations, tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "base.safetensors"
    save_concepts(path, activations, concept_vectors(activations), METADATA)
    tensors = load_file(path)
    assert set(tensors) == {
        "mean/safety",
        "mean/bias",
        "mean/benign",
        "vector/safety",
        "vector/bias",
    }
    assert all(x.dtype == np.float32 and x.shape == (4, 8) for x in tensors.values())


def test_bad_concept_files(activations, tmp_path):
    path = tmp_path / "base.safetensors"
    with pytest.raises(ValueError, match="pooling"):
        save_concepts(path, activations, concept_vectors(activations), {"model_hash": "0"})
    with pytest.raises(UserError, match="no such file"):
        load_concepts(path)
    write_tensors(path, {"weight": np.zeros(3, np.float32)}, {})
    with pytest.raises(UserError, match="not a concept file"):
        load_concepts(path)
    tensors = {"mean/bias": np.zeros((4, 8)), "vector/bias": np.zeros((4, 8))}
    write_tensors(path, tensors, {"layer_convention": "resid_post"})
    with pytest.raises(UserError, match="renumber"):
        load_concepts(path)


@pytest.mark.parametrize(
    ("convention", "layers", "numbers"),
    [
        ("hf_hidden_states", [0, 11], [0, 11]),
        ("resid_pre", [0, 11], [0, 11]),
        ("resid_post", [1, 12], [0, 11]),
        ("refusal_direction", [0, 11], [0, 11]),
        ("repeng", [1, 12], [0, 11]),
        ("llama_cpp", [2, 12], [1, 11]),
    ],
)
def test_layer_index_covers_each_convention_and_no_more(convention, layers, numbers):
    assert [layer_index(layer, convention, 12) for layer in layers] == numbers
    for outside in (layers[0] - 1, layers[1] + 1):
        with pytest.raises(ValueError, match="no name"):
            layer_index(outside, convention, 12)


def test_unknown_convention_lists_the_known_ones():
    with pytest.raises(ValueError, match="resid_post"):
        layer_index(0, "residual", 12)


def test_layer_numbers_agree_with_transformers():
    """Hooks on the blocks of an independent model see what the conventions say."""
    import torch
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = Qwen2Model(config).eval()
    entering, leaving = {}, {}

    def watch(i):
        def hook(_, args, out):
            entering[i], leaving[i] = args[0], out

        return hook

    for i, block in enumerate(model.layers):
        block.register_forward_hook(watch(i))
    with torch.no_grad():
        hidden = model(torch.tensor([[3, 1, 4]]), output_hidden_states=True).hidden_states
    for layer in range(4):
        actual = entering[layer] if layer < 3 else leaving[2]
        if layer < 3:
            assert torch.equal(hidden[layer_index(layer, "hf_hidden_states", 3)], actual)
        if layer > 0:
            assert torch.equal(leaving[layer_index(layer, "resid_post", 3)], actual)
    # Why the last layer has no name there: that of transformers has been through the final norm.
    assert not torch.allclose(hidden[3], leaving[2])


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("hf_hidden_states", {0: 0, 1: 1, 2: 2}),
        ("resid_pre", {0: 0, 1: 1, 2: 2}),
        ("resid_post", {0: 1, 1: 2, 2: 3}),
        ("refusal_direction", {0: 0, 1: 1, 2: 2}),
        ("repeng", {0: 1, 1: 2, 2: 3}),
        ("llama_cpp", {1: 2, 2: 3}),
    ],
)
def test_layers_as_other_tools_number_them(convention, expected):
    vectors = np.arange(4.0)[:, None]
    found = layers_as(vectors, convention)
    assert {number: int(v[0]) for number, v in found.items()} == expected


def test_layers_as_an_unknown_tool():
    with pytest.raises(ValueError, match="unknown layer convention"):
        layers_as(np.zeros((4, 2)), "nnsight")


def test_control_vectors_as_the_gguf_package_reads_them(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    save_control_vector(tmp_path / "bias.gguf", vectors, "qwen2")
    reader = gguf.GGUFReader(tmp_path / "bias.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "qwen2"
    assert reader.fields["controlvector.layer_count"].contents() == 4
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    # Block 1 puts out our layer 2.
    assert list(found) == ["direction.1", "direction.2", "direction.3", "direction.4"]
    for number in range(1, 5):
        np.testing.assert_array_equal(found[f"direction.{number}"], vectors[number + 1])


def test_relative_to_rewrites_is_the_mean_difference_of_pairs():
    rng = np.random.default_rng(0)
    x, own, benign = rng.normal(size=(3, 70, 3, 5)).astype(np.float32)

    def mean(rewrites, has):
        """Of x in place of which the rows come, less that of the contrast set."""
        rows, blocks = zip(*relative_to(x, rewrites, has, benign), strict=True)
        assert [i for each in rows for i in each] == list(range(70))
        return np.concatenate(blocks).mean(axis=0) - benign.mean(axis=0)

    pairs = (x - own).mean(axis=0)
    np.testing.assert_allclose(mean(own, [True] * 70), pairs, atol=1e-6)
    some = x.mean(axis=0) - own[:3].mean(axis=0)
    has = [False] * 60 + [True] * 3 + [False] * 7
    np.testing.assert_allclose(mean(own[:3], has), some, atol=1e-6)
    plain = x.mean(axis=0) - benign.mean(axis=0)
    np.testing.assert_array_equal(mean(own[:0], [False] * 70), plain)


def test_a_sample_is_evenly_spaced():
    x = np.arange(1000, dtype=np.float32).reshape(1000, 1, 1)
    few, many = sample({"a": x[:MOST_RESAMPLED], "b": x}).values()
    assert np.shares_memory(few, x)
    assert np.array_equal(few, x[:MOST_RESAMPLED])
    assert (many[0], many[-1], len(many)) == (0, 999, MOST_RESAMPLED)
    assert set(np.diff(many.ravel())) == {3, 4}
