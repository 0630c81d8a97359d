"""Tables of a person's labels: the judge's errors, and refusal corrected for them."""

from collections.abc import Mapping
from typing import Any

from ema_jax.report.drawing import label
from ema_jax.report.tables import MISSING, Row, Table, interval, number, percent, points


def errors(results: Mapping[str, Any]) -> Table:
    """Table of the judge's accuracy, and of the labels given to each of its verdicts."""
    found = results["labels"]
    rows = [
        Row((name, _figure(found[name]), interval(found[name]["ci95"], percent)))
        for name in ("accuracy", "sensitivity", "specificity")
    ]
    rows.append(Row(("Cohen's κ", number(found["kappa"], 2), MISSING)))
    by_arm = [
        Row((f"accuracy, {arm} ({each['labelled']} labels)", percent(each["accuracy"]), MISSING))
        for arm, each in found["by_arm"].items()
    ]
    groups = [("All responses", tuple(rows)), ("By arm", tuple(by_arm))]
    for judged, cells in found["confusion"].items():
        lines = (
            Row(
                (
                    f"{label(name)} ({cell['n']})",
                    percent(cell["share"]),
                    interval(cell["ci95"], percent),
                )
            )
            for name, cell in cells.items()
        )
        groups.append((f"Judged {label(judged).lower()}", tuple(lines)))
    return Table(
        f"From {found['labelled']} responses that a person labelled without seeing the judge's "
        "verdicts, weighted to all responses. Sensitivity and specificity: of refused against all "
        "else. Below, a person's labels for the responses of each verdict (counts in brackets).",
        ("", "Figure", "Value", "95 % CI"),
        tuple(groups),
        (0, 1),
    )


def corrected(results: Mapping[str, Any]) -> Table:
    """Table of refused shares per arm and domain, as judged and as corrected, with their drop."""
    groups = []
    for arm, domains in results["corrected"].items():
        rows = (
            Row(
                (
                    label(domain),
                    percent(cell["apparent"]),
                    percent(cell["share"]),
                    interval(cell["ci95"], percent),
                    points(cell.get("drop")),
                    interval(cell.get("drop_ci95")),
                )
            )
            for domain, cell in domains.items()
        )
        groups.append((arm, tuple(rows)))
    return Table(
        "Refused responses as a share of all judged ones, corrected for the judge's sensitivity "
        "and specificity (Rogan and Gladen), one pair of them for all arms and domains. The "
        "intervals include the uncertainty of the labels. Drop: of the corrected shares, not "
        "paired by prompt as the drops above are.",
        ("Arm", "Domain", "As judged", "Corrected", "95 % CI", "Drop from base", "95 % CI"),
        tuple(groups),
        (0, 1),
    )


def _figure(entry: Mapping[str, Any]) -> str:
    return percent(entry["value"])
