"""The look of every chart: theme, panels, shared parts, and writing to files."""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_jax.runtime.files import atomic_path, write_text

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
    "axes.titley": 1.0,  # where it stands anyway: matplotlib looks for its place at every drawing
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "ema_jax",
    "savefig.dpi": 150,
}
# Formats beside SVG, without what would differ from run to run.
FILES: dict[str, dict[str, None]] = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
WIDTH_INCHES = 9.0
NARROW_INCHES = 5.2  # of the chart on the first screen, also read on a phone


def label(name: str) -> str:
    """A domain's name for people: `sensitive_content` is `Sensitive content`."""
    return "Medical/legal" if name == "medical_legal" else name.replace("_", " ").capitalize()


def tip(artist: Any, *texts: str) -> None:
    """Gives an artist the text that the page shows over it: one, or one for every marker of a line.

    Of a line with several texts all markers must be drawn: no missing value, none out of view.
    """
    # matplotlib writes an artist's id into its SVG group, from where `_titled` takes it.
    artist.set_gid(_TIP + _BETWEEN.join(texts))


_TIP, _BETWEEN = "tip:", "\x1f"
_TIPPED = re.compile(r'<g id="tip:([^"]*)">(.*?)(?=<g id="|\Z)', flags=re.DOTALL)


def _titled(svg: str) -> str:
    """SVG with what `tip` left in ids as `<title>` elements, which every viewer shows."""

    def replace(match: re.Match[str]) -> str:
        first, *more = texts = match[1].split(_BETWEEN)
        body = match[2]
        if not more:
            return f'<g class="tip"><title>{first}</title>{body}'
        each = iter(texts)
        marked = re.sub(
            r"<use ([^>]*)/>",
            lambda use: f'<use class="tip" {use[1]}><title>{next(each)}</title></use>',
            body,
            count=len(texts),
        )
        return f"<g>{marked}"

    return _TIPPED.sub(replace, svg)


def save(draw: "Callable[[], Figure | None]", folder: Path, name: str, alt: str) -> str:
    """Draws one figure, writes `folder/name.svg`, `.png` and `.pdf`, and returns inline SVG markup.

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
        # Laid out once: the same in every format. An engine that stays, even one that does nothing,
        # has matplotlib draw everything twice for each of them.
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
        figure.set_layout_engine()
        for kind, metadata in FILES.items():
            with atomic_path(folder / f"{name}.{kind}") as path:
                figure.savefig(path, format=kind, metadata=metadata, facecolor="white")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
    text = _titled(drawn.getvalue())
    write_text(folder / f"{name}.svg", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"\n\s*", "\n", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)


def blank(height_inches: float, width_inches: float = WIDTH_INCHES) -> "Figure":
    """An empty figure, by default of the page's width."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


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
    text: str = "",
) -> None:
    """A share with its interval, in percent, at height y; nothing where there is none."""
    if not entry or entry.get(key) is None:
        return
    drawn = []
    if entry.get("ci95") and None not in entry["ci95"]:
        drawn += axes.plot([100 * x for x in entry["ci95"]], (y, y), color=colour, linewidth=1.6)
    face = colour if filled else PAGE
    drawn += axes.plot(
        100 * entry[key], y, marker, color=colour, markerfacecolor=face, markersize=6
    )
    for artist in drawn if text else ():
        tip(artist, text)


# Places for a name around its point, in points: (dx, dy, alignment).
_AROUND = (
    *((7, 4, "left"), (-7, 4, "right"), (7, -11, "left"), (-7, -11, "right")),
    *((0, 10, "center"), (0, -17, "center"), (12, 15, "left"), (-12, 15, "right")),
    *((12, -22, "left"), (-12, -22, "right"), (0, 22, "center"), (0, -29, "center")),
)


def name_points(
    axes: "Axes",
    places: Mapping[str, tuple[float, float]],
    size_inches: tuple[float, float],
    bars: Sequence[tuple[float, float, float]] = (),
) -> None:
    """Writes each name beside its point, where it covers no other name, point or bar.

    Args:
        axes: with its limits set.
        places: name → point.
        size_inches: width and height of the axes, roughly: the layout is not known yet.
        bars: `(x, low, high)` of vertical lines.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()

    def inside(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - bottom) / (top - bottom)
        return 72 * size_inches[0] * across, 72 * size_inches[1] * up

    points = {name: inside(*place) for name, place in places.items()}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points.values()]
    for x, low, high in bars:
        (at, start), (_, end) = inside(x, low), inside(x, high)
        taken.append((at - 1, start, at + 1, end))
    for name, (x, y) in points.items():
        text = label(name)
        wide, high, boxes = 5.6 * len(text), 11, []
        for dx, dy, side in _AROUND:
            start = x + dx - {"left": 0, "right": wide, "center": wide / 2}[side]
            boxes.append((start, y + dy, start + wide, y + dy + high))
        clear = [not any(_overlap(box, other) for other in taken) for box in boxes]
        best = clear.index(True) if True in clear else 0
        taken.append(boxes[best])
        dx, dy, side = _AROUND[best]
        axes.annotate(text, places[name], (dx, dy), textcoords="offset points", ha=side, size=9)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def share_y(grid: "Sequence[Axes]") -> None:
    """Gives panels the widest range of all."""
    low = min(axes.get_ylim()[0] for axes in grid)
    high = max(axes.get_ylim()[1] for axes in grid)
    for axes in grid:
        axes.set_ylim(low, high)


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name to `(colour, marker)`, no two alike among the first 36."""
    size = len(COLOURS)
    return {n: (COLOURS[i % size], MARKERS[(i + i // size) % size]) for i, n in enumerate(names)}


def legend(figure: "Figure", look: Mapping[str, tuple[str, str]], columns: int = 6) -> None:
    """Names with their colours and markers, above the panels, so many in a line at most."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, linewidth=1.6, label=name)
        for name, (colour, marker) in look.items()
    ]
    lines = -(-len(handles) // columns)
    figure.legend(handles=handles, loc="outside upper left", ncols=-(-len(handles) // lines))
