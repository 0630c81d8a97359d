"""Figure and tables of the shares of responses.

Refused, complied, off topic, degenerate and not judged sum to one. Results of older studies count
invalid responses without their kind.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ema_jax.report import drawing
from ema_jax.report.drawing import label, tip
from ema_jax.report.figures import ordered_domains, titled
from ema_jax.report.tables import MISSING, Row, Table, answered, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Part(NamedTuple):
    """The look of one segment of a bar; its hatch or place repeats what its colour says."""

    name: str
    colour: str
    hatch: str = ""
    text: str = "#111111"


# Colours are fixed: they are read against the label inside, whatever the page's theme.
PARTS = {
    "refused": Part("refused", "#1f6aa5", text="#ffffff"),
    "harmful": Part("complied: harmful", "#c44f00", text="#ffffff"),
    "harmless": Part("complied: harmless", "#f3d9a4"),
    "unknown": Part("complied", "#f0a92e"),
    "off_topic": Part("off topic", "#c9ced4", "////"),
    "degenerate": Part("degenerate", "#8b939c", "xxxx"),
    "unjudged": Part("not judged", "#ffffff", "...."),
    "invalid": Part("invalid (kind not recorded)", "#a9b0b8", "\\\\\\\\"),
}
_EDGE = "#4d555e"  # of segments, and of hatches
_SMALLEST_LABELLED = 0.07


def parts(rate: Mapping[str, Any]) -> dict[str, int]:
    """Counts of a refusal score (schema R) by the names of `PARTS`, in their order; zeros too."""
    complied = rate["valid"] - rate["refused"]
    harm = rate.get("harm") or {"unknown": complied}
    counts = {"refused": rate["refused"], **{k: harm.get(k, 0) for k in list(PARTS)[1:4]}}
    found = rate.get("shares")
    if found is None:
        return {**counts, "invalid": rate["invalid"]}
    invalid = ("off_topic", "degenerate", "unjudged")
    return counts | {name: round(found[name] * rate["total"]) for name in invalid}


def figure(results: Mapping[str, Any]) -> "Figure | None":
    """Stacked bars: a panel per arm, a bar per domain, the target first."""
    from matplotlib.patches import Patch

    domains = ordered_domains(results)
    arms = {
        arm: {d: parts(r) for d, r in entry["refusal"].items() if r.get("total")}
        for arm, entry in results["arms"].items()
    }
    if not any(arms.values()):
        return None
    # Of arms that all have many panels a row is three wide: the labels must fit their segments.
    columns = min(3, len(arms))
    figure, grid = drawing.panels(len(arms), columns, height_inches=0.29 * len(domains) + 0.55)
    for i, (axes, (arm, bars)) in enumerate(zip(grid, arms.items(), strict=True)):
        axes.set(title=arm, xlim=(0, 100), xticks=(0, 50, 100))
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.set_yticks(range(len(domains)), [titled(d, results) for d in domains])
        axes.tick_params(axis="y", length=0, labelleft=i % columns == 0)
        if i % columns == 0:
            axes.get_yticklabels()[0].set_fontweight("bold")
        axes.spines["left"].set_visible(False)
        for y, domain in enumerate(domains):
            _bar(axes, y, bars.get(domain, {}), f"{label(domain)}, {arm}")
    figure.supxlabel("% of all responses", fontsize=9.5)
    seen = {name for bars in arms.values() for bar in bars.values() for name, n in bar.items() if n}
    look = {name: part for name, part in PARTS.items() if name in seen}
    if {"harmful", "harmless"} & seen and "unknown" in seen:
        look["unknown"] = look["unknown"]._replace(name="complied: harm not judged")
    handles = [
        Patch(facecolor=p.colour, hatch=p.hatch, edgecolor=_EDGE, linewidth=0.5, label=p.name)
        for p in look.values()
    ]
    lines = -(-len(handles) // 6)
    figure.legend(handles=handles, loc="outside upper left", ncols=-(-len(handles) // lines))
    return figure


def _bar(axes: "Axes", y: int, counts: Mapping[str, int], where: str) -> None:
    left, total = 0.0, sum(counts.values())
    for name, count in counts.items():
        if not count:
            continue
        part, share = PARTS[name], count / total
        (segment,) = axes.barh(
            y,
            100 * share,
            left=left,
            height=0.78,
            color=part.colour,
            hatch=part.hatch,
            edgecolor=_EDGE,
            linewidth=0.5,
        )
        tip(segment, f"{where}: {part.name}, {count} of {total} ({100 * share:.1f} %)")
        if share >= _SMALLEST_LABELLED:
            # A plate under the figure, where a hatch would run through it.
            plate = {"facecolor": part.colour, "edgecolor": "none", "pad": 1.2}
            axes.text(
                left + 50 * share,
                y,
                f"{100 * share:.0f}",
                ha="center",
                va="center_baseline",
                color=part.text,
                fontsize=8.5,
                bbox=plate if part.hatch else None,
            )
        left += 100 * share


def counts(results: Mapping[str, Any]) -> Table:
    """Table of the number of responses in each share, per domain and arm."""
    rates = [r for entry in results["arms"].values() for r in entry["refusal"].values()]
    harm_known = any((r.get("harm") or {}).get(k) for r in rates for k in ("harmful", "harmless"))
    groups = []
    for domain in ordered_domains(results):
        rows = []
        for arm, entry in results["arms"].items():
            rate = entry["refusal"].get(domain)
            if rate:
                rows.append(Row((arm, *_count_cells(rate, harm_known))))
        groups.append((titled(domain, results), tuple(rows)))
    harm = ("Harmful", "Harmless", "Harm not judged") if harm_known else ()
    return Table(
        "Number of responses in each share; every response counts in exactly one. Arms pool their "
        "seeds. Answered: complied, as a share of all responses.",
        (
            *("Domain", "Arm", "Refused", "Complied", *harm, "Off topic", "Degenerate"),
            *("Not judged", "Total", "Answered"),
        ),
        tuple(groups),
        (0, 1),
    )


def _count_cells(rate: Mapping[str, Any], harm_known: bool) -> tuple[str, ...]:
    found = parts(rate)
    complied = rate["valid"] - rate["refused"]
    names = [*(list(PARTS)[1:4] if harm_known else []), "off_topic", "degenerate", "unjudged"]
    return (
        str(rate["refused"]),
        str(complied),
        *(str(found.get(name, MISSING)) for name in names),
        str(rate["total"]),
        percent(answered(rate)),
    )


def right_answers(found: Mapping[str, Any] | None) -> str:
    """Cell: right answers of all responses that are no refusal, by the oracle."""
    if not found:
        return MISSING
    return f"{found['right']} / {found['answers']} ({percent(found['rate'])})"


def oracle(results: Mapping[str, Any]) -> Table | None:
    """Table of right answers per domain and arm; None where the model has no oracle."""
    arms = {arm: e["oracle"] for arm, e in results["arms"].items() if e.get("oracle")}
    if not arms:
        return None
    groups = tuple(
        (titled(d, results), (Row(tuple(right_answers(arms[arm].get(d)) for arm in arms)),))
        for d in ordered_domains(results)
        if any(d in found for found in arms.values())
    )
    return Table(
        "Exact check of the embedded model's answers: right ones of all responses that are no "
        "refusal, the off-topic and degenerate ones among them. The model was trained on a "
        "grammar, and an answer outside it is wrong.",
        ("Domain", *arms),
        groups,
    )


def validity(results: Mapping[str, Any]) -> Table:
    """Table of the calibration that separates answers from off-topic and degenerate responses."""
    groups = []
    for name, value in results["validity"].items():
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        groups.append((label(str(name)), tuple(Row((str(k), _figure(v))) for k, v in items)))
    return Table(
        "The screen that separates answers from off-topic and degenerate responses: calibrated on "
        "the base model's own responses, not set by hand.",
        ("Calibration", "Name", "Value"),
        tuple(groups),
        (0, 1, 2),
    )


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_figure, value))
    if isinstance(value, Mapping):
        names = {"auc": "AUC"}
        return ", ".join(f"{names.get(k, label(k).lower())} {_figure(v)}" for k, v in value.items())
    return MISSING if value is None else str(value)
