"""Padded batches: every item once, in its place, without the rows that fill up a batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from ema_jax.data import batching
from ema_jax.data.batching import (
    bucket,
    few_lengths,
    few_rows,
    map_batches,
    pad_examples,
    pad_prompts,
)
from ema_jax.data.chat import TokenExample
from ema_jax.models.sharding import make_mesh

PROMPTS = [tuple(range(1, n + 1)) for n in (3, 20, 1, 17, 5, 33, 2)]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 2, 1)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_results_come_back_in_the_places_of_their_items(mesh, axis):
    def sums(batch):
        tokens, mask = batch
        rows = jnp.sum(tokens * mask, axis=1)
        return jnp.stack([rows, -rows], axis=1 if axis == 0 else 0)

    both, lengths = np.zeros((2, len(PROMPTS))), []
    for indices, found in map_batches(
        sums, PROMPTS, pad_prompts, batch_size=3, mesh=make_mesh(mesh), axis=axis
    ):
        both[:, indices] = found.T if axis == 0 else found
        lengths += [len(PROMPTS[i]) for i in indices]
    total = np.array([sum(ids) for ids in PROMPTS])
    np.testing.assert_array_equal(both, [total, -total])
    assert lengths == sorted(lengths, reverse=True)


def test_batches_of_an_earlier_run_are_left_out():
    def run(start):
        return [
            indices
            for indices, _ in map_batches(
                lambda batch: jnp.sum(batch.response),
                [TokenExample(ids, (7, 8)) for ids in PROMPTS],
                pad_examples,
                batch_size=2,
                length=lambda item: item.size,
                axis=None,
                start=start,
            )
        ]

    assert run(2) == run(0)[2:]
    assert run(4) == []


def test_few_items_have_few_sizes_of_batches():
    assert [few_rows(140, n) for n in (1000, 140, 71, 70, 36, 35, 9, 1)] == [
        *(140, 140, 140, 70, 70, 35, 9, 1),
    ]
    assert {few_rows(64, n) for n in range(1, 200)} == {1, 2, 4, 8, 16, 32, 64}
    assert few_rows(1, 5) == 1


@pytest.mark.parametrize(
    ("cpu", "longest", "padded"),
    [
        (True, [300, 200, 30], [304, 208, 32]),
        (False, [300, 200, 30], [512, 512, 512]),
        (False, [300, *[100] * 16], [512, *[128] * 16]),
        (False, [300, *[100] * 15], [512] * 16),
        (False, [10], [64]),
    ],
)
def test_batches_have_few_lengths_on_accelerators(monkeypatch, cpu, longest, padded):
    monkeypatch.setattr(batching, "on_cpu", lambda mesh: cpu)
    assert few_lengths(longest, make_mesh((1, 1, 1))) == padded


def test_padding():
    tokens, mask = pad_prompts([(1, 2), (3,)], 4, 3, pad_id=9)
    assert tokens.tolist() == [[9, 9, 1, 2], [9, 9, 9, 3], [9, 9, 9, 3]]
    assert mask.tolist() == (tokens != 9).tolist()
    batch = pad_examples([TokenExample((1, 2), (3,))], 4, 2, pad_id=9)
    assert batch.tokens.tolist() == [[1, 2, 3, 9], [9] * 4]
    assert batch.mask.tolist() == [[True] * 3 + [False], [False] * 4]
    assert batch.response.tolist() == [[False, False, True, False], [False] * 4]
    assert [bucket(n) for n in (1, 16, 17)] == [16, 16, 32]
    assert bucket(17, 64) == 64
