"""Heat maps, domains by layers, whose colours fade to the page at zero: no glare on a dark one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ema_jax.report.drawing import INK, PAGE, blank, label, tip

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BELOW, _ABOVE = (0.13, 0.4, 0.67), (0.7, 0.09, 0.17)  # blue and red, distinct to all eyes
_LABELLED = 12  # layers, up to which every cell has its number written in it
_OUTLIER = 2.5  # times the 95th percentile: what lies beyond would wash out everything else


def heat_map(
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    quantity: str,
    *,
    first_layer: int = 0,
    digits: int = 2,
    notes: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> "Figure":
    """One row of cells per domain, one column per layer, colours symmetric about zero.

    Args:
        panels: title → domain → value per layer; None is an empty cell.
        quantity: the name of the values, with their unit.
        first_layer: the layer of the first column.
        digits: of the numbers, behind the point.
        notes: title → domain → what the text over each cell adds to its value.
    """
    import numpy as np

    arrays = {
        title: np.array([[np.nan if x is None else x for x in row] for row in rows.values()], float)
        for title, rows in panels.items()
    }
    low, high = _range(np.concatenate([a[~np.isnan(a)] for a in arrays.values()]))
    limit = max(-low, high)
    # Columns without a value in any panel, or with nothing but zeros, are left out at the start:
    # layer 0 of the last token, which is the same in all prompts.
    sizes = [np.nan_to_num(np.abs(a)).max(axis=0) for a in arrays.values()]
    empty = np.max(sizes, axis=0) <= 1e-3 * limit
    skipped = int(np.argmin(empty)) if not empty.all() else 0
    arrays = {title: a[:, skipped:] for title, a in arrays.items()}
    heights = [len(rows) for rows in panels.values()]
    figure = blank(0.32 * sum(heights) + 0.5 * len(panels) + 0.5)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, values) in zip(grid, arrays.items(), strict=True):
        layers = range(first_layer + skipped, first_layer + skipped + values.shape[1])
        _frame(axes, title, [label(d) for d in panels[title]], layers)
        more = (notes or {}).get(title, {})
        for (y, x), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            domain = list(panels[title])[y]
            number = f"{value:z.{digits}f}".replace("-", "−")
            text = f"{label(domain)}, layer {layers[x]}: {number}"
            if domain in more:
                text += f" {more[domain][x + skipped]}"
            strength = min(1.0, abs(value) / limit)
            _cell(axes, x, y, (*(_ABOVE if value > 0 else _BELOW), strength), text)
            if len(layers) <= _LABELLED:
                colour = "#ffffff" if strength > 0.7 else INK
                axes.text(x + 0.5, y + 0.5, number, ha="center", va="center", color=colour)
    grid[-1].set_xlabel("layer (0 = embeddings)")
    _colour_bar(figure, grid, (low, high), quantity)
    return figure


def _range(values: "np.ndarray") -> tuple[float, float]:
    """The scale's ends: zero is in it, few values far from all others are not."""
    import numpy as np

    size = np.abs(values)
    limit = float(size.max(initial=0)) or 1.0
    usual = float(np.quantile(size, 0.95)) if len(size) else limit
    if usual > 0 and limit > _OUTLIER * usual:
        limit = usual
    low = -limit if (values < -0.02 * limit).any() else 0.0
    return low, limit if (values > 0.02 * limit).any() or not low else 0.0


def _frame(axes: "Axes", title: str, names: Sequence[str], layers: range) -> None:
    axes.set_yticks([y + 0.5 for y in range(len(names))], names)
    every = max(1, len(layers) // 16)
    shown = [x for x in range(len(layers)) if layers[x] % every == 0]
    axes.set_xticks([x + 0.5 for x in shown], [str(layers[x]) for x in shown])
    axes.set(xlim=(0, len(layers)), ylim=(len(names), 0), title=title)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _cell(axes: "Axes", x: int, y: int, colour: tuple[float, ...], text: str) -> None:
    from matplotlib.patches import Rectangle

    cell = Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=PAGE, linewidth=0.5)
    tip(cell, text)
    axes.add_patch(cell)


def _colour_bar(figure: "Figure", grid: Any, ends: tuple[float, float], quantity: str) -> None:
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    low, high = ends
    limit, steps = max(-low, high), np.linspace(low, high, 32)
    colours = [(*(_ABOVE if x > 0 else _BELOW), abs(x) / limit) for x in steps]
    shown = ScalarMappable(Normalize(low, high), ListedColormap(colours))
    figure.colorbar(shown, ax=list(grid), label=quantity, aspect=30, pad=0.01)
