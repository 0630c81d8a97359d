"""Figures for a notebook, of what the library returns, in the look of the report."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ema_jax.concepts.entanglement import Entanglement
from ema_jax.concepts.interventions import Grid, Sweep
from ema_jax.report import drawing, figures
from ema_jax.report.maps import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_entanglement(found: Entanglement, *, centred: bool = True) -> "Figure":
    """Cosine of every domain with the target by layer, with interval, null and ceiling.

    Args:
        found: entanglement with one target, as from `Pairs.towards`.
        centred: the centred cosine, which the forecast reads, or the raw one.
    """
    results = {
        "entanglement": found.to_json(),
        "target": found.target,
        "domains": list(found.domains),
        "model": {"num_layers": found.num_layers},
    }
    return _drawn(lambda: figures.entanglement(results, centred))


def plot_layers(values: Mapping[str, np.ndarray], quantity: str) -> "Figure":
    """One line per name over the layers: erasure, norms, or any `[L+1]` arrays by name."""

    def draw() -> "Figure":
        figure = drawing.blank(3.2)
        axes = figure.subplots()
        look = drawing.looks(values)
        for name, series in values.items():
            colour, marker = look[name]
            axes.plot(series, marker=marker, color=colour, linewidth=1.6, markersize=5)
        axes.set(xlabel="layer (0 = embeddings)", ylabel=quantity)
        axes.grid(axis="y")
        drawing.legend(figure, {drawing.label(name): look[name] for name in values})
        return figure

    return _drawn(draw)


def plot_sweep(found: Sweep, grid: Grid, strength: float | str) -> "Figure":
    """Map of the mean change of refusal log-odds, directions by layers, at one strength.

    Args:
        found: effects of the grid's candidates.
        grid: the candidates.
        strength: one of `grid.strengths`.
    """
    change = grid.unflatten(found.changed - found.clean).mean(axis=-1)
    at = change[:, :, grid.strengths.index(strength)]
    rows = {name: at[:, i].tolist() for i, name in enumerate(grid.directions)}
    quantity = "change of refusal log-odds (nats)"
    return _drawn(lambda: heat_map({f"strength {strength}": rows}, quantity))


def _drawn(draw: "Callable[[], Figure | None]") -> "Figure":
    import matplotlib

    with matplotlib.rc_context(drawing.STYLE):
        figure = draw()
        assert figure is not None
        return figure
