"""Dev rates of a model in training, by which a run is stopped."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ema_jax.refusal.verdicts import DEGENERATE, INVALID_SHARES
from ema_jax.runtime.files import json_safe


class Evaluation(NamedTuple):
    """Dev rates of the model being trained."""

    refusal: Mapping[str, float]  # NaN where no response is valid
    invalid_rate: float  # of the domain where it is highest
    # Domain → share of all responses that are refused, complied, off topic, degenerate, unjudged.
    shares: Mapping[str, Mapping[str, float]] = {}

    @classmethod
    def of_point(cls, point: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `point`; rates without a valid response are NaN again."""
        refusal = {d: math.nan if x is None else x for d, x in point["refusal"].items()}
        return cls(refusal, point["invalid_rate"], point.get("shares", {}))

    def unanswered(self, domain: str) -> float:
        """Share of a domain's responses that neither refuse nor answer."""
        found = self.shares.get(domain)
        return self.invalid_rate if found is None else sum(found[k] for k in INVALID_SHARES)

    @property
    def degenerate_rate(self) -> float:
        """Share of degenerate responses in the domain where it is highest."""
        found = (shares[DEGENERATE] for shares in self.shares.values())
        return max(found, default=self.invalid_rate)

    def damaged(self, domain: str, most: float) -> bool:
        """Whether more than a share of responses is degenerate anywhere, or unanswered here."""
        return max(self.degenerate_rate, self.unanswered(domain)) > most

    def point(self, step: int) -> dict[str, Any]:
        """As a point of a trajectory, with null for unknown rates."""
        refusal = json_safe(self.refusal)
        found = {"step": step, "refusal": refusal, "invalid_rate": self.invalid_rate}
        return found | ({"shares": dict(self.shares)} if self.shares else {})
