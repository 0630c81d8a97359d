"""The first screen of a study's report: title, badges, a few large numbers, a verdict per claim."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ema_jax.report.drawing import label
from ema_jax.report.effects import fell, not_contained
from ema_jax.report.headline import plain_arms
from ema_jax.report.tables import (
    MISSING,
    THIN,
    answered,
    interval,
    number,
    p_value,
    percent,
    points,
)

# The qualitative claims of the paper that this project tests; wording ours, from its abstract.
CLAIMS = {
    "R1": "Narrow unlearning lowers refusal in the target domain.",
    "R2": "Refusal also falls significantly in at least one domain that was not unlearned.",
    "R3": "Unlearning safety spills more than unlearning cybersecurity.",
    "R4": "Cross-entropy on a small retain set restores the others while the target stays low.",
    "R5": "Concepts more entangled with the target in early layers lose more refusal.",
}
_WORDS = {True: "holds", False: "does not hold", None: "cannot be judged"}
_MOST_NAMED = 3  # arms in which a claim fails
_MARKS = {True: "✓", False: "✗", None: "?"}


class Figure(NamedTuple):
    """A large number: what it is of, its value, its interval, and how to read it."""

    name: str
    value: str
    interval: str
    note: str


class Verdict(NamedTuple):
    """A claim with the decision on it, in words and as a mark."""

    claim: str
    statement: str
    mark: str
    word: str
    kind: str  # yes, no or open: how the page colours it
    where: str  # the arms in which it fails
    by: str
    only: str  # the measure by which alone it holds
    rule: str
    evidence: tuple[str, ...]


def title(results: Mapping[str, Any]) -> str:
    """What was done, as the page's title: never more than the figures show."""
    target, model = label(results["target"]).lower(), results["model"]["id"]
    arms = [arm for arm in results["arms"] if arm != "base"]
    if not arms:
        return f"Refusal of {model} before unlearning"
    base = results["arms"].get("base", {}).get("refusal", {}).get(results["target"], {})
    for arm in arms:
        after = results["arms"][arm]["refusal"].get(results["target"], {})
        if base.get("ci95") and after.get("ci95") and after["ci95"][1] < base["ci95"][0]:
            return f"Refusals in {target} unlearned in {model}"
    return f"Refusals in {target}: unlearning tried on {model}"


def badges(results: Mapping[str, Any]) -> list[str]:
    """What limits every figure of the study, in a few words each."""
    found = []
    settings = results.get("provenance", {}).get("settings", {})
    # Only the embedded models have an oracle for their answers.
    if any(entry.get("oracle") for entry in results["arms"].values()):
        found.append("embedded toy model, synthetic prompts")
    seeds = results.get("provenance", {}).get("seeds", [])
    if len(seeds) == 1 and len(results["arms"]) > 1:
        found.append("one seed")
    if settings.get("keep_text"):
        found.append("shows model text")
    return found


def numbers(results: Mapping[str, Any]) -> list[Figure]:
    """Target, largest spill, containment and forecast; those that the study has."""
    arms = plain_arms(results)
    if not arms:
        return _of_the_base(results)
    made = [
        _target(results, arms[0]),
        _spill(results, arms[0]),
        _contained(results),
        _forecast(results),
    ]
    return [figure for figure in made if figure is not None]


def _of_the_base(results: Mapping[str, Any]) -> list[Figure]:
    rate = results["arms"].get("base", {}).get("refusal", {}).get(results["target"], {})
    if rate.get("rate") is None:
        return []
    name = f"Refusal in {label(results['target']).lower()}"
    note = f"base, of {rate['valid']} valid responses"
    return [Figure(name, percent(rate["rate"]), _ci(rate["ci95"], percent), note)]


def _ci(bounds: Sequence[Any] | None, form: Callable[[Any], str] = points) -> str:
    return f"95{THIN}% CI {interval(bounds, form)}"


def _target(results: Mapping[str, Any], arm: str) -> Figure | None:
    rates = [results["arms"].get(a, {}).get("refusal", {}) for a in ("base", arm)]
    before, after = (rate.get(results["target"], {}) for rate in rates)
    if before.get("rate") is None or after.get("rate") is None:
        return None
    bounds = f"{_ci(before['ci95'], percent)} → {interval(after['ci95'], percent)}"
    value = f"{percent(before['rate'])} → {percent(after['rate'])}"
    name = f"Refusal in {label(results['target']).lower()}, the target"
    note = f"base → {arm}, of {before['valid']} → {after['valid']} valid responses"
    if (share := answered(after)) is not None:
        # What is neither refused nor an answer is damage.
        verb = "answer" if results.get("validity") else "count as compliance"
        note += f"; {percent(share)} of all {after['total']} {verb}"
    if results.get("on_target", {}).get(arm, {}).get("damaged"):
        note += ": damaged"
    return Figure(name, value, bounds, note)


def _spill(results: Mapping[str, Any], arm: str) -> Figure | None:
    entries = {
        d: e
        for d, e in results.get("ema", {}).get(arm, {}).items()
        if d != results["target"] and e.get("drop") is not None
    }
    if not entries:
        return None
    worst = max(entries, key=lambda d: entries[d]["drop"])
    found, lost = entries[worst], sum(fell(entry) for entry in entries.values())
    note = [arm if found.get("n") is None else f"{arm}, n = {found['n']} prompts"]
    if found.get("compliance_rise") is not None:
        note.append(f"compliance there {points(found['compliance_rise'])}")
    note.append(f"{lost} of {len(entries)} other domains fell significantly")
    return Figure(
        f"Refusal lost in {label(worst).lower()}, the worst other domain",
        f"{points(found['drop']).lstrip('+')} points",
        _ci(found.get("ci95")),
        "; ".join(note),
    )


def _contained(results: Mapping[str, Any]) -> Figure | None:
    """Of the first arm whose recovery can be containment, else why there is none.

    The other arms with retain data are named, so that nobody takes the first for all of them.
    """
    name, entries = "Lost refusals taken back by retain data", results.get("containment", {})
    why = {arm: not_contained(results, arm) for arm in entries}
    known = [a for a, e in entries.items() if not why[a] and e.get("recovered") is not None]
    if not known and not any(why.values()):
        return None
    shown = known[0] if known else next(arm for arm in entries if why[arm])
    entry = entries[shown]
    note = [f"{shown}, target refusal {percent(entry.get('target_rate'))}"]
    if not known:
        note.append(f"{why[shown]}: no containment")
    elif entry.get("recovered_by_compliance") is not None:
        note.append(f"by compliance {percent(entry['recovered_by_compliance'])}")
    others = [arm for arm in entries if arm != shown]
    note += [f"{arm}: {why[arm] or percent(entries[arm].get('recovered'))}" for arm in others]
    value, bounds = (
        (percent(entry["recovered"]), _ci(entry["ci95"], percent)) if known else (MISSING, "")
    )
    return Figure(name, value, bounds, "; ".join(note))


def _forecast(results: Mapping[str, Any]) -> Figure | None:
    forecast = results.get("forecast", {})
    if forecast.get("spearman") is None or forecast.get("p") is None:
        return None
    n = forecast.get("n", sum(d != results["target"] for d in forecast.get("score", {})))
    return Figure(
        "Forecast against measurement",
        f"ρ = {number(forecast['spearman'], 2)}",
        f"p = {p_value(forecast['p'])}, n = {n} domains",
        "rank correlation, made before training",
    )


def verdicts(claims: Mapping[str, Any]) -> list[Verdict]:
    """R1 to R5 in order; one that was not decided on cannot be judged.

    Args:
        claims: of `results.json` or `replication.json`.
    """
    made = []
    for name, statement in CLAIMS.items():
        claim = claims.get(name, {})
        holds = claim.get("holds")
        by = [f"by {measure}: {_WORDS[x]}" for measure, x in claim.get("by", {}).items()]
        alone = [measure for measure, x in claim.get("by", {}).items() if x]
        made.append(
            Verdict(
                name,
                claim.get("statement") or statement,
                _MARKS[holds],
                _WORDS[holds],
                {True: "yes", False: "no", None: "open"}[holds],
                _failing(claim.get("rows", {})) if holds is False else "",
                "; ".join(by),
                alone[0] if len(alone) == 1 and holds is False else "",
                claim.get("rule", ""),
                tuple(claim.get("evidence", ())),
            )
        )
    return made


def _failing(rows: Mapping[str, bool]) -> str:
    """The arms in which a claim on every arm fails, as its verdict goes on; "" of a single arm."""
    failing = [place for place, holds in rows.items() if not holds]
    if len(rows) < 2 or not failing:
        return ""
    if len(failing) == len(rows):
        return f"in any of {len(rows)} arms"
    if len(failing) > _MOST_NAMED:
        return f"in {len(failing)} of {len(rows)} arms"
    return f"in {', '.join(failing)} (of {len(rows)} arms)"
