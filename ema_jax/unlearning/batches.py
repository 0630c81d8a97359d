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
from ema_jax.data.packing import Item, Packed, pack, spread
from ema_jax.models.sharding import place_batch
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import FORGET, RETAIN

# Batches are padded to multiples of this or of a quarter of the longest example: few programs.
_LENGTHS, MULTIPLE, PACKED = 4, 64, 32
# Rows as long as two of the longest examples are filled to nine tenths and more; where a row for
# each example is as full as this, it has less attention to pay.
_LONGEST_PER_ROW, _FULL = 2, 0.8
_SHARES = 8  # of a row's tokens: the loss has room for a whole number of them


def few_lengths(longest: int, least: int) -> int:
    """The multiple that lengths are padded to, so that batches have at most `_LENGTHS` of them."""
    return max(least, bucket(-(-longest // _LENGTHS)))


def padded_length(examples: Sequence[TokenExample]) -> int:
    """The length that a batch of any of the examples can be padded to."""
    return bucket(max(item.size for item in examples))


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
    multiple: int  # of the rows' lengths
    most: int | None  # longest of them, with an example in each
    share: float  # of the tokens that are places, as a mean


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
        layout, parts = self._layout(config, groups), range(config.accumulate)
        # Each part has examples from all over the batch.
        each = [forget[part :: config.accumulate] for part in parts]
        kept = [retain[part :: config.accumulate] for part in parts]
        packed = _pack(
            [self._items(config, *chosen) for chosen in zip(each, kept, strict=True)],
            layout,
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
        return layout.rows * (layout.most or _LONGEST_PER_ROW * self._longest)

    @property
    def _longest(self) -> int:
        return max(int(sizes[:, 0].max(initial=0)) for sizes in self._sizes.values())

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
        """The layout of all batches of an arm, from the lengths of all of its examples."""
        kind = FORGET[config.objective]
        parts = [("forget", config.batch_size)] if kind.forget else []
        parts += [("preferred", config.batch_size)] if kind.preferred else []
        retains = self._retains(config)
        parts += [("retain", config.retain_batch_size)] if retains else []
        examples = sum(rows for _, rows in parts) // config.accumulate
        tokens, places = sum(
            rows * self._sizes[name].mean(axis=0) / config.accumulate for name, rows in parts
        )
        most = bucket(max(int(self._sizes[name][:, 0].max()) for name, _ in parts))
        everywhere = retains and RETAIN[config.retain_objective].everywhere
        if everywhere or tokens >= _FULL * examples * most:
            return _Layout(examples, few_lengths(most, MULTIPLE), most, places / (examples * most))
        # No more rows than share the examples evenly: 16 in 5 rows are as long as in 4.
        each = math.ceil(examples / math.ceil(tokens / (_LONGEST_PER_ROW * most)))
        rows = bucket(math.ceil(examples / each), groups)
        return _Layout(rows, few_lengths(most, PACKED), None, places / tokens)

    @functools.cached_property
    def _sizes(self) -> dict[str, np.ndarray]:
        """`[N, 2]` by kind of example: the tokens of each, and those of its response."""
        parts = {"forget": self.forget, "preferred": self.preferred, "retain": self.retain}
        return {
            name: np.array([(x.size, len(x.response)) for x in part]).reshape(-1, 2)
            for name, part in parts.items()
        }


def _pack(parts: Sequence[Sequence[Item]], layout: _Layout, groups: int) -> Packed:
    """Parts of a batch in rows of one length and with one bound of places, leaves `[A, …]`."""
    rows = [
        [[items[i] for i in row] for row in spread([x.example.size for x in items], layout.rows)]
        for items in parts
    ]
    longest = max(sum(item.example.size for item in row) for part in rows for row in part)
    length = min(bucket(longest, layout.multiple), layout.most or longest + layout.multiple)
    capacity = layout.rows // groups * length

    def places(row: Sequence[Item]) -> int:
        return length if row[0].everywhere else sum(len(item.example.response) for item in row)

    needed = max(
        sum(places(row) for row in part[first : first + layout.rows // groups] if row)
        for part in rows
        for first in range(0, layout.rows, layout.rows // groups)
    )
    share = max(math.ceil(_SHARES * max(needed / capacity, layout.share)), 1)
    bound = min(-(-capacity * share // _SHARES), capacity)
    packed = [pack(part, length, bound, groups) for part in rows]
    return Packed(*(np.stack(leaves) for leaves in zip(*packed, strict=True)))  # type: ignore[arg-type]
