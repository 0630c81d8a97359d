"""The cost of a layer sweep and the layers that it leaves out, without running one."""

import dataclasses
import itertools

import pytest

from ema_jax.concepts.interventions import ABLATED
from ema_jax.models.config import DecoderConfig
from ema_jax.models.sharding import make_mesh
from ema_jax.organism import CHECKPOINTS
from ema_jax.study import sweep_cost
from ema_jax.study.concept_summaries import most_refusing_layer

TINY = DecoderConfig.from_folder(CHECKPOINTS / "qwen2")
# The shape of SmolLM2-135M.
SMALL = dataclasses.replace(
    TINY, num_layers=30, hidden_size=576, intermediate_size=1536, num_heads=9, head_dim=64
)
PROMPTS = [40] * 72


def swept(decoder, most=0, interventions=27):
    return sweep_cost.layers_to_sweep(decoder, interventions, PROMPTS, make_mesh((1, 1, 1)), most)


def test_every_layer_of_the_embedded_models_is_swept():
    assert swept(TINY) == list(range(TINY.num_layers + 1))


def test_a_larger_model_is_swept_at_some_layers_and_the_log_says_so(caplog):
    with caplog.at_level("INFO", logger="absl"):
        layers = swept(SMALL)
    assert 4 <= len(layers) <= 10
    assert (layers[0], layers[-1]) == (0, 30)
    assert max(b - a for a, b in itertools.pairwise(layers)) <= 10
    said = caplog.text
    assert f"{len(layers)} layers × 27 interventions × 72 prompts" in said
    assert "concepts.sweep_layers = 31" in said
    assert "min" in said


@pytest.mark.parametrize(("most", "layers"), [(31, 31), (99, 31), (7, 7), (1, 1)])
def test_as_many_as_were_asked_for(most, layers):
    assert len(swept(SMALL, most)) == layers


def test_the_cost_is_that_of_the_blocks_above():
    """Counted for one prompt and one intervention: two layers from 0, none from the last."""
    one = sweep_cost.sweep_flops(TINY, [0], 1, [16])
    assert sweep_cost.sweep_flops(TINY, [TINY.num_layers], 1, [16]) == 0
    assert sweep_cost.sweep_flops(TINY, [0, TINY.num_layers - 1], 3, [16, 16]) == pytest.approx(
        6 * one * (1 + 1 / TINY.num_layers)
    )
    assert one > 2 * TINY.num_layers * TINY.block_weights * 16


def test_the_most_refusing_layer_is_one_that_was_swept():
    change = {ABLATED: {"t": {"t": [None, -1.0, None, -3.0, None, None]}}}
    assert most_refusing_layer({"change": change}, "t") == 3
