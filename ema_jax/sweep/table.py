"""The result of a sweep: one tidy row a cell, and a page over all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from absl import logging
from scipy import stats

from ema_jax.refusal.responses import responses_by_domain
from ema_jax.refusal.scores import refusal_rate
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.report import write_sweep_report
from ema_jax.runtime.files import atomic_path, write_csv
from ema_jax.study.artifacts import BASE, Artifacts, Run
from ema_jax.study.results import off_target, paired_changes
from ema_jax.sweep.grid import Cell

Row = dict[str, Any]  # its columns depend on the grid and on the domains


class FinishedCell(NamedTuple):
    """A cell, the Hub id or folder name of its model, and how its run ended."""

    cell: Cell
    model: str
    status: str
    seconds: float


def write(folder: Path, cells: Sequence[FinishedCell]) -> None:
    """Writes `sweep.csv`, `sweep.parquet` and `report/index.html` of a finished sweep.

    Args:
        folder: the sweep's, with a study of every point under `points/`.
        cells: all of them, in order.
    """
    found = [_row(folder, cell) for cell in cells]
    # Cells that stopped, or of other domains, have other columns.
    columns = dict.fromkeys(key for row in found for key in row)
    rows: list[Mapping[str, Any]] = [{key: row.get(key) for key in columns} for row in found]
    write_csv(folder / "sweep.csv", rows)
    with atomic_path(folder / "sweep.parquet") as temporary:
        pd.DataFrame(rows).to_parquet(temporary, index=False)
    settings = {name for each in cells for name in _settings(each)}
    write_sweep_report(folder, summarised(rows, settings))
    logging.info("report: %s", folder / "report/index.html")


def _row(folder: Path, finished: FinishedCell) -> Row:
    cell = finished.cell
    row = {
        "cell": cell.number,
        **_settings(finished),
        "seed": cell.seed,
        "status": finished.status,
        "seconds": finished.seconds,
    }
    if finished.status != "done":
        return row
    return row | _figures(folder / "points" / cell.point.name, cell)


def _settings(finished: FinishedCell) -> Row:
    """Columns that are the same for every seed of a point and arm."""
    cell, point = finished.cell, finished.cell.point
    axes = {name: _plain(value) for name, value in point.values.items()}
    if "model.source" in axes:
        axes["model.source"] = finished.model
    fixed = {"point": point.name, "model": finished.model, "target": point.config.target}
    return {**fixed, **axes, "arm": cell.arm}


def _figures(folder: Path, cell: Cell) -> Row:
    artifacts, this = Artifacts(folder), Run(cell.arm, cell.seed)
    target, domains = cell.point.config.target, cell.point.config.domains
    trained = artifacts.trajectory(this).read()
    base, run = (
        responses_by_domain(artifacts.responses(name).read()) for name in (BASE, this.name)
    )
    rates = {d: refusal_rate(run[d].shares) for d in domains}
    changes = paired_changes(base, {d: run[d] for d in domains})
    drop, rise = (off_target(changes[key], target) for key in ("drop", "compliance_rise"))
    return {
        "steps": trained["steps"],
        "stopped_at": trained["stopped"],
        "target_rate": rates[target]["rate"],
        "target_answered": rates[target]["shares"][COMPLIED],
        "mean_off_target_drop": drop.mean,
        "worst_domain": drop.worst_domain,
        "worst_drop": drop.worst,
        "mean_off_target_rise": rise.mean,
        "worst_rise_domain": rise.worst_domain,
        "worst_rise": rise.worst,
        "invalid_rate": max(r["invalid"] / r["total"] for r in rates.values()),
        **artifacts.evaluation(this.name).read()["utility"],
        **{f"rate_{d}": rates[d]["rate"] for d in domains},
    }


_ONE_RUN = (
    *("cell", "seed", "seconds", "status", "steps", "stopped_at"),
    *("worst_domain", "worst_rise_domain"),
)

_SPREAD = (
    *("target_rate", "target_answered", "mean_off_target_drop", "worst_drop"),
    *("mean_off_target_rise", "worst_rise"),
)


def summarised(rows: Sequence[Mapping[str, Any]], settings: set[str]) -> list[Row]:
    """A row per point and arm: every figure's mean over the seeds, and the worst target rate.

    Unknown where it is in one of them: a rate without a valid response would leave the mean to the
    sound seeds. Figures of `_SPREAD` have Student's 95 % interval over seeds as `x_lo` and `x_hi`.

    Args:
        rows: of `sweep.csv`.
        settings: columns that are no figures.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["point"], row["arm"]), []).append(row)
    result = []
    for runs in groups.values():
        done = [run for run in runs if run["status"] == "done"]
        shown = [k for k in runs[0] if k not in _ONE_RUN and not k.startswith("rate_")]
        one = {k: runs[0][k] if k in settings else _mean([run[k] for run in done]) for k in shown}
        for k in (name for name in _SPREAD if name in one):
            lowest = 0.0 if k.startswith("target") else -1.0  # a share, or a difference of two
            one[f"{k}_lo"], one[f"{k}_hi"] = _interval([run[k] for run in done], lowest)
        targets = [run["target_rate"] for run in done]
        one["target_rate_max"] = None if None in targets else max(targets, default=None)
        result.append(one | {"seeds": len(done), "stopped": len(runs) - len(done)})
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    return float(np.mean(np.array(values, float))) if values and None not in values else None


def _interval(values: Sequence[float | None], lowest: float) -> tuple[float | None, float | None]:
    """Student's 95 % interval of the mean, within `lowest` and 1; unknown of one value or none."""
    if len(values) < 2 or None in values:
        return None, None
    known = np.array(values, float)
    half = stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known))
    return max(float(known.mean() - half), lowest), min(float(known.mean() + half), 1.0)


def _plain(value: Any) -> Any:
    """A value that a cell of a table can hold."""
    return value if isinstance(value, str | int | float | bool) else str(value)
