"""Runs a study, or a replication: several studies in one folder with one table for R1 to R5."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from ema_jax import artifacts, distributed
from ema_jax import config as config_lib
from ema_jax.analysis import plain_arm
from ema_jax.claims import claims
from ema_jax.concepts.forecast import pooled_interval, pooled_score
from ema_jax.config import ModelConfig, StudyConfig
from ema_jax.data.prompts import OWN_SOURCES, build_prompts
from ema_jax.errors import UserError
from ema_jax.models.sharding import AXES
from ema_jax.stages import Workdir
from ema_jax.study import STAGES, Study
from ema_jax.subject import Checkpoint

SCHEMA = 2

Drops = Mapping[str, float | None]  # domain → share of prompts


def run(
    config: StudyConfig, workdir: str | Path, *, only: Sequence[str] | None = None, dry_run: bool
) -> None:
    """Runs what the config describes.

    Args:
        config: a study, or a replication if it has `cells`.
        workdir: its folder; finished stages in it are skipped.
        only: names of the stages to run; all by default.
        dry_run: validate everything and print the plan; neither runs nor writes anything.

    Raises:
        UserError: before any expensive work, for whatever is wrong with config, model or folder.
    """
    unknown = [name for name in only or () if name not in STAGES]
    if unknown:
        raise UserError(f"--stage: {unknown[0]!r} is none of {', '.join(STAGES)}")
    if config.grid:
        raise UserError("config: grid: this is a sweep; run it with python -m ema_jax.sweep")
    root = Path(workdir)
    if root.exists() and not root.is_dir():
        raise UserError(f"--workdir: {root} is a file; name a folder")
    cells = {name: config_lib.cell(config, name) for name in config.cells} or {"": config}
    if bool(config.cells) != (root / "cells").is_dir() and any(root.glob("*")):
        kind = "a single study" if config.cells else "a replication"
        raise UserError(f"{root}: holds {kind}; choose another --workdir")
    found: dict[ModelConfig, Checkpoint | None] = {}
    for cell in cells.values():
        if cell.model not in found:
            found[cell.model] = Checkpoint.find(cell.model, download=not dry_run)
    studies = {}
    for name, cell in cells.items():
        place = Workdir(root / "cells" / name if name else root, only)
        checkpoint = found[cell.model]
        if checkpoint is not None:
            studies[name] = Study(cell, place, checkpoint)
            place.check(studies[name].settings())
    if dry_run:
        for study in studies.values():
            if -1 not in study.config.mesh:  # which needs the devices
                study.check(dict(zip(AXES, study.config.mesh, strict=True)))
        for cell in cells.values():
            if cell.prompts.source in OWN_SOURCES:
                build_prompts(cell.prompts, cell.domains, cell.target)
        _print_plan(cells, found, studies)
        return
    for name in list(studies):
        if name:
            logging.info("cell %s", name)
        studies.pop(name).run()  # which holds its model as long as it lives
    if config.cells and (only is None or "report" in only):
        from ema_jax.report import write_replication_report

        made = summarise(root, cells)
        artifacts.write_json(root / "replication.json", made)
        artifacts.write_csv(root / "replication.csv", made["rows"])
        write = functools.partial(write_replication_report, root, made)
        distributed.first_only(write, "report")
        logging.info("report: %s", root / "report/index.html")


def _print_plan(
    cells: Mapping[str, StudyConfig],
    found: Mapping[ModelConfig, Checkpoint | None],
    studies: Mapping[str, Study],
) -> None:
    for name, cell in cells.items():
        checkpoint = found[cell.model]
        where = (
            f"{checkpoint.folder}, revision {checkpoint.revision or 'none'}"
            if checkpoint
            else "a Hub id, not in the local cache; it is checked when it is downloaded"
        )
        print(f"study {name or 'of'} {cell.model.source} ({where})")
        print(f"  target {cell.target}, domains {', '.join(cell.domains)}")
        print(f"  prompts from {cell.prompts.source}, judged by {cell.judge}")
        print(f"  arms {', '.join(cell.arms)}, seeds {', '.join(map(str, cell.seeds))}")
        if name in studies:
            for stage, done in studies[name].plan():
                print(f"  {'done' if done else 'to do':5}  {stage}")


def summarise(root: Path, cells: Mapping[str, StudyConfig]) -> dict[str, Any]:
    """`replication.json`: a row per cell and arm, and what R1 to R5 and validity come to."""
    described, rows = [], []
    scored: dict[str, list[tuple[Mapping[str, float], list[Drops]]]] = {"pooled": [], "lexical": []}
    for name, cell in cells.items():
        results = artifacts.read_json(root / "cells" / name / "results.json")
        drops = _drops(results, plain_arm(cell))
        described.append(
            {
                "cell": name,
                "family": results["model"]["family"],
                "target": cell.target,
                "drops": drops,
            }
        )
        rows += [_row(name, cell, results, arm) for arm in cell.arms]
        made = results["forecast"]
        scored["pooled"].append((made["score"], list(drops.values())))
        scored["lexical"].append((made["lexical_score"] or {}, list(drops.values())))
    forecast = {
        by: pooled_score([(score, _mean(runs)) for score, runs in each])
        | {"ci95": pooled_interval(each)}
        for by, each in scored.items()
    }
    return {
        "schema": SCHEMA,
        "cells": described,
        "claims": claims(rows, described, forecast),
        "forecast": forecast,
        "rows": rows,
    }


def _drops(results: Mapping[str, Any], arm: str | None) -> dict[str, Drops]:
    """Seed → domain off target → fall of the refusal rate of the arm without retain data."""
    base = results["arms"]["base"]["refusal"]
    runs = results["arms"][arm]["seeds"] if arm else {}

    def fell(domain: str, run: Mapping[str, Any]) -> float | None:
        rates = base[domain]["rate"], run["refusal"][domain]["rate"]
        return None if None in rates else rates[0] - rates[1]

    others = [d for d in results["domains"] if d != results["target"]]
    return {seed: {d: fell(d, run) for d in others} for seed, run in runs.items()}


def _mean(runs: Sequence[Drops]) -> Drops:
    """Over the seeds; unknown where it is in one of them."""
    columns = {d: [run[d] for run in runs] for d in (runs[0] if runs else {})}
    return {d: None if None in x else float(np.mean(np.array(x))) for d, x in columns.items()}


def _row(name: str, config: StudyConfig, results: Mapping[str, Any], arm: str) -> dict[str, Any]:
    ema, arms = results["ema"][arm], results["arms"][arm]
    drops = {d: entry["drop"] for d, entry in ema.items() if entry["drop"] is not None}
    worst = max(drops, key=lambda d: drops[d], default=None)
    runs = arms["seeds"].values()
    rates = [seed["refusal"][config.target]["rate"] for seed in runs]
    invalid = [r["invalid"] / r["total"] for seed in runs for r in seed["refusal"].values()]
    contained = results["containment"].get(arm, {})
    interval = contained.get("ci95", [None, None])
    forecast = results["forecast"] if arm == plain_arm(config) else {}
    return {
        "cell": name,
        "family": results["model"]["family"],
        "target": config.target,
        "arm": arm,
        "seeds": len(arms["seeds"]),
        "target_rate": arms["refusal"][config.target]["rate"],
        "target_rate_max": None if None in rates else max(rates),
        "invalid_rate": max(r["invalid"] / r["total"] for r in arms["refusal"].values()),
        "invalid_rate_max": max(invalid),
        "worst_domain": worst,
        "worst_drop": drops.get(worst),
        "worst_p_holm": ema[worst]["p_holm"] if worst else None,
        "mean_off_target_drop": float(np.mean(list(drops.values()))) if drops else None,
        "recovered": contained.get("recovered"),
        "recovered_lo": interval[0],
        "recovered_hi": interval[1],
        "benign_nll": results["utility"][arm]["benign_nll"],
        "kl_to_base": results["utility"][arm]["kl_to_base"],
        "forecast_spearman": forecast.get("spearman"),
        "forecast_p": forecast.get("p"),
    }
