"""The look of every chart: theme, panels, shared parts, and writing to files."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_jax.runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE, SHADE, PAGE = "#24292f", "#d8dee4", "#eceff3", "#fefefe"
# Okabe and Ito's colours, safe for the common colour blindnesses; markers repeat what they say.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
THEME = {INK: "ink", RULE: "rule", SHADE: "shade", PAGE: "page", COLOURS[1]: "blue"}
MARKERS = ("s", "D", "^", "v", "P", "X")
STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout on every machine
    "font.size": 9.5,
    "text.parse_math": False,  # a "$" in a user's domain name is only a "$"
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ema_jax",
    "savefig.dpi": 150,
}
WIDTH_INCHES = 9.0


def label(name: str) -> str:
    """A domain's name for people: `sensitive_content` is `Sensitive content`."""
    return "Medical/legal" if name == "medical_legal" else name.replace("_", " ").capitalize()


def save(draw: "Callable[[], Figure | None]", folder: Path, name: str, alt: str) -> str:
    """Draws one figure, writes `folder/name.svg` and `.png`, and returns inline SVG markup.

    The markup carries `alt` as its accessible name, ids prefixed by `name` so that several figures
    share a page, and theme colours as CSS variables; it refers to nothing outside itself. Returns
    an empty string where `draw` returns None.
    """
    import matplotlib
    from markupsafe import escape

    with matplotlib.rc_context(STYLE):
        figure = draw()
        if figure is None:
            return ""
        with atomic_path(folder / f"{name}.png") as path:
            figure.savefig(path, format="png", metadata={"Software": None}, facecolor="white")
        with atomic_path(folder / f"{name}.svg") as path:
            figure.savefig(path, format="svg", metadata={"Date": None}, transparent=True)
    text = (folder / f"{name}.svg").read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)


def blank(height_inches: float) -> "Figure":
    """An empty figure of the page's width."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def panels(count: int, columns: int, height_inches: float) -> "tuple[Figure, list[Axes]]":
    """A grid of `count` panels, rows filled first, with the unused cells left out."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = blank(height_inches * rows + 0.7)
    grid = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, grid


def rows(
    axes: "Axes", names: Sequence[str], series: Mapping[str, Any]
) -> Iterator[tuple[str, list[float]]]:
    """Labels horizontal rows from the top; yields each series with its height in every row."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    for edge in range(len(names) - 1):
        axes.axhline(edge + 0.5, color=RULE, linewidth=0.7)
    step = 0.68 / max(len(series), 1)
    for i, name in enumerate(series):
        yield name, [row + (i - (len(series) - 1) / 2) * step for row in range(len(names))]


def interval(
    axes: "Axes",
    entry: Mapping[str, Any] | None,
    key: str,
    y: float,
    colour: str,
    marker: str,
    filled: bool = True,
) -> None:
    """A share with its interval, in percent, at height y; nothing where there is none."""
    if not entry or entry.get(key) is None:
        return
    if entry.get("ci95") and None not in entry["ci95"]:
        axes.plot([100 * x for x in entry["ci95"]], (y, y), color=colour, linewidth=1.6)
    face = colour if filled else PAGE
    axes.plot(100 * entry[key], y, marker, color=colour, markerfacecolor=face, markersize=6)


def name_points(axes: "Axes", places: Mapping[str, tuple[float, float]]) -> None:
    """Writes names right of their points, or left where a neighbour stands to the right."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    wide, high = 0.3 * (right - left), 0.09 * (top - bottom)
    for name, (x, y) in places.items():
        others = [place for other, place in places.items() if other != name]
        crowded = any(0 <= x2 - x < wide and abs(y2 - y) < high for x2, y2 in others)
        offset, side = (-7, "right") if crowded else (7, "left")
        axes.annotate(label(name), (x, y), (offset, 4), textcoords="offset points", ha=side, size=9)


def share_y(grid: "Sequence[Axes]") -> None:
    """Gives panels the widest range of all."""
    low = min(axes.get_ylim()[0] for axes in grid)
    high = max(axes.get_ylim()[1] for axes in grid)
    for axes in grid:
        axes.set_ylim(low, high)


def heat_map(panels: Mapping[str, Mapping[str, Sequence[float]]], quantity: str) -> "Figure":
    """One row of cells per domain, one column per layer, symmetric colours about zero."""
    import numpy as np

    arrays = {
        title: np.array([[np.nan if x is None else x for x in row] for row in rows.values()])
        for title, rows in panels.items()
    }
    limit = max(float(np.nanmax(np.abs(a), initial=0)) for a in arrays.values()) or 1.0
    heights = [len(rows) for rows in panels.values()]
    figure = blank(0.32 * sum(heights) + 0.45 * len(panels) + 0.5)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, values) in zip(grid, arrays.items(), strict=True):
        mesh = axes.pcolormesh(
            values, cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors=PAGE, linewidth=0.5
        )
        count, layers = values.shape
        axes.set_yticks(np.arange(count) + 0.5, [label(d) for d in panels[title]])
        every = max(1, layers // 16)
        axes.set_xticks(np.arange(0, layers, every) + 0.5, np.arange(0, layers, every))
        axes.set(ylim=(count, 0), title=title)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if layers <= 12:
            for (y, x), value in np.ndenumerate(values):
                if np.isnan(value):
                    continue
                colour = "#ffffff" if abs(value) > 0.65 * limit else "#111111"
                text = f"{value:z.2f}".replace("-", "−")
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=colour)
    grid[-1].set_xlabel("layer (0 = embeddings)")
    figure.colorbar(mesh, ax=list(grid), label=quantity, aspect=30, pad=0.01)
    return figure


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name to `(colour, marker)`, no two alike among the first 36."""
    size = len(COLOURS)
    return {n: (COLOURS[i % size], MARKERS[(i + i // size) % size]) for i, n in enumerate(names)}


def legend(figure: "Figure", look: Mapping[str, tuple[str, str]]) -> None:
    """Names with their colours and markers, above the panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, linewidth=1.6, label=name)
        for name, (colour, marker) in look.items()
    ]
    lines = -(-len(handles) // 6)
    figure.legend(handles=handles, loc="outside upper left", ncols=-(-len(handles) // lines))
