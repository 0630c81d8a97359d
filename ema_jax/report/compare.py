"""The page that sets several studies side by side."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ema_jax.report import drawing, tables
from ema_jax.report.drawing import INK, RULE, label
from ema_jax.report.html import Chart, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CAPTION = (
    "Refusal in the target (left) and the largest drop in any other domain against the study's own "
    "base (right), 95 % intervals. A contained arm is left in both."
)


def write_comparison(path: Path, found: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """Writes the page, and beside it the chart's files in `NAME_figures/`.

    Args:
        path: of the page.
        found: of `study.comparison.compare`.
        folders: of the studies, in the order of `found`; a study with a report is linked.
    """
    place = path.parent / f"{path.stem}_figures"
    svg = drawing.save(partial(figure, found["rows"]), place, "comparison", "Target and spill")
    names = [study["study"] for study in found["studies"]]
    links = {}
    for name, folder in zip(names, folders, strict=True):
        if (folder / "report/index.html").is_file():
            report = os.path.relpath(folder / "report/index.html", path.parent)
            links[name] = quote(Path(report).as_posix())
    paired = (
        "Refusal lost from the first study to another, in points, paired by prompt (the same "
        "SHA-256) and seed; positive = the other one refuses less. N: prompts in common with "
        "a valid response of both. Intervals are over prompts and seeds; Holm p within study and "
        "arm."
    )
    page = {
        "title": f"{len(names)} studies of refusal unlearning compared",
        "context": names,
        "notes": found["notes"],
        "studies": tables.records(found["studies"], "What tells the studies apart.", links),
        "rows": tables.records(
            # The table above has their targets.
            [{k: x for k, x in row.items() if k != "target"} for row in found["rows"]],
            "One row per study and arm; rates in per cent, drops in points against the study's own "
            "base.",
            links,
        ),
        "pairs": tables.records(found["pairs"], paired, links) if found["pairs"] else None,
        "chart": Chart(svg, _CAPTION, "comparison", quote(place.name)),
    }
    render("compare.html.jinja", path, page)


def figure(rows: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Target refusal and worst drop: a line per study and arm, so no arm leaves gaps elsewhere."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    look = {"base": (INK, "o")} if "base" in arms else {}
    look |= drawing.looks(arm for arm in arms if arm != "base")
    names = [f"{row['study']}: {row['arm']}" for row in rows]
    made = drawing.blank(0.24 * len(rows) + 1)
    grid = made.subplots(1, 2)
    panels = (
        ("target refusal rate (%)", "target_rate"),
        ("worst other drop (points)", "worst_drop"),
    )
    for i, (axes, (title, key)) in enumerate(zip(grid, panels, strict=True)):
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelleft=i == 0)
        axes.grid(axis="x")
        for y, row in enumerate(rows):
            if y and row["study"] != rows[y - 1]["study"]:
                axes.axhline(y - 0.5, color=RULE, linewidth=0.7)
            if row.get(key) is None:
                continue
            shown = {"x": row[key], "ci95": [row[f"{key}_lo"], row[f"{key}_hi"]]}
            text = f"{row['study']}, {row['arm']}: {100 * row[key]:.1f} {title.rpartition('(')[0]}"
            text += tables.interval(shown["ci95"])
            if key == "worst_drop":
                text += f" in {label(row['worst_domain'])}"
            drawing.interval(axes, shown, "x", y, *look[row["arm"]], text=text)
        axes.set(title=title)
    grid[0].set_xlim(-1.5, 101.5)
    grid[1].axvline(0, color=INK, linewidth=0.9)
    return made
