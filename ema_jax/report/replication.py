"""The chart of a replication, spill per family, target and arm, and its tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ema_jax.report import drawing
from ema_jax.report.drawing import INK, PAGE, label
from ema_jax.report.tables import Table, records

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# What is read together, of some forty columns: its caption and its columns.
_PARTS = (
    (
        "The target: refused of the valid responses, answered of all, right of the answers (by an "
        "embedded model's oracle); max and min: of the worst seed.",
        (
            *("family", "target", "arm", "seeds", "target_rate", "target_rate_max"),
            *("target_answered", "target_answered_min", "target_right_rate", "target_damaged"),
        ),
    ),
    (
        "Spill: the largest and the mean change over the other domains, in points, by both "
        "measures, and how the forecast ranks the drops.",
        (
            *("arm", "worst_domain", "worst_drop", "worst_p_holm", "mean_off_target_drop"),
            *("worst_rise_domain", "worst_rise", "worst_rise_p_holm", "mean_off_target_rise"),
            *("forecast_spearman", "forecast_p"),
        ),
    ),
    (
        "Containment: the share of the change that the arm with retain data takes back, with 95 % "
        "intervals, where it can be containment.",
        (
            *("arm", "compared_with", "target_rate", "recovered", "recovered_lo", "recovered_hi"),
            *("recovered_by_compliance", "recovered_by_compliance_lo"),
            *("recovered_by_compliance_hi", "not_contained"),
        ),
    ),
    (
        "Validity and utility: invalid responses of the worst domain, nats per token of benign "
        "answers, divergence from base.",
        (
            *("arm", "invalid_domain", "invalid_rate", "invalid_rate_max", "off_topic_rate"),
            *("degenerate_rate", "benign_nll", "kl_to_base"),
        ),
    ),
)


def tables(rows: Sequence[Mapping[str, Any]], links: Mapping[str, str]) -> list[Table]:
    """Tables of the rows of `replication.json`, each by cell and arm; those that have figures."""
    made = []
    for caption, columns in _PARTS:
        own = [row for row in rows if "compared_with" not in columns or row.get("compared_with")]
        keys = [key for key in ("cell", *columns) if any(key in row for row in own)]
        shown = [{key: row.get(key) for key in keys} for row in own]
        if set(keys) - {"cell", "family", "target", "arm", "seeds"}:
            made.append(records(shown, caption, links))
    return made


def figure(report: Mapping[str, Any]) -> "Figure | None":
    """Mean (filled) and worst (hollow) off-target drop per target and arm, a panel per family."""
    rows = [r for r in report.get("rows", []) if r.get("mean_off_target_drop") is not None]
    if not rows:
        return None
    families = list(dict.fromkeys(r["family"] for r in rows))
    targets = list(dict.fromkeys(r["target"] for r in rows))
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    look = drawing.looks(targets)
    figure, grid = drawing.panels(
        len(families), columns=2, height_inches=0.3 * len(arms) * len(targets) + 0.7
    )
    for axes, family in zip(grid, families, strict=True):
        axes.axvline(0, color=INK, linewidth=0.9)
        for target, y in drawing.rows(axes, arms, look):
            colour, marker = look[target]
            for row in rows:
                if (row["family"], row["target"]) != (family, target):
                    continue
                if row.get("mean_off_target_drop") is None:
                    continue
                where = f"{family}, target {label(target)}, {row['arm']}"
                height, mean = y[arms.index(row["arm"])], 100 * row["mean_off_target_drop"]
                if row.get("worst_drop") is not None:
                    worst = 100 * row["worst_drop"]
                    axes.plot((mean, worst), (height, height), color=colour, linewidth=1.2)
                    far = axes.plot(worst, height, marker, color=colour, markerfacecolor=PAGE)
                    place = label(row.get("worst_domain") or "the worst domain")
                    drawing.tip(far[0], f"{where}: {worst:z.1f} points in {place}")
                near = axes.plot(mean, height, marker, color=colour)
                drawing.tip(near[0], f"{where}: {mean:z.1f} points, mean over the other domains")
        axes.set(title=family)
    low = min(axes.get_xlim()[0] for axes in grid)
    high = max(axes.get_xlim()[1] for axes in grid)
    for axes in grid:
        axes.set_xlim(low, high)
    figure.supxlabel(
        "off-target drop in refusal rate (points): filled = mean, hollow = worst", size=9.5
    )
    drawing.legend(figure, {f"target {t}": look[t] for t in targets})
    return figure
