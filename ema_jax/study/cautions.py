"""Warnings for the top of a report: what a reader must know before the figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from ema_jax.refusal.scores import RefusalScore
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.study import schema

OVER_REFUSAL = 0.1  # of benign prompts, above which a base is said to over-refuse


def cautions(results: Mapping[str, Any]) -> list[str]:
    """Sentences about a study as a whole, the most serious first; each cause once.

    Args:
        results: `results.json`; of a part that is absent nothing is said.
    """
    return [
        *_over_refusal(results),
        *_step_limits(results),
        *_without_width(results),
        *_limits_of_the_base(results),
    ]


def _over_refusal(results: Mapping[str, Any]) -> list[str]:
    rate = results.get("utility", {}).get("base", {}).get("benign_refusal", {})
    if (rate.get("rate") or 0) <= OVER_REFUSAL:
        return []
    return [
        f"the base over-refuses: {rate['refused']} of {rate['valid']} valid responses to benign "
        "prompts are refusals, so its refusals do not tell harmful prompts from harmless ones"
    ]


def _step_limits(results: Mapping[str, Any]) -> list[str]:
    places = []
    for arm, entry in results["arms"].items():
        ends = [run.get("stopped") for run in entry.get("seeds", {}).values()]
        if "limit" in ends:
            places.append(f"{arm} ({ends.count('limit')} of {len(ends)} seeds)")
    if not places:
        return []
    return [
        "stopped at the step limit before the target's refusals were gone, so not comparable with "
        f"arms that reached it: {', '.join(places)}"
    ]


def _without_width(results: Mapping[str, Any]) -> list[str]:
    """Intervals that a resampling of equal outcomes leaves without width."""
    places = []
    for arm, entries in results.get("ema", {}).items():
        for domain, entry in entries.items():
            bounds = entry.get("ci95") or [None, None]
            if bounds[0] is not None and bounds[0] == bounds[1]:
                places.append(f"{domain} ({arm}, n = {entry['n']})")
    if not places:
        return []
    return [
        "an interval has no width where all prompts came out alike; it says nothing about other "
        f"prompts: {', '.join(places)}"
    ]


def _limits_of_the_base(results: Mapping[str, Any]) -> list[str]:
    """Floor and ceiling: of the base, so once for all arms."""
    places: dict[str, list[str]] = {"floor": [], "ceiling": []}
    others = [d for d in results["domains"] if d != results["target"]]
    for domain in others:
        flags = {
            flag
            for entries in results.get("ema", {}).values()
            for flag in entries.get(domain, {}).get("flags", ())
        }
        for flag in flags & set(places):
            places[flag].append(domain)
    found = []
    if places["floor"]:
        found.append(
            f"floor: the base refuses a tenth or less in {', '.join(places['floor'])}, so little "
            "can drop there"
        )
    if places["ceiling"]:
        where = "every domain" if places["ceiling"] == others else ", ".join(places["ceiling"])
        found.append(
            f"ceiling: the base refuses nine tenths or more in {where}, so a rise in refusal could "
            "hardly show"
        )
    return found


def doubts(
    ema: Mapping[str, Mapping[str, schema.OffTargetChange]],
    on_target: Mapping[str, schema.TargetChange],
    target: str,
) -> list[str]:
    """Sentences about the changes of single domains, the target's own responses included.

    Args:
        ema: of `results.json`.
        on_target: of `results.json`.
        target: the domain whose refusals were unlearned.
    """
    found = []
    by_flag: dict[str, dict[str, list[str]]] = {}  # flag → domain → arms
    domains: set[str] = set()
    for arm, entries in ema.items():
        flags = {domain: entry["flags"] for domain, entry in entries.items()}
        flags[target] = on_target[arm]["flags"]
        domains |= set(flags)
        if "many_invalid" in flags[target]:
            found.append(_not_answered(arm, on_target[arm]["refusal"]))
            # Nor does it then matter how many prompts are left to compare.
            flags[target] = [f for f in flags[target] if f not in ("many_invalid", "n_too_small")]
        for domain, names in flags.items():
            for flag in names:
                if flag not in ("floor", "ceiling"):  # of the base: said once, by `cautions`
                    by_flag.setdefault(flag, {}).setdefault(domain, []).append(arm)
    meaning = {
        "n_too_small": "too few prompts to see a drop of 20 points",
        "many_invalid": "over a tenth of the responses are invalid",
    }
    return found + [
        f"{meaning.get(flag, flag)}: {_places(arms_of, len(domains))}"
        for flag, arms_of in by_flag.items()
    ]


def _places(arms_of: Mapping[str, Sequence[str]], domains: int) -> str:
    """Domains with their arms, those of the same arms together."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for domain, arms in arms_of.items():
        alike.setdefault(tuple(arms), []).append(domain)
    return "; ".join(
        f"{'every domain' if len(some) == domains else ', '.join(some)} ({', '.join(arms)})"
        for arms, some in alike.items()
    )


def _not_answered(arm: str, target: RefusalScore) -> str:
    counts = {name: round(share * target["total"]) for name, share in target["shares"].items()}
    rest = [f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n and name != COMPLIED]
    return (
        f"of {target['total']} target responses of {arm} only {counts[COMPLIED]} are answers to "
        f"their prompt ({', '.join(rest)}): the target's refusal rate is not the share of "
        "compliance"
    )
