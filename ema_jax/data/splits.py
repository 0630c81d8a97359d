"""Draws a domain's splits from its rows, by group and, on request, by length.

Length matching. Domains differ in how long their prompts are, and early layers see that. Matched,
every domain, the benign contrast included, is drawn to one distribution of lengths in words: what
their distributions have in common (the least share that any of them has in each twentieth of
their equal-weight mixture). The i-th of a split's n prompts is the free one nearest to the quantile
(i + 1/2)/n of that, so that domains are matched to the contrast and to each other, and splits among
themselves. Where a domain has barely more prompts than are asked for, there is little to choose and
the match is loose.
"""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from absl import logging

from ema_jax.data.domains import SPLITS, TRAINED, Row
from ema_jax.errors import UserError
from ema_jax.runtime.files import sha256_text

_FEWEST = {"harvest": 16, "retain": 16, "dev": 8, "eval": 20, "concept": 16}


def fewest(split: str, asked: int) -> int:
    """Prompts of a domain in a split below which there is too little to train on or to measure."""
    return min(asked, _FEWEST[split])


def _words(row: Row) -> int:
    return len(row.prompt.split())


def common_lengths(pools: Sequence[Sequence[Row]]) -> np.ndarray:
    """A thousand quantiles of the distribution of lengths that the pools have in common.

    Pools without any length in common give their mixture.
    """
    levels = (np.arange(1000) + 0.5) / 1000
    lengths = [np.array([_words(row) for row in pool]) for pool in pools]
    mixture = np.sort(np.concatenate([np.quantile(values, levels) for values in lengths]))
    edges = np.unique(np.quantile(mixture, np.linspace(0, 1, 21)))
    if len(edges) < 2:
        return mixture
    shares = [np.histogram(values, edges)[0] / len(values) for values in lengths]
    bins = np.clip(np.searchsorted(edges, mixture, side="right") - 1, 0, len(edges) - 2)
    count = np.maximum(np.bincount(bins, minlength=len(edges) - 1), 1)
    weights = (np.min(shares, axis=0) / count)[bins]
    if not weights.sum():
        return mixture
    return mixture[np.searchsorted(np.cumsum(weights) / weights.sum(), levels)]


def draw(
    domain: str,
    pool: Sequence[Row],
    wanted: Mapping[str, int],
    lengths: np.ndarray | None,
    locked: dict[str, str],
) -> list[Row]:
    """Draws a domain's splits from its pool; a row's own split is kept.

    A pool that is too small gives every split its share of it, down to `fewest`.

    Args:
        domain: its name.
        pool: its rows, in order of precedence.
        wanted: split -> number of rows.
        lengths: the lengths to match, sorted; None to take rows as they come.
        locked: group -> split, over all domains; the draw adds to it.

    Raises:
        UserError: the pool is too small.
    """
    chosen: list[Row] = []
    missing: dict[str, int] = {}
    asked, wanted = wanted, _shares(wanted, len(pool))
    for split, count in wanted.items():
        own = [
            row
            for row in pool
            if row.split == split and not (row.evaluate_only and split in TRAINED)
        ]
        chosen += own[:count]
        missing[split] = count - min(count, len(own))
    free = _Pool([row for row in pool if row.split is None], locked)
    short = dict(missing)
    for split, near in _slots(domain, missing, lengths):
        row = free.take(split, near)
        if row is not None:
            chosen.append(replace(row, split=split))
            short[split] -= 1
    got = {split: wanted[split] - n for split, n in short.items()}
    _check(domain, pool, asked, got)
    return chosen


def _shares(wanted: Mapping[str, int], there: int) -> dict[str, int]:
    """`wanted`, or, where that is more than there are, the like shares of what is there."""
    total = sum(wanted.values())
    if there >= total:
        return dict(wanted)
    least = {split: fewest(split, n) for split, n in wanted.items()}
    spare = max(there - sum(least.values()), 0)
    beyond = {split: n - least[split] for split, n in wanted.items()}
    return {
        split: n + beyond[split] * spare // max(sum(beyond.values()), 1)
        for split, n in least.items()
    }


def _check(
    domain: str, pool: Sequence[Row], asked: Mapping[str, int], got: Mapping[str, int]
) -> None:
    """Refuses splits that are too small, and names those that are smaller than asked for."""
    short = {split: n for split, n in asked.items() if got[split] < n}
    if not short:
        return
    withheld = sum(row.evaluate_only for row in pool)
    groups = Counter(row.group for row in pool)
    most = max(groups.values(), default=0)
    has = (
        f"prompts: domain {domain!r} has {len(pool)} usable prompts ({withheld} of them only for "
        f"evaluation, {most} in its largest group of variants and near duplicates)"
    )
    lack = ", ".join(f"{got[split]} of {n} for {split}" for split, n in short.items())
    if any(got[split] < fewest(split, n) for split, n in short.items()):
        least = ", ".join(f"{split} {fewest(split, n)}" for split, n in short.items())
        part = ", or raise prompts.near_split if near ones may part" if most > 1 else ""
        raise UserError(
            f"{has}, {sum(asked.values())} are asked for and it gets {lack} (at least: {least}); "
            f"lower prompts.counts or bring more prompts{part}"
        )
    logging.warning("%s: it gets %s", has, lack)


def _slots(
    domain: str, missing: Mapping[str, int], lengths: np.ndarray | None
) -> list[tuple[str, float | None]]:
    """The (split, wanted length) to fill, in the order of filling.

    Trained splits come first, since fewer rows may enter them. With lengths, the others take
    turns, so that no split is left with the rows that fit the others worst.
    """
    slots: list[tuple[tuple, str, float | None]] = []
    for split, count in missing.items():
        levels = (np.arange(count) + 0.5) / max(count, 1)
        nears = [None] * count if lengths is None else np.quantile(lengths, levels).tolist()
        for i, near in enumerate(nears):
            turn = (
                (SPLITS.index(split), i) if near is None else sha256_text(f"{domain}/{split}/{i}")
            )
            slots.append(((split not in TRAINED, turn), split, near))
    return [(split, near) for _, split, near in sorted(slots, key=lambda slot: slot[0])]


class _Pool:
    """A domain's free rows, taken one by one; a group goes to the split that first takes of it."""

    def __init__(self, rows: Sequence[Row], locked: dict[str, str]):
        self._locked = locked
        self._taken: set[str] = set()
        # Rows of one group are adjacent, in the order of precedence of the group's first row.
        groups = {row.group: i for i, row in reversed(list(enumerate(rows)))}
        self._rows = sorted(rows, key=lambda row: groups[row.group])
        self._by_length = sorted(self._rows, key=_words)
        self._lengths = [_words(row) for row in self._by_length]

    def take(self, split: str, near: float | None) -> Row | None:
        """The next row for `split`, or the one of nearest length; None when there is none left."""
        candidates = self._rows if near is None else self._outward(near)
        row = next((row for row in candidates if self._allowed(row, split)), None)
        if row is not None:
            self._locked[row.group] = split
            self._taken.add(row.id)
        return row

    def _allowed(self, row: Row, split: str) -> bool:
        return (
            row.id not in self._taken
            and self._locked.get(row.group, split) == split
            and not (row.evaluate_only and split in TRAINED)
        )

    def _outward(self, near: float) -> Iterator[Row]:
        """The rows in order of their distance from the length `near`."""
        right = bisect.bisect_left(self._lengths, near)
        left = right - 1
        while left >= 0 or right < len(self._lengths):
            if right == len(self._lengths) or (
                left >= 0 and near - self._lengths[left] <= self._lengths[right] - near
            ):
                yield self._by_length[left]
                left -= 1
            else:
                yield self._by_length[right]
                right += 1
