"""The chart of a sweep: target refusal against spill, a mark per point and arm."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ema_jax.report import drawing
from ema_jax.report.drawing import INK
from ema_jax.report.tables import percent, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(rows: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Mean off-target drop over the target's refusal rate; None without a row that has both.

    Narrow, to be read on a phone.
    """
    keys = ("target_rate", "mean_off_target_drop")
    known = [row for row in rows if not any(row.get(key) is None for key in keys)]
    if not known:
        return None
    look = drawing.looks(dict.fromkeys(str(row.get("arm")) for row in known))
    made = drawing.blank(3.8, drawing.NARROW_INCHES)
    axes = made.subplots()
    axes.axhline(0, color=INK, linewidth=0.9)
    axes.grid()
    for arm, (colour, marker) in look.items():
        own = [row for row in known if str(row.get("arm")) == arm]
        x, y = ([100 * row[key] for row in own] for key in keys)
        drawn = axes.plot(x, y, marker, color=colour, markersize=7, alpha=0.85, clip_on=False)
        texts = [
            f"{row.get('point')}, {arm}: target refusal {percent(row['target_rate'])}, mean drop "
            f"in the other domains {points(row['mean_off_target_drop'])} points"
            for row in own
        ]
        drawing.tip(drawn[0], *texts)
    highest = max(100 * row["target_rate"] for row in known)
    axes.set_xlim(-0.02 * max(highest, 10), 1.05 * max(highest, 10))
    axes.set(xlabel="target refusal rate (%)", ylabel="mean off-target drop (points)")
    drawing.legend(made, look, columns=3)
    return made
