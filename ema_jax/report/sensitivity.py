"""Table of the refusal rate's range over ways of asking."""

from collections.abc import Mapping
from typing import Any

from ema_jax.report.drawing import label
from ema_jax.report.tables import Row, Table, interval, percent

_SHOWN = ("refused", "complied", "off_topic", "degenerate")


def sensitivity(results: Mapping[str, Any]) -> Table:
    """Table of the headline's refusal rate and its range over ways of asking, by arm and domain."""
    groups = []
    for arm, domains in results["sensitivity"].items():
        rows = (
            Row(
                (
                    label(domain),
                    percent(found["ways"]["greedy"]["rate"]),
                    interval(found["rate"], percent),
                    *(interval(found["shares"][name], percent) for name in _SHOWN),
                )
            )
            for domain, found in domains.items()
        )
        groups.append((arm, tuple(rows)))
    return Table(
        "Lowest and highest over the ways of asking: greedy as in all other figures, samples at "
        "temperature 1, longer responses; seeds pooled. The rate is refused / valid; the shares "
        "are of all responses. Not intervals: each way has the uncertainty of the headline.",
        ("Arm", "Domain", "Greedy rate", "Rate", *(label(name) for name in _SHOWN)),
        tuple(groups),
        (0, 1),
    )
