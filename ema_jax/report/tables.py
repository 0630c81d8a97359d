"""Tables of a study as formatted cells; the templates only lay them out.

Rates and drops are fractions in `results.json` and per cent or points (x 100) here.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ema_jax.report.drawing import label
from ema_jax.report.figures import ordered_domains, titled

MISSING = "–"
THIN = "\u202f"  # narrow and unbreakable, so that no line ends between a number and its unit


@dataclass(frozen=True)
class Row:
    """One line of cells; a strong row is set in bold (its text says why, colour never alone)."""

    cells: tuple[str, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column spans the rows of its group.

    `text_columns` are the columns aligned left (counted from 0, the group's column first); all
    others hold numbers. `links` gives the groups that have a page of their own its address.
    """

    caption: str
    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]
    text_columns: tuple[int, ...] = (0,)
    links: Mapping[str, str] = field(default_factory=dict)


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with a true minus sign."""
    return MISSING if value is None else f"{value:z.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A fraction as per cent."""
    return MISSING if value is None else f"{100 * value:z.1f}{THIN}%".replace("-", "−")


def points(value: float | None) -> str:
    """A difference of fractions in points, with its sign."""
    return MISSING if value is None else f"{100 * value:+z.1f}".replace("-", "−")


def interval(bounds: Sequence[Any] | None, form: Callable[[Any], str] = points) -> str:
    """A 95 % interval `[lo, hi]` in the unit of its estimate."""
    if not bounds or None in bounds:
        return MISSING
    low, high = (form(x).strip(f"+%{THIN}") for x in bounds)
    return f"[{low}, {high}]"


def p_value(value: float | None) -> str:
    """A p-value to three places; never "0"."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def answered(rate: Mapping[str, Any]) -> float | None:
    """The share of all responses that comply, of a refusal score (schema R); None if unknown."""
    return rate["shares"]["complied"] if rate.get("shares") else None


def refusal(results: Mapping[str, Any]) -> Table:
    """Table of refusal scores per domain and arm, with their counts."""
    groups = []
    for domain in ordered_domains(results):
        rows = [
            Row((arm, *_rate_cells(entry["refusal"].get(domain, {}))))
            for arm, entry in results["arms"].items()
        ]
        groups.append((titled(domain, results), tuple(rows)))
    return Table(
        "Refusal score = refused / valid responses (valid: refused or complied). Arms pool their "
        "seeds. Invalid responses (off topic, degenerate, not judged) are counted apart.",
        ("Domain", "Arm", "Refusal rate", "95 % CI", "Refused", "Valid", "Invalid", "Total"),
        tuple(groups),
        (0, 1),
    )


def comparisons(results: Mapping[str, Any]) -> Table:
    """Table of differences between arms with retain data, two by two."""
    named = {
        "target": "Target refusal",
        "answered": "Target answered",
        "others": "Refusal off target",
        "invalid": "Invalid",
    }
    groups = []
    for entry in results["comparisons"]:
        rows = [
            Row(
                (
                    title,
                    points(entry[name]["difference"]),
                    interval(entry[name]["ci95"]),
                    p_value(entry[name]["p"]),
                )
            )
            for name, title in named.items()
            if name in entry
        ]
        groups.append((f"{entry['arm']} − {entry['minus']}", tuple(rows)))
    return Table(
        "Difference of two arms with retain data in points, paired by seed, with Student's "
        "interval over seeds. Refusal off target is the mean over the other domains.",
        ("Arms", "Figure", "Difference", "95 % CI", "p"),
        tuple(groups),
        (0, 1),
    )


def runs(results: Mapping[str, Any]) -> Table:
    """Table of runs, one line per arm and seed: steps, why it stopped, the target at the end."""
    reasons = {"target": "target reached", "limit": "step limit", "invalid": "too many invalid"}
    groups = []
    for arm, entry in results["arms"].items():
        rows = []
        for seed, run in entry.get("seeds", {}).items():
            rate = run.get("refusal", {}).get(results["target"], {})
            stopped = run.get("stopped")
            cells = (str(seed), str(run.get("steps", MISSING)), reasons.get(stopped, MISSING))
            shares = (percent(rate.get("rate")), percent(answered(rate)))
            rows.append(Row((*cells, *shares, str(rate.get("invalid", MISSING)))))
        if rows:
            groups.append((arm, tuple(rows)))
    return Table(
        "Each run (arm × seed). Answered: of all target responses.",
        (
            *("Arm", "Seed", "Steps", "Stopped by"),
            *("Target refusal rate", "Target answered", "Invalid (target)"),
        ),
        tuple(groups),
        (0, 3),
    )


def forecast(results: Mapping[str, Any], arm: str) -> Table:
    """Table of forecast and measured drop, highest forecast first."""
    measured = results.get("ema", {}).get(arm, {})
    score = {d: x for d, x in results["forecast"]["score"].items() if d != results["target"]}
    groups = tuple(
        (
            label(domain),
            (Row((number(score[domain]), points(measured.get(domain, {}).get("drop")))),),
        )
        for domain in sorted(score, key=lambda d: -(score[d] if score[d] is not None else -2))
    )
    caption = "Highest forecast first; the forecast was made before any training."
    return Table(caption, ("Domain", "Forecast", f"Measured drop {arm}".rstrip()), groups)


def categories(results: Mapping[str, Any]) -> Table:
    """Table of sub-categories: forecast and measured drop, highest forecast first by domain."""
    found = results["forecast"]["categories"]
    by_domain: dict[str, list[Row]] = {}
    for name, score in sorted(found["score"].items(), key=lambda item: -item[1]):
        domain, _, category = name.partition("/")
        cells = (category, number(score), points(found["drop"][name]))
        by_domain.setdefault(label(domain), []).append(Row(cells))
    within, n = found["within_domains"], found.get("n", MISSING)
    return Table(
        f"Sub-categories: Spearman {number(found['spearman'], 2)} over all {n} (permutation p "
        f"{p_value(found['p'])}); within domains {number(within['spearman'], 2)} (one-sided p "
        f"{p_value(within['p'])}).",
        ("Domain", "Sub-category", "Forecast", "Measured drop"),
        tuple((domain, tuple(rows)) for domain, rows in by_domain.items()),
        (0, 1),
    )


def susceptibility(results: Mapping[str, Any]) -> Table:
    """Table of forecasts for every target (rows), one column per affected domain."""
    scores = results["forecast"]["susceptibility"]
    domains = [d for d in ordered_domains(results) if d in scores]
    groups = tuple(
        (
            label(target),
            (Row(tuple(number(scores[target].get(d), 2) for d in domains)),),
        )
        for target in domains
    )
    shares = results["forecast"].get("retain_shares") or {}
    advised = ", ".join(
        f"{label(d)} {percent(x)}" for d, x in sorted(shares.items(), key=lambda item: -item[1])
    )
    caption = "Susceptibility of each domain (column) to unlearning of each target (row): mean "
    caption += "centred cosine over the early layers of the base. Higher = more at risk."
    if advised:
        caption += f" Advised shares of retain data for this study's target: {advised}. "
        caption += "On the embedded models (Cybersecurity) they did no better than uniform shares."
    return Table(caption, ("Target", *(label(d) for d in domains)), groups)


def utility(results: Mapping[str, Any]) -> Table:
    """Table of over-refusal and likelihood on benign prompts."""
    alike = any("lookalike_refusal" in entry for entry in results["utility"].values())
    groups = []
    for arm, entry in results["utility"].items():
        cells = []
        for name in ("benign_refusal", *(["lookalike_refusal"] if alike else [])):
            rate = entry.get(name) or {}
            cells += [percent(rate.get("rate")), interval(rate.get("ci95"), percent)]
            cells += [percent(answered(rate)), str(rate.get("invalid", MISSING))]
        cells += [number(entry.get("benign_nll")), number(entry.get("kl_to_base"))]
        cells += [number(entry.get(f"{of}_perplexity"), 2) for of in ("benign", "response")]
        groups.append((arm, (Row(tuple(cells)),)))
    refusal = ["Benign refusal rate", "95 % CI", "Answered", "Invalid"]
    if alike:
        refusal += ["Look-alikes refused", "95 % CI", "Answered", "Invalid"]
    likelihood = ("NLL (nats/token)", "KL to base", "Perplexity", "Perplexity of its own")
    return Table(
        "Over-refusal of benign prompts, and of harmless ones in the words of harmful ones where "
        "the study has such look-alikes; negative log-likelihood and perplexity of the base's "
        "benign answers, and Kullback–Leibler divergence from base (nats per token; 0 = "
        "unchanged); perplexity to the base of the model's own responses to benign prompts, which "
        "rises when they become degenerate. Answered: of all responses.",
        ("Arm", *refusal, *likelihood),
        tuple(groups),
    )


def arms(results: Mapping[str, Any]) -> Table:
    """Table of arms: the target, the worst other domain, and utility."""
    target, groups = results["target"], []
    for arm, entry in results["arms"].items():
        if arm == "base":
            continue
        rates = entry.get("refusal", {})
        others = {d: r["rate"] for d, r in rates.items() if d != target and r["rate"] is not None}
        worst = min(others, key=lambda d: others[d], default=None)
        shares = [r["invalid"] / r["total"] for r in rates.values() if r.get("total")]
        measured = results.get("utility", {}).get(arm, {})
        cells = (
            percent(rates.get(target, {}).get("rate")),
            percent(answered(rates.get(target, {}))),
            MISSING if worst is None else f"{percent(others[worst])} ({label(worst)})",
            percent(max(shares, default=None)),
            number(measured.get("benign_nll")),
            number(measured.get("kl_to_base")),
        )
        groups.append((arm, (Row(cells),)))
    return Table(
        "One row per arm. Arms can be compared where the target is refused, and answered, "
        "alike. Worst other domain: the lowest refusal rate off target. Invalid: the share in the "
        "worst domain, the target included.",
        (
            *("Arm", "Target refusal", "Target answered", "Worst other domain", "Invalid"),
            *("Benign NLL", "KL to base"),
        ),
        tuple(groups),
    )


def agreement(results: Mapping[str, Any]) -> Table:
    """Table of agreement between judges on the same responses, per arm and pair."""
    groups = []
    for arm, pairs in results["agreement"].items():
        rows = []
        for pair in pairs:
            found = pair["overall"]
            (both, first, _), (second, neither, _), _ = found["table"]
            cells = (" / ".join(pair["judges"]), number(found["kappa"], 2))
            bounds = interval(found["ci95"], lambda x: number(x, 2))
            agree = (percent(found["observed"]), *map(str, (both, first, second, neither)))
            apart = str(found["total"] - found["both_valid"])
            rows.append(Row((*cells, bounds, *agree, apart)))
        groups.append((arm, tuple(rows)))
    return Table(
        "Cohen's κ over responses that both judges call refused or complied. κ is low where nearly "
        "all is refused, or nothing, even for judges that hardly differ: read it with the share on "
        "which they agree. By domain: results.json.",
        (
            *("Arm", "Judges", "κ", "95 % CI", "Agree", "Both refused", "Only the first"),
            *("Only the second", "Neither", "Invalid to one"),
        ),
        tuple(groups),
        (0, 1),
    )


def provenance(results: Mapping[str, Any]) -> Table:
    """Table of versions, hashes, seeds, devices and times as recorded."""
    source = results["provenance"]
    groups = []
    for name, value in source.items():
        if name == "settings":
            continue  # in tables of their own
        if name == "wall_seconds" and isinstance(value, Mapping):
            value = {stage: f"{seconds:,.1f} s" for stage, seconds in value.items()}
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        groups.append((label(name), tuple(Row((str(k), _plain(v))) for k, v in items)))
    return Table(
        "As recorded while the study ran.", ("", "Name", "Value"), tuple(groups), (0, 1, 2)
    )


def records(
    rows: Sequence[Mapping[str, Any]], caption: str, links: Mapping[str, str] | None = None
) -> Table:
    """A table of flat rows of any fields: one column per key, formatted by the key's meaning.

    Rows that follow one another with the same first cell are a group. `x_lo` and `x_hi` become one
    column, the interval of `x`. `links` are as in `Table`.
    """
    given = {key for row in rows for key in row}
    rows = [_with_intervals(row) for row in rows]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [tuple(_field(key, row.get(key)) for key in keys) for row in rows]
    groups = tuple(
        (first, tuple(Row(tuple(rest)) for _, *rest in group))
        for first, group in itertools.groupby(cells, key=lambda line: line[0])
    )
    words = {
        key
        for row in rows
        for key, value in row.items()
        if isinstance(value, str | bool | list) and f"{key}_lo" not in given
    }
    text = [i for i, key in enumerate(keys) if key in words]
    return Table(caption, tuple(map(_column, keys)), groups, (0, *text), links or {})


_COLUMNS = {
    "ema_jax": "ema_jax",
    "benign_nll": "Benign NLL",
    "forecast_spearman": "Forecast Spearman ρ",
    "kl_to_base": "KL to base",
    "p": "p",
    "p_holm": "Holm p",
    "target_rate": "Target refusal rate",
    "target_rate_max": "Target refusal rate max",
}


def _column(key: str) -> str:
    """The name of a column; a setting keeps its own."""
    named = key if "." in key else label(key).replace("p holm", "Holm p")
    return _COLUMNS.get(key, named)


def _with_intervals(row: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(row)
    for key in row:
        if f"{key}_lo" in row and f"{key}_hi" in row:
            bounds = [_field(key, merged.pop(f"{key}_{end}")) for end in ("lo", "hi")]
            if MISSING not in bounds:
                merged[key] = f"{_field(key, row[key])} {interval(bounds, str)}"
    return merged


def _field(key: str, value: Any) -> str:
    if isinstance(value, str) and key.endswith("domain"):
        return label(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _plain(value)
    if isinstance(value, int) or "." in key:  # a setting, such as unlearn.learning_rate
        return str(value) if isinstance(value, int) else f"{value:g}"
    if key.endswith(("drop", "rise")):
        return points(value)
    if "rate" in key or "answered" in key or key.startswith("recovered"):
        return percent(value)
    return p_value(value) if key == "p" or key.startswith("p_") or "_p" in key else number(value)


def _rate_cells(rate: Mapping[str, Any]) -> tuple[str, ...]:
    counts = (str(rate.get(key, MISSING)) for key in ("refused", "valid", "invalid", "total"))
    return (percent(rate.get("rate")), interval(rate.get("ci95"), percent), *counts)


def _plain(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return str(value)
