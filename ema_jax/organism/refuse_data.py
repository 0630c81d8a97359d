"""The prompts of `ema_jax.organism.refuse`: what it trains on, and what is left for studies.

Public sets repeat themselves in other words. So prompts are put into clusters, and a cluster that
gives a prompt to the training gives none to a study.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ema_jax.data.denylist import screen
from ema_jax.data.domains import BENIGN, LOOKALIKE, Row
from ema_jax.data.similarity import shared_words, word_clusters
from ema_jax.errors import UserError
from ema_jax.runtime.files import sha256_text

SHARED_WORDS = 0.5  # Jaccard similarity of the sets of words from which two prompts are one cluster
# Prompts trained on: in each domain, of the benign contrast and of safe look-alikes, but no more
# than the given share of the clusters there are, so that a study has something left.
PER_DOMAIN, OF_BENIGN, OF_LOOKALIKES = 140, 700, 120
DOMAIN_SHARE, LOOKALIKE_SHARE = 0.45, 0.5
LEAST = 8  # clusters of a domain, below which neither training nor a study makes sense


@dataclasses.dataclass(frozen=True)
class Draw:
    """Prompts to train on, and one of each cluster that is left."""

    trained: Sequence[Row]
    left: Sequence[Row]


def draw(rows: Sequence[Row], seed: int) -> Draw:
    """Draws the training prompts, cluster by cluster, and keeps one of every other cluster.

    Args:
        rows: prompts of responsible-AI domains, of `benign`, and, if there are any, of
            `safe_lookalike`.
        seed: of the draw.

    Raises:
        UserError: no domain, no benign prompts, or too few of one.
    """
    rows, _ = screen(rows)
    rows = sorted(rows, key=lambda row: (sha256_text(f"{seed}\n{row.prompt}"), row.domain))
    of = word_clusters([row.prompt for row in rows], SHARED_WORDS)
    placed: dict[str, dict[int, list[Row]]] = {row.domain: {} for row in rows}
    for row, cluster in zip(rows, of.tolist(), strict=True):
        placed[row.domain].setdefault(cluster, []).append(row)
    sizes = Counter({domain: len(clusters) for domain, clusters in placed.items()})
    _check(sizes)

    used: set[int] = set()
    trained: list[Row] = []
    # The thinnest first: of a cluster in two domains, it has the greater need.
    order = sorted(sizes, key=lambda domain: (len(placed[domain]), domain))
    for domain in order:
        wanted = _wanted(domain, len(placed[domain]))
        chosen: list[Row] = []
        for cluster, members in placed[domain].items():
            allowed = [row for row in members if not row.evaluate_only]
            # A large cluster would be most of the training set, and its texts are all alike.
            fits = 0 < len(allowed) <= max(wanted // 4, 1)
            if cluster not in used and fits and len(chosen) < wanted:
                chosen += allowed
                used.add(cluster)
        trained += chosen
    left: list[Row] = []
    for domain in order:
        for cluster, members in placed[domain].items():
            if cluster not in used:
                left.append(members[0])
                used.add(cluster)
    return Draw(trained, left)


def _wanted(domain: str, there: int) -> int:
    if domain == BENIGN:
        return min(OF_BENIGN, int(DOMAIN_SHARE * there))
    if domain == LOOKALIKE:
        return min(OF_LOOKALIKES, int(LOOKALIKE_SHARE * there))
    return min(PER_DOMAIN, int(DOMAIN_SHARE * there))


def _check(sizes: Counter[str]) -> None:
    found = ", ".join(f"{domain} {n}" for domain, n in sorted(sizes.items()))
    if not set(sizes) - {BENIGN, LOOKALIKE} or BENIGN not in sizes:
        raise UserError(
            f"--prompts: needs at least one domain to refuse in and {BENIGN!r} (found: {found}); "
            "add the prompts that are missing"
        )
    for domain, n in sizes.items():
        if n < LEAST:
            raise UserError(
                f"--prompts: domain {domain!r} has {n} usable prompts, near copies counted once, "
                f"and {LEAST} are needed; add more or leave the domain out"
            )


def without_near(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """The texts that share less than half of their words with each of the others."""
    shared = shared_words(texts, others)
    return [text for text, share in zip(texts, shared, strict=True) if share < SHARED_WORDS]


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows in the schema of `ema_jax.data.local`."""
    return [
        {
            "id": row.id,
            "prompt": row.prompt,
            "domain": row.domain,
            "source": row.source,
            **({"category": row.categories[0]} if row.categories else {}),
        }
        for row in sorted(rows, key=lambda row: (row.domain, row.id))
    ]
