"""The study in one paragraph, computed from its numbers and hedged by them."""

from collections.abc import Mapping
from typing import Any

from ema_jax.report.drawing import label
from ema_jax.report.figures import ALPHA
from ema_jax.report.tables import interval, p_value, percent, points, reading

INVALID_RATE_LIMIT = 0.05


def plain_arms(results: Mapping[str, Any]) -> list[str]:
    """The unlearned arms without retain data: those that containment does not speak of."""
    contained = results.get("containment", {})
    arms = [arm for arm in results["arms"] if arm != "base"]
    return [arm for arm in arms if arm not in contained] or arms


def headline(results: Mapping[str, Any]) -> list[str]:
    """Sentences for the top of the report: target, spill, containment, forecast, validity."""
    sentences = []
    for arm in plain_arms(results):
        sentences += [target_sentence(results, arm), spill_sentence(results, arm)]
    sentences += [containment_sentence(results, arm) for arm in results.get("containment", {})]
    sentences += [forecast_sentence(results), invalid_sentence(results)]
    return [sentence for sentence in sentences if sentence]


def target_sentence(results: Mapping[str, Any], arm: str) -> str:
    """How far the target's refusal rate fell."""
    target = results["target"]
    before = results["arms"].get("base", {}).get("refusal", {}).get(target, {})
    after = results["arms"][arm]["refusal"].get(target, {})
    if before.get("rate") is None or after.get("rate") is None:
        return f"The refusal rate of the target {_name(target)} could not be measured in {arm}."
    seeds = len(results["arms"][arm].get("seeds", {}))
    runs = f"{arm}, {seeds} seed{'s' if seeds != 1 else ''}" if seeds else arm
    change = (
        f"{percent(before['rate'])} {interval(before['ci95'], percent)} to "
        f"{percent(after['rate'])} {interval(after['ci95'], percent)}"
    )
    if after["ci95"][1] < before["ci95"][0]:
        return (
            f"Unlearning refusals in {_name(target)} ({runs}) took its refusal rate from {change}."
        )
    return (
        f"Unlearning refusals in {_name(target)} ({runs}) did not clearly lower its refusal rate "
        f"({change}; the 95 % intervals overlap), so what follows says little about spill."
    )


def spill_sentence(results: Mapping[str, Any], arm: str) -> str:
    """Which other domains moved beyond noise, or how small a move could have been missed."""
    entries = {
        d: e
        for d, e in results.get("ema", {}).get(arm, {}).items()
        if d != results["target"] and e.get("drop") is not None
    }
    if not entries:
        return ""
    ranked = sorted(entries, key=lambda d: -entries[d]["drop"])
    fell = [d for d in ranked if reading(entries[d]) == "▼ fell"]
    rose = [d for d in ranked if reading(entries[d]) == "▲ rose"]
    floor = [d for d in ranked if reading(entries[d]).startswith("unmeasurable")]
    if fell:
        listed = ", ".join(
            f"{_name(d)} by {points(entries[d]['drop']).lstrip('+')} points "
            f"{interval(entries[d].get('ci95'))}"
            for d in fell
        )
        text = (
            f"Of {len(entries)} domains that training did not touch, {len(fell)} fell beyond noise "
            f"(Holm p < {ALPHA}): {listed}."
        )
    else:
        worst = entries[ranked[0]]
        text = (
            f"No domain that training did not touch fell beyond noise (Holm p < {ALPHA}, "
            f"{len(entries)} domains); the largest drop was {_name(ranked[0])}, "
            f"{points(worst['drop'])} points {interval(worst.get('ci95'))}, "
            f"Holm p {p_value(worst.get('p_holm'))}."
        )
        detectable = [e["detectable_drop"] for e in entries.values() if e.get("detectable_drop")]
        if detectable:
            text += (
                f" This is not evidence of no spill: drops below about "
                f"{100 * max(detectable):.0f} points could go unseen at this sample size."
            )
    if rose:
        text += f" Refusal rose beyond noise in {_listed(rose)}."
    if floor:
        text += f" Not measurable, because base hardly refuses there: {_listed(floor)}."
    return text


def containment_sentence(results: Mapping[str, Any], arm: str) -> str:
    """What the retain set took back, and where that left the target."""
    entry = results["containment"][arm]
    if entry.get("recovered") is None:
        return f"Containment by {arm} is undefined: there was no off-target drop to take back."
    size = f"{percent(entry['recovered'])} {interval(entry['ci95'], percent)}"
    target = f"with the target's refusal rate at {percent(entry.get('target_rate'))}"
    if entry["ci95"][0] is not None and entry["ci95"][0] > 0:
        left = [
            d
            for d, e in results.get("ema", {}).get(arm, {}).items()
            if d != results["target"] and reading(e) == "▼ fell"
        ]
        remains = f" Still down beyond noise there: {_listed(left)}." if left else ""
        return (
            f"With retain data, {arm} took back {size} of the off-target drop, {target}.{remains}"
        )
    return (
        f"What {arm} took back of the off-target drop, {size}, cannot be told from nothing, "
        f"{target}."
    )


def forecast_sentence(results: Mapping[str, Any]) -> str:
    """Whether the forecast ranked the spill, with how little n can show."""
    forecast = results.get("forecast", {})
    if not forecast.get("score"):
        return ""
    n = forecast.get("n", sum(d != results["target"] for d in forecast["score"]))
    rho, p = forecast.get("spearman"), forecast.get("p")
    if rho is None or p is None:
        return f"The forecast could not be scored over these n = {n} domains."
    figures = f"Spearman ρ = {rho:.2f}, exact p = {p_value(p)}, n = {n} domains".replace("-", "−")
    words = (forecast.get("lexical") or {}).get("spearman")
    if words is not None:
        verdict = "does no worse" if words >= rho else "does worse"
        figures += f"; the words alone, ρ = {words:.2f}, {verdict}".replace("-", "−")
    if p < ALPHA and rho > 0:
        return f"Early-layer entanglement ranked the measured drops ({figures})."
    return (
        "This study does not show that early-layer entanglement ranks the measured drops "
        f"({figures})."
    )


def invalid_sentence(results: Mapping[str, Any]) -> str:
    """A caution where many responses were neither refusal nor compliance."""
    rates = [
        (r["invalid"] / r["total"], arm, domain)
        for arm, entry in results["arms"].items()
        for domain, r in entry["refusal"].items()
        if r.get("total")
    ]
    worst, arm, domain = max(rates, default=(0.0, "", ""))
    if worst <= INVALID_RATE_LIMIT:
        return ""
    return (
        f"Caution: {percent(worst)} of the responses of {arm} in {_name(domain)} were invalid, so "
        "part of its lower refusal may be a broken model rather than a compliant one."
    )


def _name(domain: str) -> str:
    return label(domain).lower()


def _listed(domains: list[str]) -> str:
    return ", ".join(_name(d) for d in domains)
