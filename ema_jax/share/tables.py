"""A study's figures as one tidy table, for CSV, Parquet and data frames."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_jax.errors import UserError
from ema_jax.runtime.files import atomic_path

if TYPE_CHECKING:
    from pandas import DataFrame

WRITERS = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
}


def frame(results: Mapping[str, Any]) -> "DataFrame":
    """One row per arm, seed (none: all seeds pooled) and domain.

    Columns: `arm, seed, domain, target`, the refusal score (`rate, low, high, refused, valid,
    invalid, total`), the shares (`share_refused`, …) and, for arms, the drop from the base with
    its interval and p, by refusal and by compliance. What a row has not is missing.
    """
    from pandas import DataFrame

    return DataFrame(list(_rows(results)))


def write(results: Mapping[str, Any], path: Path) -> None:
    """Writes the table; the ending (`.csv`, `.parquet`) decides the format.

    Raises:
        UserError: another ending.
    """
    if path.suffix not in WRITERS:
        raise UserError(f"--output: {path.name} ends in none of {', '.join(WRITERS)}")
    with atomic_path(path) as temporary:
        WRITERS[path.suffix](frame(results), temporary)


def _rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for arm, entry in results["arms"].items():
        by_seed: dict[int | None, Any] = {None: entry}
        by_seed |= {int(k): run for k, run in entry.get("seeds", {}).items()}
        for seed, run in by_seed.items():
            for domain, score in run["refusal"].items():
                row = {"arm": arm, "seed": seed, "domain": domain}
                row["target"] = domain == results["target"]
                yield row | _score(score) | _effect(results, arm, seed, domain)


def _score(score: Mapping[str, Any]) -> dict[str, Any]:
    low, high = score["ci95"]
    counts = {key: score[key] for key in ("rate", "refused", "valid", "invalid", "total")}
    shares = {f"share_{name}": x for name, x in score.get("shares", {}).items()}
    return counts | {"low": low, "high": high} | shares


def _effect(results: Mapping[str, Any], arm: str, seed: int | None, domain: str) -> dict[str, Any]:
    """Both changes from the base; of single seeds the table has none."""
    if seed is not None:
        return {}
    entry = results.get("ema", {}).get(arm, {}).get(domain)
    if entry is None and domain == results["target"]:
        entry = results.get("on_target", {}).get(arm)
    if not entry:
        return {}
    fields = ("drop", "p", "p_holm", "compliance_rise", "compliance_p", "compliance_p_holm")
    out = {key: entry.get(key) for key in fields}
    for key, name in (("ci95", "drop"), ("compliance_ci95", "compliance_rise")):
        out[f"{name}_low"], out[f"{name}_high"] = entry.get(key) or (None, None)
    return out
