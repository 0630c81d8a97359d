"""Packed rows: several examples one after another in a row, and lists of what a loss looks at.

Examples differ much in length, and a row for each would be half padding. Packed, each has its own
positions and sees itself alone, so its results are those that it has in a row by itself.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ema_jax.data.chat import TokenExample


class Packed(NamedTuple):
    """Rows for one forward pass, in groups of equal size that lie on devices of their own.

    A place is where the next token is one of a response, `T · row + time` in its group: the losses
    need the model's state there and nowhere else.
    """

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # which of its row's examples a token is of, from 1; 0 at padding
    places: Int[Array, "G N"]  # past the group's last token where there is none
    targets: Int[Array, "G N"]  # the next token
    examples: Int[Array, "G N"]  # number of the place's example; below zero where there is none

    @property
    def mask(self) -> Bool[Array, "B T"]:
        """Real tokens."""
        return self.segments > 0

    def at_places(self, x: Float[Array, "B T D"]) -> Float[Array, "G N D"]:
        """States at the places, within each device's rows; zeros where there is no place."""
        flat = x.reshape(self.places.shape[0], -1, x.shape[-1])

        def take(states: Float[Array, "S D"], places: Int[Array, "N"]) -> Float[Array, "N D"]:
            return states.at[places].get(mode="fill", fill_value=0)

        return jax.vmap(take)(flat, self.places)

    def sums(self, values: Float[Array, "G N"], first: int, number: int) -> Float[Array, "E"]:
        """Sums over the places of each of `number` examples, from number `first` on."""
        numbers = jnp.arange(first, first + number)[:, None, None]
        return jnp.sum(jnp.where(self.examples == numbers, values, 0.0), axis=(1, 2))


class Branch(NamedTuple):
    """A prompt, and responses each of which continues it."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Room in a row for its tokens, of which nothing follows a response's last, and places."""
        within = sum(len(response) - 1 for response in self.responses)
        return within + max(len(self.prompt), len(self.responses))


class Branched(NamedTuple):
    """Rows of branches: each prompt is there once, and its responses see it and not one another."""

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # a prompt's or a response's, from 1; 0 at padding
    continued: Int[Array, "B T"]  # of a response's tokens, the segment of its prompt; else 0
    places: Int[Array, "B T"]  # time of the token before each one of a response, in their order
    targets: Int[Array, "B T"]  # that one of a response; 0, as its place, where there is none


class Item(NamedTuple):
    """An example with its number in the batch."""

    number: int
    example: TokenExample
    everywhere: bool = False  # every token of its row is a place, padding too


def spread(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Indices in `rows` rows of much the same length.

    Longest first, each into the shortest row; then the longest row and another one exchange two, or
    one moves over, as long as that shortens it.
    """
    chosen: list[list[int]] = [[] for _ in range(rows)]
    heap = [(0, row) for row in range(rows)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        filled, row = heapq.heappop(heap)
        chosen[row].append(i)
        heapq.heappush(heap, (filled + lengths[i], row))
    while True:
        *others, longest = sorted(chosen, key=lambda row: sum(lengths[i] for i in row))
        if not any(_exchange(longest, row, lengths) for row in others):
            return chosen


def _exchange(longer: list[int], row: list[int], lengths: Sequence[int]) -> bool:
    """Exchanges two indices, or moves one, where that leaves the rows closest; False if nowhere."""
    gap = sum(lengths[i] for i in longer) - sum(lengths[i] for i in row)
    moves = [(abs(gap - 2 * lengths[i]), i, -1) for i in longer]
    moves += [(abs(gap - 2 * (lengths[i] - lengths[k])), i, k) for i in longer for k in row]
    left, over, back = min(moves, default=(0, -1, -1))
    if left >= gap:
        return False
    longer.remove(over)
    row.append(over)
    if back >= 0:
        row.remove(back)
        longer.append(back)
    return True


def share_out(sizes: Sequence[int], groups: int) -> list[int]:
    """Indices, group after group, in groups of equally many and of much the same size.

    Largest first, one to each group, and then back from the last group to the first.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    laps = [order[first : first + groups] for first in range(0, len(order), groups)]
    turned = [lap[:: -1 if number % 2 else 1] for number, lap in enumerate(laps)]
    return [i for group in zip(*turned, strict=True) for i in group]


def fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices in few rows of `room` tokens: longest first, each where least room is left by it."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # what each row has left, and the row, in order
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(free, (lengths[i],))
        if place == len(free):
            rows.append([])
            left, row = room, len(rows) - 1
        else:
            left, row = free.pop(place)
        rows[row].append(i)
        insort(free, (left - lengths[i], row))
    return rows


def lay_out(
    rows: Sequence[Sequence[TokenExample]], length: int, number: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Tokens and segments, as in `Packed`, of `number` rows of some length, in NumPy."""
    tokens = np.zeros((number, length), np.int32)
    segments = np.zeros_like(tokens)
    for row, items in enumerate(rows):
        start = 0
        for segment, item in enumerate(items, start=1):
            end = start + item.size
            tokens[row, start:end] = item.prompt + item.response
            segments[row, start:end] = segment
            start = end
    return tokens, segments


def lay_out_branches(rows: Sequence[Sequence[Branch]], length: int, number: int) -> Branched:
    """Lays branches out in NumPy, in `number` rows of some length."""
    laid = Branched(*np.zeros((5, number, length), np.int32))
    for row, branches in enumerate(rows):
        start = segment = listed = 0
        for prompt, responses in branches:
            prompt_segment = segment = segment + 1
            end = last = start + len(prompt)
            laid.tokens[row, start:end] = prompt
            laid.segments[row, start:end] = segment
            for response in responses:
                segment += 1
                start, end = end, end + len(response) - 1
                laid.tokens[row, start:end] = response[:-1]
                laid.segments[row, start:end] = segment
                laid.continued[row, start:end] = prompt_segment
                here = slice(listed, listed := listed + len(response))
                laid.places[row, here] = [last - 1, *range(start, end)]
                laid.targets[row, here] = response
            start = end
    return laid


def pack(rows: Sequence[Sequence[Item]], length: int, places: int, groups: int = 1) -> Packed:
    """Lays items out in NumPy.

    Args:
        rows: the items of each row, no longer than `length` together.
        length: of the rows.
        places: how many a group has room for.
        groups: number of groups; it divides that of the rows.
    """
    examples = [[item.example for item in items] for items in rows]
    tokens, segments = lay_out(examples, length, len(rows))
    found: list[list[np.ndarray]] = [[] for _ in range(groups)]
    for row, items in enumerate(rows):
        group, within = divmod(row, len(rows) // groups)
        start = 0
        for item in items:
            end = start + item.example.size
            # The first token is predicted by none.
            first = start + max(len(item.example.prompt), 1) - 1
            times = np.arange(length) if item.everywhere else np.arange(first, end - 1)
            targets = tokens[row, (times + 1) % length]
            numbers = np.full(len(times), item.number)
            found[group].append(np.stack([within * length + times, targets, numbers]))
            start = end
    listed = np.empty((3, groups, places), np.int32)
    listed[:] = np.array([len(rows) // groups * length, 0, -1])[:, None, None]
    for group, parts in enumerate(found):
        part = np.concatenate(parts, axis=1) if parts else np.empty((3, 0), int)
        listed[:, group, : part.shape[1]] = part
    return Packed(*map(_host, (tokens, segments, *listed)))


def _host(x: np.ndarray) -> Array:
    """NumPy's array, which is the device's once placed."""
    return x  # type: ignore[return-value]
