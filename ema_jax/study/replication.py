"""A replication: several studies in one folder, with one table for R1 to R5."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from ema_jax.concepts.forecast import pooled_interval, pooled_score
from ema_jax.config import StudyConfig
from ema_jax.refusal.scores import RefusalScore
from ema_jax.refusal.verdicts import COMPLIED, DEGENERATE, OFF_TOPIC
from ema_jax.report.effects import not_contained
from ema_jax.study.artifacts import Artifacts
from ema_jax.study.claims import claims, spills
from ema_jax.study.results import off_target, plain_arm
from ema_jax.study.schema import (
    Arm,
    ByDomain,
    Claim,
    Replication,
    ReplicationCell,
    ReplicationRow,
    Results,
)

SCHEMA: Final = 2

Changes = Mapping[str, float | None]  # domain → share of prompts


def unfinished(root: Path, cells: Mapping[str, StudyConfig]) -> list[str]:
    """The cells whose `results.json` does not have every arm, or no forecast yet."""

    def whole(name: str, cell: StudyConfig) -> bool:
        found = Artifacts(root / "cells" / name).results
        made = found.read() if found.path.exists() else {"arms": {}}
        return set(cell.arms) <= set(made["arms"]) and "forecast" in made

    return [name for name, cell in cells.items() if not whole(name, cell)]


def summarise(root: Path, cells: Mapping[str, StudyConfig]) -> Replication:
    """`replication.json`: a row per cell and arm, and the decisions on R1 to R5 and validity."""
    return _summary(
        {
            name: (cell, Artifacts(root / "cells" / name).results.read())
            for name, cell in cells.items()
        }
    )


def study_claims(config: StudyConfig, results: Results) -> dict[str, Claim]:
    """R1 to R5 and validity for one study by itself, as for a replication of one cell."""
    arms = {name: arm for name, arm in config.arms.items() if name in results["arms"]}
    return _summary({"": (dataclasses.replace(config, arms=arms), results)})["claims"]


def _summary(cells: Mapping[str, tuple[StudyConfig, Results]]) -> Replication:
    described: list[ReplicationCell] = []
    rows: list[ReplicationRow] = []
    scored: dict[str, list[tuple[Mapping[str, float], list[Changes]]]] = {}
    for name, (cell, results) in cells.items():
        arm, made = plain_arm(cell), results.get("forecast") or {}
        drops, rises = (_by_seed(results, arm, key) for key in ("drop", "compliance_rise"))
        described.append(
            {
                "cell": name,
                "family": results["model"]["family"],
                "target": cell.target,
                "drops": drops,
                "rises": rises,
            }
        )
        rows += [_row(name, cell, results, arm) for arm in cell.arms]
        scores, lexical = made.get("score") or {}, made.get("lexical_score") or {}
        for by, score, changes in (
            ("pooled", scores, drops),
            ("lexical", lexical, drops),
            ("pooled_by_compliance", scores, rises),
            ("lexical_by_compliance", lexical, rises),
        ):
            scored.setdefault(by, []).append((score, list(changes.values())))
    forecast: Any = {
        by: {
            **pooled_score([(score, _mean(runs)) for score, runs in each]),
            "ci95": pooled_interval(each),
        }
        for by, each in scored.items()
    }
    return {
        "schema": SCHEMA,
        "cells": described,
        "claims": claims(rows, described, forecast),
        "forecast": forecast,
        "rows": rows,
    }


def _by_seed(
    results: Results, arm: str | None, key: Literal["drop", "compliance_rise"]
) -> dict[str, ByDomain]:
    """Seed → domain off target → paired change of the arm without retain data.

    Empty where the study's analysis is older than the measure.
    """
    runs = results["arms"][arm]["seeds"] if arm else {}
    others = [d for d in results["domains"] if d != results["target"]]
    return {seed: {d: run[key][d] for d in others} for seed, run in runs.items() if key in run}


def _mean(runs: Sequence[Changes]) -> Changes:
    """Over the seeds; unknown where it is in one of them."""
    columns = {d: [run[d] for run in runs] for d in (runs[0] if runs else {})}
    return {d: None if None in x else float(np.mean(np.array(x))) for d, x in columns.items()}


def _row(name: str, config: StudyConfig, results: Results, arm: str) -> ReplicationRow:
    ema, entry = results["ema"][arm], results["arms"][arm]
    drop = off_target({d: e["drop"] for d, e in ema.items()}, config.target)
    rise = off_target({d: e.get("compliance_rise") for d, e in ema.items()}, config.target)
    forecast: Any = results.get("forecast", {}) if arm == plain_arm(config) else {}
    contained: Any = results["containment"].get(arm, {})
    why = not_contained(results, arm) if contained else None
    on_target = results.get("on_target", {})
    bounds, compliance_bounds = (
        [None, None] if why else contained.get(key, [None, None])
        for key in ("ci95", "compliance_ci95")
    )
    row: Any = {
        "cell": name,
        "family": results["model"]["family"],
        "target": config.target,
        "arm": arm,
        "seeds": len(entry["seeds"]),
        **_target_figures(entry, config.target),
        "target_damaged": on_target[arm]["damaged"] if arm in on_target else None,
        "relevance_measured": "validity" in results,
        **_invalid_figures(entry),
        "worst_domain": drop.worst_domain,
        "worst_drop": drop.worst,
        "worst_p_holm": ema[drop.worst_domain]["p_holm"] if drop.worst_domain else None,
        "spilled_domains": sum(spills(e["drop"], e["p_holm"], e["ci95"]) for e in ema.values()),
        "mean_off_target_drop": drop.mean,
        "worst_rise_domain": rise.worst_domain,
        "worst_rise": rise.worst,
        "worst_rise_p_holm": (
            ema[rise.worst_domain].get("compliance_p_holm") if rise.worst_domain else None
        ),
        "spilled_domains_by_compliance": sum(
            spills(e.get("compliance_rise"), e.get("compliance_p_holm"), e.get("compliance_ci95"))
            for e in ema.values()
        ),
        "mean_off_target_rise": rise.mean,
        "compared_with": contained.get("compared_with"),
        "not_contained": why,
        "recovered": None if why else contained.get("recovered"),
        "recovered_lo": bounds[0],
        "recovered_hi": bounds[1],
        "recovered_by_compliance": None if why else contained.get("recovered_by_compliance"),
        "recovered_by_compliance_lo": compliance_bounds[0],
        "recovered_by_compliance_hi": compliance_bounds[1],
        "benign_nll": results["utility"][arm]["benign_nll"],
        "kl_to_base": results["utility"][arm]["kl_to_base"],
        "forecast_spearman": forecast.get("spearman"),
        "forecast_p": forecast.get("p"),
    }
    return row


def _target_figures(entry: Arm, target: str) -> dict[str, float | None]:
    """Of the target's responses: refused of the valid ones, answered of all, and the worst seed."""
    runs = [run["refusal"][target] for run in entry["seeds"].values()]
    rates = [run["rate"] for run in runs if run["rate"] is not None]
    answered = [x for run in runs if (x := _share(run, COMPLIED)) is not None]
    oracle = (entry.get("oracle") or {}).get(target)
    return {
        "target_rate": entry["refusal"][target]["rate"],
        "target_rate_max": max(rates) if len(rates) == len(runs) else None,
        "target_answered": _share(entry["refusal"][target], COMPLIED),
        "target_answered_min": min(answered, default=None),
        "target_right_rate": oracle["rate"] if oracle else None,
    }


def _share(rate: RefusalScore, name: str) -> float | None:
    """A share of all responses; None where the study's analysis is older than shares."""
    return rate["shares"][name] if "shares" in rate else None


def _invalid_figures(entry: Arm) -> dict[str, float | str | None]:
    """Of the domain (the target is one of them) with most invalid responses."""
    rates = entry["refusal"]
    worst = max(rates, key=lambda d: rates[d]["invalid"] / rates[d]["total"])
    seeds = [
        r["invalid"] / r["total"] for s in entry["seeds"].values() for r in s["refusal"].values()
    ]
    return {
        "invalid_rate": rates[worst]["invalid"] / rates[worst]["total"],
        "invalid_rate_max": max(seeds),
        "invalid_domain": worst,
        "off_topic_rate": _share(rates[worst], OFF_TOPIC),
        "degenerate_rate": _share(rates[worst], DEGENERATE),
    }
