"""Batches as a pure function of (seed, step): nothing to save, nothing to replay.

A batch is the same whatever the number of devices or processes, and wherever a run resumes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt32

from ema_jax.data.batching import Batch, bucket, pad_examples
from ema_jax.data.chat import TokenExample
from ema_jax.models.sharding import place_batch
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import FORGET, ForgetBatch, RetainBatch

# Batches are padded to multiples of this or of a quarter of the longest example: few programs.
_LENGTHS, MULTIPLE = 4, 64


def few_lengths(longest: int, least: int) -> int:
    """The multiple that lengths are padded to, so that batches have at most `_LENGTHS` of them."""
    return max(least, bucket(-(-longest // _LENGTHS)))


def padded_length(examples: Sequence[TokenExample]) -> int:
    """The length that a batch of any of the examples can be padded to."""
    return bucket(max(item.size for item in examples))


def batch_indices(
    size: int,
    rows: int,
    seed: int,
    step: int,
    lengths: Sequence[int] | None = None,
    pool: int = 1,
) -> np.ndarray:
    """Indices of the examples of step `step`: a pure function of seed and step.

    Epochs are permutations; a batch may span two of them.

    Args:
        size: number of examples.
        rows: of a batch.
        seed: of the permutations.
        step: from 0.
        lengths: of the examples in tokens, for a pool.
        pool: batches drawn together, sorted by length and taken in random order.
    """
    if pool > 1:
        assert lengths is not None
        first = step - step % pool
        drawn = np.concatenate([batch_indices(size, rows, seed, first + i) for i in range(pool)])
        drawn = drawn[np.argsort(np.asarray(lengths)[drawn], kind="stable")]
        # A stream of its own, apart from the permutations' two-number seeds.
        order = np.random.default_rng([seed, first, 1]).permutation(pool)
        return drawn.reshape(pool, rows)[order[step - first]]
    flat = np.arange(step * rows, (step + 1) * rows)
    epochs, places = flat // size, flat % size
    chosen = np.empty(rows, int)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(size)
        here = epochs == epoch
        chosen[here] = order[places[here]]
    return chosen


class StepBatch(NamedTuple):
    """The examples of one step, and what its dropout is drawn from."""

    forget: ForgetBatch
    retain: RetainBatch | None
    draw: UInt32[Array, "2"]  # (seed, step)

    def placed(self, mesh: Mesh) -> "StepBatch":
        """The batch with its rows laid out over the mesh; the draw goes whole to every device."""
        forget, retain = place_batch((self.forget, self.retain), mesh)
        return StepBatch(forget, retain, self.draw)


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
        pool = config.length_pool

        def chosen(examples: Sequence[TokenExample], rows: int, seed: int) -> np.ndarray:
            lengths = [example.size for example in examples] if pool > 1 else None
            return batch_indices(len(examples), rows, seed, step, lengths, pool)

        forget = chosen(self.forget, config.batch_size, seed)
        if not (config.retains and self.retain):
            return forget, np.empty(0, int)
        return forget, chosen(self.retain, config.retain_batch_size, seed + 1)

    def host_batch(self, config: UnlearnConfig, seed: int, step: int) -> StepBatch:
        """The batch of a step, in NumPy: all of its parts padded to one length."""
        forget, retain = self.indices(config, seed, step)
        parts = {"forget": (self.forget, forget)}
        if FORGET[config.objective].preferred:
            parts["preferred"] = self.preferred, forget
        if len(retain):
            parts["retain"] = self.retain, retain
        padded = _padded(parts)
        batch = ForgetBatch(padded["forget"], self.reference[forget], padded.get("preferred"))
        if self.preferred_reference is not None and batch.preferred is not None:
            batch = batch._replace(preferred_reference=self.preferred_reference[forget])
        draw: Any = np.array([seed, step], np.uint32)
        return StepBatch(batch, RetainBatch(padded["retain"]) if len(retain) else None, draw)


def _padded(parts: Mapping[str, tuple[Sequence[TokenExample], np.ndarray]]) -> dict[str, Batch]:
    """The chosen examples of each part, padded to a length that all of them share."""
    rows = {name: [examples[i] for i in chosen] for name, (examples, chosen) in parts.items()}
    most = max(padded_length(examples) for examples, _ in parts.values())
    multiple = few_lengths(most, MULTIPLE)
    longest = max(example.size for part in rows.values() for example in part)
    length = min(bucket(longest, multiple), most)
    return {name: pad_examples(part, length, len(part), 0) for name, part in rows.items()}
