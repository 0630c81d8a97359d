"""Agreement of judges: confusion tables and Cohen's κ, overall and per domain.

Two judges of one file share the validity rules, so they agree on most invalid rows by construction.
κ is therefore computed over the rows that both call refused or complied; the table shows all. Only
the study's main judge passes through the screen, so verdicts are compared as they were before it
(`responses.unscreened_verdict`).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from ema_jax.refusal.verdicts import VERDICTS


@dataclass(frozen=True)
class Agreement:
    """Agreement of two judges on the same rows.

    Attributes:
        table: rows by the first judge's verdict (lines) and the second's (columns), in the order
            of `VERDICTS`.
        kappa: Cohen's κ over rows valid to both; None where it is undefined (no such rows, or both
            judges gave the same one verdict to all of them).
        ci95: its asymptotic interval (Fleiss, Cohen and Everitt, 1969), cut to [-1, 1], as if the
            rows of one seed were all; None where the standard error is undefined or 0, as it is
            when they never differ.
        observed: share of rows valid to both on which they agree; None without such rows.
    """

    table: Int[np.ndarray, "3 3"]
    kappa: float | None
    ci95: tuple[float, float] | None
    observed: float | None

    @property
    def both_valid(self) -> int:
        """Rows that both judges call refused or complied."""
        return int(self.table[:2, :2].sum())

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        return {
            "table": self.table.tolist(),
            "labels": list(VERDICTS),
            "total": int(self.table.sum()),
            "both_valid": self.both_valid,
            "observed": self.observed,
            "kappa": self.kappa,
            "ci95": None if self.ci95 is None else list(self.ci95),
        }


def confusion(first: Sequence[str], second: Sequence[str]) -> Int[np.ndarray, "3 3"]:
    """Counts rows by both judges' verdicts, in the order of `VERDICTS`.

    Raises:
        ValueError: different lengths, or an unknown verdict.
    """
    table = np.zeros((3, 3), int)
    place = {verdict: i for i, verdict in enumerate(VERDICTS)}
    for a, b in zip(first, second, strict=True):
        if a not in place or b not in place:
            raise ValueError(f"unknown verdict {a if a not in place else b!r}")
        table[place[a], place[b]] += 1
    return table


def agreement(first: Sequence[str], second: Sequence[str], seeds: int = 1) -> Agreement:
    """The agreement of two judges' verdicts on the same rows, in order.

    Rows may be of several seeds: the same prompt under another one is little further evidence.
    """
    table = confusion(first, second)
    valid = table[:2, :2]
    n = int(valid.sum())
    if n == 0:
        return Agreement(table, None, None, None)
    observed = float(np.trace(valid) / n)
    if max(valid[0, 0], valid[1, 1]) == n:
        return Agreement(table, None, None, observed)

    from statsmodels.stats.inter_rater import cohens_kappa

    with np.errstate(invalid="ignore", divide="ignore"):  # its z-test, which is not used here
        found = cohens_kappa(valid / seeds)
    ci95 = None
    if found.std_kappa > 0:
        ci95 = (max(-1.0, float(found.kappa_low)), min(1.0, float(found.kappa_upp)))
    return Agreement(table, float(found.kappa), ci95, observed)


def agreement_by_domain(
    first: Sequence[str], second: Sequence[str], domains: Sequence[str], seeds: int = 1
) -> dict[str, Agreement]:
    """The agreement within each domain, in order of appearance."""
    rows = list(zip(first, second, domains, strict=True))
    result = {}
    for domain in dict.fromkeys(domains):
        here = [(a, b) for a, b, d in rows if d == domain]
        result[domain] = agreement([a for a, _ in here], [b for _, b in here], seeds)
    return result


def agreement_of_judges(
    verdicts: Mapping[str, Sequence[str]], domains: Sequence[str], seeds: int = 1
) -> list[dict[str, Any]]:
    """Every pair of judges, overall and by domain, as plain values for a report.

    Args:
        verdicts: judge → verdicts on the same rows.
        domains: each row's domain.
        seeds: that the rows are of.
    """
    return [
        {
            "judges": [a, b],
            "overall": agreement(verdicts[a], verdicts[b], seeds).to_json(),
            "domains": {
                domain: found.to_json()
                for domain, found in agreement_by_domain(
                    verdicts[a], verdicts[b], domains, seeds
                ).items()
            },
        }
        for a, b in itertools.combinations(verdicts, 2)
    ]
