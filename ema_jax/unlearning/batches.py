"""Batches as a pure function of (seed, step): nothing to save, nothing to replay.

A batch is the same whatever the number of devices or processes, and wherever a run resumes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt32

from ema_jax.data.batching import bucket
from ema_jax.data.chat import TokenExample
from ema_jax.data.packing import Item, Packed, pack, share_out, spread
from ema_jax.models.sharding import place_batch
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import FORGET, RETAIN

# The rows of an arm's batches have very few lengths, each of which is a program of its own: those,
# multiples of this, of which a sample of its batches would waste least.
_SAMPLE, MULTIPLE = 128, 16
# A program costs what fifteen to fifty steps do, once for all seeds and later runs: a length is
# worth its own if it saves a run this many steps.
_WORTH_STEPS = 16
# Rows as long as two of the longest examples are filled to nine tenths and more; where a row for
# each example is as full as this, it has less attention to pay.
_LONGEST_PER_ROW, _FULL = 2, 0.8
_SHARES = 8  # of a row's tokens: the loss has room for a whole number of them


def batch_indices(size: int, number: int, seed: int, step: int) -> np.ndarray:
    """Indices of the examples of step `step`: a pure function of seed and step.

    Epochs are permutations; a batch may span two of them.

    Args:
        size: number of examples.
        number: of a batch's examples.
        seed: of the permutations.
        step: from 0.
    """
    flat = np.arange(step * number, (step + 1) * number)
    epochs, places = flat // size, flat % size
    chosen = np.empty(number, int)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(size)
        here = epochs == epoch
        chosen[here] = order[places[here]]
    return chosen


class StepBatch(NamedTuple):
    """The examples of one step in A parts, and what its dropout is drawn from."""

    rows: Packed  # leaves [A, …]
    reference: Float[Array, "A F"]  # log π_ref of the forget responses
    preferred_reference: Float[Array, "A F"] | None
    draw: UInt32[Array, "2"]  # (seed, step)

    def placed(self, mesh: Mesh) -> "StepBatch":
        """The batch with its rows laid out over the mesh; all else goes whole to every device."""
        return self._replace(rows=place_batch(self.rows, mesh, axis=1))


class _Layout(NamedTuple):
    """What the rows of all batches of a run have in common."""

    rows: int  # in a part
    lengths: tuple[int, ...] = ()  # of rows, in ascending order; a rare batch needs a longer one
    share: int = 1  # of the tokens that may be places, in eighths


@dataclasses.dataclass(frozen=True)
class Data:
    """The training data of one run.

    Attributes:
        forget: refusals of the target domain.
        reference: log π_ref of each.
        retain: examples of the behaviour to keep.
        preferred: preferred responses to the forget prompts, one for each; for some objectives.
        preferred_reference: log π_ref of each of them.
    """

    forget: Sequence[TokenExample]
    reference: Float[np.ndarray, "N"]
    retain: Sequence[TokenExample] = ()
    preferred: Sequence[TokenExample] = ()
    preferred_reference: Float[np.ndarray, "N"] | None = None

    def indices(self, config: UnlearnConfig, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the forget and the retain examples of a step."""
        forget = batch_indices(len(self.forget), config.batch_size, seed, step)
        if not self._retains(config):
            return forget, np.empty(0, int)
        number = config.retain_batch_size
        return forget, batch_indices(len(self.retain), number, seed + 1, step)

    def host_batch(self, config: UnlearnConfig, seed: int, step: int, groups: int = 1) -> StepBatch:
        """The batch of a step, in NumPy.

        Its examples do not depend on the devices; how they lie in its rows does.

        Args:
            config: the arm.
            seed: of the order of examples.
            step: from 0.
            groups: number of devices that share the rows (`batch_multiple` of a mesh).
        """
        forget, retain = self.indices(config, seed, step)
        each, kept = _parts(forget, config), _parts(retain, config)
        packed = _pack(
            [self._items(config, *chosen) for chosen in zip(each, kept, strict=True)],
            self._layout(config, groups),
            groups,
        )
        reference: Any = np.stack([self.reference[i] for i in each])
        preferred: Any = None
        if self.preferred_reference is not None:
            preferred = np.stack([self.preferred_reference[i] for i in each])
        draw: Any = np.array([seed, step], np.uint32)
        return StepBatch(packed, reference, preferred, draw)

    def pass_tokens(self, config: UnlearnConfig, groups: int = 1) -> int:
        """Tokens of a forward pass, padding included, as a rule."""
        layout = self._layout(config, groups)
        return layout.rows * layout.lengths[-1]

    def _retains(self, config: UnlearnConfig) -> bool:
        return config.retains and len(self.retain) > 0

    def _items(self, config: UnlearnConfig, forget: np.ndarray, retain: np.ndarray) -> list[Item]:
        """Examples by number: forget examples, their preferred responses, retain examples."""
        kind, number = FORGET[config.objective], len(forget)
        items = [Item(k, self.forget[i]) for k, i in enumerate(forget) if kind.forget]
        if kind.preferred:
            items += [Item(number + k, self.preferred[i]) for k, i in enumerate(forget)]
        everywhere = RETAIN[config.retain_objective].everywhere if len(retain) else False
        kept = enumerate(retain, start=2 * number)
        return items + [Item(k, self.retain[i], everywhere) for k, i in kept]

    def _layout(self, config: UnlearnConfig, groups: int) -> _Layout:
        """The layout of all batches of an arm: not of its seed, so that seeds share programs."""
        retained = config.retain_batch_size if self._retains(config) else 0
        everywhere = bool(retained) and RETAIN[config.retain_objective].everywhere
        numbers = config.batch_size, retained, config.accumulate, config.max_steps, groups
        key = (config.objective, everywhere, *numbers)
        if key not in self._layouts:
            layout = self._rows(config, everywhere, groups)
            drawn = [
                _Spread.of([self._items(config, *part) for part in chosen], layout, groups)
                for chosen in (
                    zip(*(_parts(x, config) for x in self.indices(config, 0, step)), strict=True)
                    for step in range(1 if self._alike else _SAMPLE)
                )
            ]
            self._layouts[key] = layout._replace(
                lengths=_few_lengths([batch.length for batch in drawn], config.max_steps),
                share=max(batch.share for batch in drawn),
            )
        return self._layouts[key]

    @functools.cached_property
    def _layouts(self) -> dict[tuple, _Layout]:
        return {}

    def _rows(self, config: UnlearnConfig, everywhere: bool, groups: int) -> _Layout:
        """How many rows there are, from the lengths of all examples."""
        kind = FORGET[config.objective]
        parts = [("forget", config.batch_size)] if kind.forget else []
        parts += [("preferred", config.batch_size)] if kind.preferred else []
        parts += [("retain", config.retain_batch_size)] if self._retains(config) else []
        examples = sum(rows for _, rows in parts) // config.accumulate
        tokens = sum(rows * self._sizes[name].mean() / config.accumulate for name, rows in parts)
        most = bucket(max(int(self._sizes[name].max()) for name, _ in parts))
        if everywhere or tokens >= _FULL * examples * most:
            return _Layout(examples)
        # No more rows than share the examples evenly: 16 in 5 rows are as long as in 4.
        each = math.ceil(examples / math.ceil(tokens / (_LONGEST_PER_ROW * most)))
        return _Layout(bucket(math.ceil(examples / each), groups))

    @functools.cached_property
    def _alike(self) -> bool:
        """Whether the examples of each kind are all as long: one batch then stands for all."""
        parts = self.forget, self.preferred, self.retain
        return all(len({(len(x.prompt), len(x.response)) for x in part}) <= 1 for part in parts)

    @functools.cached_property
    def _sizes(self) -> dict[str, np.ndarray]:
        """Tokens of each example, by kind of example."""
        parts = {"forget": self.forget, "preferred": self.preferred, "retain": self.retain}
        return {name: np.array([x.size for x in part], int) for name, part in parts.items()}


def _parts(indices: np.ndarray, config: UnlearnConfig) -> list[np.ndarray]:
    """The examples of each part of a batch: from all over it."""
    return [indices[part :: config.accumulate] for part in range(config.accumulate)]


class _Spread(NamedTuple):
    """The parts of a batch in rows of one length."""

    rows: list[list[list[Item]]]
    length: int
    share: int  # of a group's tokens that may be places, in eighths

    @classmethod
    def of(cls, parts: Sequence[Sequence[Item]], layout: _Layout, groups: int) -> "_Spread":
        """In rows of the least of the layout's lengths that does, or longer ones."""

        def in_rows(items: Sequence[Item]) -> list[list[Item]]:
            chosen = spread([item.example.size for item in items], layout.rows)
            return [[items[i] for i in row] for row in chosen]

        rows = [in_rows(items) for items in parts]
        longest = max(sum(item.example.size for item in row) for part in rows for row in part)
        length = next((n for n in layout.lengths if n >= longest), bucket(longest, MULTIPLE))

        def places(row: Sequence[Item]) -> int:
            everywhere = any(item.everywhere for item in row)
            return length if everywhere else sum(len(x.example.response) for x in row)

        if groups > 1:  # the group with most places sets the room of all
            rows = [[part[i] for i in share_out(list(map(places, part)), groups)] for part in rows]
        each = layout.rows // groups
        needed = max(
            sum(map(places, part[first : first + each]))
            for part in rows
            for first in range(0, layout.rows, each)
        )
        return cls(rows, length, max(math.ceil(_SHARES * needed / (each * length)), 1))


def _few_lengths(sample: Sequence[int], steps: int) -> tuple[int, ...]:
    """The longest of the lengths that a run's batches need, and others that are worth a program."""

    def padded(lengths: Sequence[int]) -> int:
        return sum(min(n for n in lengths if n >= needed) for needed in sample)

    chosen = [max(sample)]
    while True:
        more = min(([*chosen, n] for n in sorted({*sample})), key=padded)
        if steps * (1 - padded(more) / padded(chosen)) < _WORTH_STEPS:
            return tuple(sorted(chosen))
        chosen = more


def _pack(parts: Sequence[Sequence[Item]], layout: _Layout, groups: int) -> Packed:
    """Parts of a batch in rows of one length and with one bound of places, leaves `[A, …]`."""
    rows, length, share = _Spread.of(parts, layout, groups)
    capacity = layout.rows // groups * length
    bound = min(-(-capacity * max(share, layout.share) // _SHARES), capacity)
    packed = [pack(part, length, bound, groups) for part in rows]
    return Packed(*(np.stack(leaves) for leaves in zip(*packed, strict=True)))  # type: ignore[arg-type]
