"""Each submodule of the decoder against that of transformers, on the inputs it had there.

The inputs come from a forward pass of transformers, so that an error in one submodule fails its own
test and no other's (but for the attention, whose input norm is part of ours).
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny_models import load_torch, random_batch, torch_outputs

from ema_jax.models import checkpoint
from ema_jax.models.attention import attend, causal_mask, rotary_tables
from ema_jax.models.config import rope_frequencies
from ema_jax.models.decoder import Block

# Grouped queries with and without biases, windows in some layers or in all, one head per group.
VARIANTS = ("qwen2", "qwen2_layer_types", "mistral", "mistral_window", "llama")
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
TOLERANCE = 1e-5


class Layer(NamedTuple):
    """One layer: our block, and what transformers' layer and its parts got and gave `[B, T, D]`."""

    block: Block
    window: int | None
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    rotary: list[np.ndarray]  # cosines and sines [B, T, H]


class Run(NamedTuple):
    """A model on a batch with padding on the left."""

    config: Any
    layers: list[Layer]
    mask: np.ndarray
    positions: np.ndarray


@pytest.fixture(scope="module", params=VARIANTS)
def run(request, tiny) -> Run:
    folder = tiny(request.param)
    model, reference = checkpoint.load(folder), load_torch(folder)
    pairs = zip(model.layers(), model.config.windows, strict=True)
    layers = [Layer(block, window, {}, {}, []) for (block, _), window in pairs]

    def record(layer: Layer, name: str):
        def hook(_, args, kwargs, output):
            layer.inputs[name] = (args[0] if args else kwargs["hidden_states"]).numpy()
            layer.outputs[name] = (output[0] if isinstance(output, tuple) else output).numpy()
            if name == "layer":
                layer.rotary.extend(table.numpy() for table in kwargs["position_embeddings"])

        return hook

    for layer, theirs in zip(layers, reference.model.layers, strict=True):
        theirs.register_forward_hook(record(layer, "layer"), with_kwargs=True)
        for name in PARTS:
            part = getattr(theirs, name)
            part.register_forward_hook(record(layer, name), with_kwargs=True)
    tokens, mask = random_batch(padding="left")
    torch_outputs(reference, tokens, mask)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return Run(model.config, layers, mask, positions)


def assert_close(run: Run, ours, theirs: np.ndarray) -> None:
    """Equal at every real token."""
    np.testing.assert_allclose(np.asarray(ours)[run.mask], theirs[run.mask], atol=TOLERANCE)


def attention(run: Run, layer: Layer):
    """The rotated queries, the keys and the values, attended to: `[B, T, N, H]`."""
    keys = np.where(run.mask, run.positions, -1)
    query, key, value = layer.block.queries_keys_values(
        layer.inputs["layer"], *rotary_tables(run.positions, *rope_frequencies(run.config))
    )
    return attend(query, key, value, causal_mask(run.positions, keys, layer.window))


def test_rms_norm(run):
    for layer in run.layers:
        for ours, theirs in (
            (layer.block.input_norm, "input_layernorm"),
            (layer.block.post_norm, "post_attention_layernorm"),
        ):
            assert_close(run, ours(layer.inputs[theirs]), layer.outputs[theirs])


def test_rotary_tables(run):
    tables = rotary_tables(run.positions, *rope_frequencies(run.config))
    for layer in run.layers:
        for ours, theirs in zip(tables, layer.rotary, strict=True):
            assert_close(run, np.concatenate([ours[:, :, 0]] * 2, axis=-1), theirs)


def test_attention(run):
    for layer in run.layers:
        _, added, _ = layer.block.add_branches(layer.inputs["layer"], attention(run, layer))
        assert_close(run, added, layer.outputs["self_attn"])


def test_mlp(run):
    for layer in run.layers:
        # Ours begins with the norm, theirs is given its output.
        residual = layer.inputs["post_attention_layernorm"]
        assert_close(run, layer.block.mlp(residual), layer.outputs["mlp"])


def test_block(run):
    for layer in run.layers:
        out, *_ = layer.block.add_branches(layer.inputs["layer"], attention(run, layer))
        assert_close(run, out, layer.outputs["layer"])


def test_the_variants_have_what_is_to_be_tested(run, request):
    """Grouped queries, one head per group, sliding windows: none of them left out by a default."""
    variant, config = request.node.callspec.params["run"], run.config
    assert (config.num_kv_heads < config.num_heads) == (variant != "llama")
    windowed = {layer.window is not None for layer in run.layers}
    assert windowed == {
        "qwen2_layer_types": {True, False},
        "mistral_window": {True},
    }.get(variant, {False})
    assert (run.layers[0].block.q_proj.bias is not None) == variant.startswith("qwen2")
