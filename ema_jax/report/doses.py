"""The table of searches for the arms' doses."""

from collections.abc import Mapping
from typing import Any

from ema_jax.report.tables import MISSING, Row, Table, percent

_OUTCOMES = {
    "fits": "fits",
    "too_fast": "too fast",
    "too_much": "damaged",
    "too_little": "still refuses",
}


def table(results: Mapping[str, Any]) -> Table | None:
    """Table of trials, one line each, that of the chosen learning rate in bold; None without."""
    groups = []
    for arm, entry in results["arms"].items():
        found = entry.get("dose")
        if found is None:
            continue
        rows = []
        for trial in found["trials"]:
            chosen = trial["learning_rate"] == found["learning_rate"]
            step = trial["best_step"]
            cells = (
                f"{trial['learning_rate']:g}" + (" (chosen)" if chosen else ""),
                _OUTCOMES[trial["outcome"]],
                MISSING if step is None else str(step),
                percent(trial["target_refusal"]),
                str(trial["steps"]),
            )
            rows.append(Row(cells, strong=chosen))
        groups.append((f"{arm} ({found['responses']} responses)", tuple(rows)))
    if not groups:
        return None
    return Table(
        "Search for the dose: short trials on dev prompts of the target and the contrast, seed 0. "
        "The refusal rate is that of the best undamaged evaluation, at the step beside it.",
        ("Arm", "Learning rate", "Outcome", "At step", "Target refusal rate", "Steps trained"),
        tuple(groups),
        (0, 1, 2),
    )
