"""Several finished studies side by side, paired prompt by prompt where they asked the same ones.

Prompts are the same where the SHA-256 of their texts is. Verdicts of different judges are never
paired: a difference would be the judges'.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ema_jax.errors import UserError
from ema_jax.refusal.paired import paired_drop
from ema_jax.refusal.significance import holm
from ema_jax.refusal.verdicts import COMPLIED, share
from ema_jax.report.effects import not_contained
from ema_jax.study.artifacts import BASE
from ema_jax.study.finished import read_asked, read_judged, read_results
from ema_jax.study.results import off_target

Row = dict[str, Any]


class Finished(NamedTuple):
    """A finished study: the name it is shown by, its folder and its results."""

    name: str
    folder: Path
    results: Mapping[str, Any]


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """The figures of several studies, and what changes from the first to each other one.

    Args:
        folders: of two studies or more, each with a `results.json`.

    Returns:
        `studies`, what tells each from the others; `rows`, one per study and arm; `pairs`, one per
        other study, arm that both have and domain: `drop` of refusal from the first to the other
        with `drop_lo`, `drop_hi`, `p_holm` (within study and arm) and `n` prompts with a valid
        response of both; `notes`, what could not be paired and why.

    Raises:
        UserError: fewer than two, or one that is no finished study.
    """
    if len(folders) < 2:
        raise UserError("compare: name the folders of two finished studies or more")
    names = _names(folders)
    studies = [Finished(n, f, read_results(f)) for n, f in zip(names, folders, strict=True)]
    pairs: list[Row] = []
    notes: list[str] = []
    for other in studies[1:]:
        found, note = _paired(studies[0], other)
        pairs += found
        notes += note
    return {
        "studies": [_described(study) for study in studies],
        "rows": [row for study in studies for row in _rows(study)],
        "pairs": pairs,
        "notes": notes,
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("compare: a folder is given twice; name different ones")
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def _described(study: Finished) -> Row:
    results, provenance = study.results, study.results.get("provenance", {})
    return {
        "study": study.name,
        "model": results["model"]["id"],
        "family": results["model"].get("family"),
        "target": results["target"],
        "domains": len(results["domains"]),
        "judge": results.get("judge"),
        "prompts": provenance.get("settings", {}).get("prompts", {}).get("source"),
        "seeds": len(provenance.get("seeds", [])),
        "ema_jax": provenance.get("versions", {}).get("ema_jax"),
        "date": provenance.get("date"),
    }


def _rows(study: Finished) -> Iterable[Row]:
    results, target = study.results, study.results["target"]
    for arm, entry in results["arms"].items():
        rate = entry["refusal"].get(target, {})
        changes = results.get("ema", {}).get(arm, {})
        drop = off_target({d: e["drop"] for d, e in changes.items()}, target)
        worst = changes.get(drop.worst_domain or "", {})
        contained = results.get("containment", {}).get(arm, {})
        why = not_contained(results, arm) if contained else None
        kept = {} if why else contained
        utility = results.get("utility", {}).get(arm, {})
        yield {
            "study": study.name,
            "target": target,
            "arm": arm,
            "seeds": len(entry["seeds"]) if "seeds" in entry else None,
            **_bounded("target_rate", rate.get("rate"), rate.get("ci95")),
            "target_answered": rate.get("shares", {}).get(COMPLIED),
            "mean_off_target_drop": drop.mean,
            "worst_domain": drop.worst_domain,
            **_bounded("worst_drop", drop.worst, worst.get("ci95")),
            "worst_p_holm": worst.get("p_holm"),
            **_bounded("recovered", kept.get("recovered"), kept.get("ci95")),
            "not_contained": why,
            "benign_refusal_rate": utility.get("benign_refusal", {}).get("rate"),
            "benign_nll": utility.get("benign_nll"),
            "kl_to_base": utility.get("kl_to_base"),
        }


def _bounded(name: str, value: Any, bounds: Sequence[Any] | None) -> Row:
    low, high = bounds or (None, None)
    return {name: value, f"{name}_lo": low, f"{name}_hi": high}


def _paired(first: Finished, other: Finished) -> tuple[list[Row], list[str]]:
    """Paired differences of two studies, and notes on what has none."""
    judges = [study.results.get("judge") for study in (first, other)]
    if judges[0] != judges[1]:
        text = f"{other.name}: judged by {judges[1]}, and {first.name} by {judges[0]}: not paired"
        return [], [text]
    rows: list[Row] = []
    for arm in first.results["arms"]:
        if arm not in other.results["arms"]:
            continue
        runs = [_runs(study, arm) for study in (first, other)]
        seeds = [seed for seed in runs[0] if seed in runs[1]]
        found = [_drop(arm, [(runs[0][s], runs[1][s]) for s in seeds], d) for d in _domains(first)]
        measured = {row["domain"]: row for row in found if row is not None}
        adjusted = holm({d: row.pop("p") for d, row in measured.items()})
        rows += [
            {"study": other.name, "minus": first.name, **row, "p_holm": adjusted[d]}
            for d, row in measured.items()
        ]
    if rows:
        return rows, []
    return [], [f"{other.name}: no prompt, or no arm and seed, in common with {first.name}"]


def _domains(study: Finished) -> list[str]:
    target = study.results["target"]
    return [target, *(d for d in study.results["domains"] if d != target)]


def _runs(study: Finished, arm: str) -> dict[str, dict[str, Row]]:
    """Seed → SHA-256 of a prompt → row of the response to it; the base has one run, `""`."""
    seeds = [""] if arm == BASE else list(study.results["arms"][arm].get("seeds", {}))
    hashes = {name: row["sha256"] for name, row in read_asked(study.folder).items()}
    found = {}
    for seed in seeds:
        run = f"{arm}.seed_{seed}" if seed else arm
        if (study.folder / "responses" / f"{run}.jsonl").is_file():
            rows = read_judged(study.folder, run)
            found[seed] = {hashes[row["id"]]: row for row in rows if row["id"] in hashes}
    return found


def _drop(
    arm: str, runs: Sequence[tuple[Mapping[str, Row], Mapping[str, Row]]], domain: str
) -> Row | None:
    """Change of one domain over the prompts and the seeds that both have."""
    if not runs:
        return None
    rows = [row for pair in runs for row in pair]
    asked = [
        sha256
        for sha256, row in rows[0].items()
        if row["domain"] == domain and all(sha256 in each for each in rows)
    ]
    if not asked:
        return None
    before, after = (
        [[_share(pair[i][sha256]) for sha256 in asked] for pair in runs] for i in (0, 1)
    )
    clusters = [rows[0][sha256].get("group") or sha256 for sha256 in asked]
    effect = paired_drop(before, after, clusters)
    if effect["drop"] is None:
        return None
    return {
        "arm": arm,
        "domain": domain,
        **_bounded("drop", effect["drop"], effect["ci95"]),
        "p": effect["p"],
        "n": effect["n"],
    }


def _share(row: Row) -> str:
    return share(row["verdict"], row.get("reason", ""))
