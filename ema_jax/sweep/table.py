"""The result of a sweep: one tidy row a cell, and a page over all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from absl import logging

from ema_jax.refusal.responses import responses_by_domain
from ema_jax.refusal.scores import refusal_rate
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.report import write_sweep_report
from ema_jax.runtime.files import atomic_path, write_csv
from ema_jax.study.artifacts import BASE, Artifacts, Run
from ema_jax.study.results import off_target, paired_changes
from ema_jax.sweep.grid import Cell

if TYPE_CHECKING:
    from ema_jax.sweep.worker import Sweep


def write(sweep: "Sweep") -> None:
    """Writes `sweep.csv`, `sweep.parquet` and `report/index.html` of a finished sweep."""
    found = [_row(sweep, cell) for cell in sweep.cells]
    # Cells that stopped, or of other domains, have other columns.
    columns = dict.fromkeys(key for row in found for key in row)
    rows: list[Mapping[str, Any]] = [{key: row.get(key) for key in columns} for row in found]
    write_csv(sweep.folder / "sweep.csv", rows)
    with atomic_path(sweep.folder / "sweep.parquet") as temporary:
        pd.DataFrame(rows).to_parquet(temporary, index=False)
    write_sweep_report(sweep.folder, summarised(rows))
    logging.info("report: %s", sweep.folder / "report/index.html")


def _row(sweep: "Sweep", cell: Cell) -> dict[str, Any]:
    point, folder = cell.point, sweep.folder / "points" / cell.point.name
    status = sweep.status(cell.name)
    axes = {name: _plain(value) for name, value in point.values.items()}
    if "model.source" in axes:
        axes["model.source"] = sweep.model(point)
    row = {
        "cell": cell.number,
        "point": point.name,
        "model": sweep.model(point),
        "target": point.config.target,
        **axes,
        "arm": cell.arm,
        "seed": cell.seed,
        "status": status["status"],
        "seconds": status["seconds"],
    }
    return row if status["status"] != "done" else row | _figures(folder, cell)


def _figures(folder: Path, cell: Cell) -> dict[str, Any]:
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
    *("cell", "point", "seed", "seconds", "status", "steps", "stopped_at"),
    *("worst_domain", "worst_rise_domain"),
)


def summarised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per point and arm: means over the seeds, and the range of the two main figures."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["point"], row["arm"]), []).append(row)
    result = []
    for runs in groups.values():
        done = [run for run in runs if run["status"] == "done"]
        one: dict[str, Any] = {}
        for key, value in runs[0].items():
            if key in _ONE_RUN or key.startswith("rate_"):
                continue
            figure = key in _FIGURES
            one[key] = _mean([run[key] for run in done]) if figure else value
        one["target_rate_max"] = max(
            (run["target_rate"] for run in done if run["target_rate"] is not None), default=None
        )
        result.append(one | {"seeds": len(done), "stopped": len(runs) - len(done)})
    return result


_FIGURES = (
    "target_rate",
    "target_answered",
    "mean_off_target_drop",
    "worst_drop",
    "mean_off_target_rise",
    "worst_rise",
    "invalid_rate",
    "benign_nll",
    "kl_to_base",
)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _plain(value: Any) -> Any:
    """What a cell of a table can hold."""
    return value if isinstance(value, str | int | float | bool) else str(value)
