"""Frames and figures for a notebook."""

import numpy as np
import pytest

import ema_jax
from ema_jax.concepts import interventions
from ema_jax.concepts.entanglement import all_pairs

DOMAINS = ("a", "b", "c")


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    activations = {d: rng.normal(size=(8, 4, 5)) + i for i, d in enumerate((*DOMAINS, "benign"))}
    measures = ("cosine", "cosine_centred")
    return all_pairs(activations, DOMAINS, measures=measures, permutations=20, splits=4).towards(
        "a"
    )


@pytest.fixture(scope="module")
def swept():
    rng = np.random.default_rng(0)
    directions = {d: rng.normal(size=(4, 5)).astype(np.float32) for d in DOMAINS}
    grid = interventions.grid(directions, (-1.0, 1.0))
    clean = rng.normal(size=6).astype(np.float32)
    changed = rng.normal(size=(4, 9, 6)).astype(np.float32)
    return interventions.Sweep(clean, changed), grid


def test_entanglement_as_a_frame(found):
    frame = found.to_frame()
    assert len(frame) == 2 * 2 * 4
    row = frame[(frame.measure == "cosine") & (frame.domain == "b") & (frame.layer == 3)].iloc[0]
    assert row.observed == found.cosine.observed["b"][3]
    assert (row.low, row.high) == tuple(found.cosine.ci95["b"][3])
    assert repr(found) == "Entanglement(a with b, c; layers 0 to 3; cosine, cosine_centred)"


def test_a_sweep_as_a_frame(swept):
    found, grid = swept
    frame = found.to_frame(grid)
    assert len(frame) == 4 * 3 * 3
    one = frame[(frame.direction == "b") & (frame.strength == 1.0) & (frame.layer == 2)]
    column = 3 * 1 + 1  # directions outermost, then the strengths and the ablation
    np.testing.assert_allclose(one.change, (found.changed[2, column] - found.clean).mean())
    assert repr(found) == "Sweep(9 candidates at 4 layers, 6 prompts)"


def test_figures_show_what_they_are_given(found, swept):
    panels = ema_jax.plot_entanglement(found, centred=False).axes
    lines = {line.get_label(): line.get_ydata() for line in panels[0].lines}
    np.testing.assert_allclose(lines["observed"], found.cosine.observed["b"])
    layers = ema_jax.plot_layers({"b": np.arange(4.0)}, "norm").axes[0]
    assert layers.lines[0].get_ydata().tolist() == [0, 1, 2, 3]
    assert layers.get_ylabel() == "norm"
    sweep, grid = swept
    cells = ema_jax.plot_sweep(sweep, grid, "ablated").axes[0].texts
    of_b = [float(text.get_text().replace("−", "-")) for text in cells[4:8]]
    expected = (sweep.changed[:, 5] - sweep.clean).mean(axis=-1)
    np.testing.assert_allclose(of_b, expected, atol=0.005)
