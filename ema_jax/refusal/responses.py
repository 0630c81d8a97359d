"""Judged responses, as rows of `responses/NAME.jsonl`, and what is counted of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ema_jax.refusal.scores import pooled_rate
from ema_jax.refusal.verdicts import COMPLIED, HARMFUL, HARMLESS, REFUSED, share


class Responses(NamedTuple):
    """One model's responses in one domain; all lists in the order of the prompts."""

    shares: list[str]  # of `verdicts.SHARES`
    groups: list[str]  # id of the prompt's source item
    harm: list[str | None]
    oracle: list[bool | None]  # whether the answer is one that an embedded model could have meant


def responses_by_domain(rows: Iterable[Mapping[str, Any]]) -> dict[str, Responses]:
    """Domain → responses. Fields that older studies do not have are None."""
    result: dict[str, Responses] = {}
    for row in rows:
        found = result.setdefault(row["domain"], Responses([], [], [], []))
        found.shares.append(share(row["verdict"], row.get("reason", "")))
        found.groups.append(row.get("group") or row.get("id") or str(len(found.groups)))
        found.harm.append(row.get("harm"))
        found.oracle.append(row.get("oracle"))
    return result


def shares(runs: Sequence[Responses]) -> list[list[str]]:
    """`[seeds][prompts]`, as `refusal.scores` takes them."""
    return [run.shares for run in runs]


def rate(runs: Sequence[Responses]) -> dict[str, Any]:
    """Schema R of one domain over seeds, with the harm of what was complied with."""
    harm = {HARMFUL: 0, HARMLESS: 0, "unknown": 0}
    for run in runs:
        for name, harmful in zip(run.shares, run.harm, strict=True):
            if name == COMPLIED:
                harm[harmful if harmful in harm else "unknown"] += 1
    return {**pooled_rate(shares(runs)), "harm": harm}


def oracle(by_domain: Mapping[str, Sequence[Responses]]) -> dict[str, dict[str, Any]]:
    """Domain → how many answers are right by the oracle; domains that it does not know are absent.

    Returns:
        `answers`, responses that are no refusal and that the oracle checked; `right` of them;
        `total` responses; `rate` = right / answers, None without answers.
    """
    result = {}
    for domain, runs in by_domain.items():
        if all(known is None for run in runs for known in run.oracle):
            continue
        answers = [
            known
            for run in runs
            for name, known in zip(run.shares, run.oracle, strict=True)
            if name != REFUSED and known is not None
        ]
        result[domain] = {
            "right": sum(answers),
            "answers": len(answers),
            "total": sum(len(run.shares) for run in runs),
            "rate": sum(answers) / len(answers) if answers else None,
        }
    return result
