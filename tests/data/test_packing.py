"""Packed rows: every token once, and a place for each token of a response."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import our_outputs

from ema_jax.data.batching import pad_examples
from ema_jax.data.chat import TokenExample
from ema_jax.data.packing import (
    Branch,
    Item,
    fit,
    lay_out,
    lay_out_branches,
    pack,
    share_out,
    spread,
)
from ema_jax.models import checkpoint
from ema_jax.models.attention import positions_within


def drawn(number: int, seed: int = 0) -> list[TokenExample]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, 97, size=rng.integers(low, high)).tolist())

    return [TokenExample(ids(1, 7), ids(1, 9)) for _ in range(number)]


def packed_rows(examples, rows: int, groups: int = 1):
    chosen = spread([x.size for x in examples], rows)
    items = [[Item(i, examples[i]) for i in row] for row in chosen]
    longest = max(sum(item.example.size for item in row) for row in items)
    return pack(items, longest + 2, (longest + 2) * rows // groups, groups), chosen


def test_rows_are_of_much_the_same_length():
    lengths = [9, 1, 1, 1, 5, 4, 3]
    assert spread(lengths, 3) == [[0], [4, 1, 2, 3], [5, 6]]
    assert [sum(lengths[i] for i in row) for row in spread(lengths, 3)] == [9, 8, 7]
    assert spread([2], 2) == [[0], []]
    lengths = [5, 5, 4, 4, 3, 3, 3]  # longest first alone: 11, 8 and 8
    assert [sum(lengths[i] for i in row) for row in spread(lengths, 3)] == [9, 9, 9]


def test_groups_of_equally_many_rows_are_of_much_the_same_size():
    assert share_out([7, 1, 3, 6, 2, 8], 3) == [5, 1, 0, 4, 3, 2]  # 8 + 1, 7 + 2, 6 + 3
    assert share_out([7, 1, 3, 6, 2, 8], 2) == [5, 2, 4, 0, 3, 1]  # 8 + 3 + 2, 7 + 6 + 1
    assert share_out([1, 2, 3], 3) == [2, 1, 0]


def test_rows_with_room_for_them_are_few():
    assert fit([9, 1, 1, 1, 5, 4, 3], 9) == [[0], [4, 5], [6, 1, 2, 3]]
    lengths = [x.size for x in drawn(100)]
    rows = fit(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(100))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 20
    assert len(rows) <= sum(lengths) / 20 + 1
    assert fit([], 9) == []


def test_rows_lie_one_example_after_another():
    tokens, segments = lay_out([[TokenExample((1, 2), (3,)), TokenExample((4,), (5,))]], 6, 2)
    assert tokens.tolist() == [[1, 2, 3, 4, 5, 0], [0] * 6]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6]


def test_responses_that_continue_one_prompt_have_it_once():
    both = Branch((1, 2), ((3, 4), (5,), (6, 7, 8)))
    rows = lay_out_branches([[both, Branch((9,), ((10, 11),))]], 9, 2)
    assert both.size == 6  # of three responses the places, of which the prompt has two
    listed = {name: field.tolist() for name, field in rows._asdict().items()}
    assert listed == {
        "tokens": [[1, 2, 3, 6, 7, 9, 10, 0, 0], [0] * 9],
        "segments": [[1, 1, 2, 4, 4, 5, 6, 0, 0], [0] * 9],
        "continued": [[0, 0, 1, 1, 1, 0, 5, 0, 0], [0] * 9],
        "places": [[1, 2, 1, 1, 3, 4, 5, 6, 0], [0] * 9],
        "targets": [[3, 4, 5, 6, 7, 8, 10, 11, 0], [0] * 9],
    }
    positions = positions_within(jnp.asarray(rows.segments), jnp.asarray(rows.continued))
    assert positions[0, :7].tolist() == [0, 1, 2, 2, 3, 0, 1]


@pytest.mark.parametrize("groups", [1, 2])
def test_every_token_of_a_response_has_its_place(groups):
    examples = [*drawn(9), TokenExample((), (3, 4))]  # the first token of all is predicted by none
    batch, chosen = packed_rows(examples, 4, groups)
    flat = batch.tokens.reshape(groups, -1)
    for number, example in enumerate(examples):
        at = np.nonzero(batch.examples == number)
        before = flat[at[0], batch.places[at]].tolist()
        whole = (*example.prompt, *example.response)
        start = max(len(example.prompt), 1)
        assert batch.targets[at].tolist() == list(whole[start:])
        assert before == list(whole[start - 1 : -1])
    for row, items in enumerate(chosen):
        sizes = [examples[i].size for i in items]
        segments = np.repeat(np.arange(1, len(items) + 1), sizes)
        positions = np.concatenate([np.arange(n) for n in sizes])
        np.testing.assert_array_equal(batch.segments[row, : sum(sizes)], segments)
        found = positions_within(jnp.asarray(batch.segments))[row]
        np.testing.assert_array_equal(found[: sum(sizes)], positions)
        assert (found[sum(sizes) :] == positions[-1]).all()
    empty = batch.examples < 0
    assert (batch.places[empty] == flat.shape[1]).all()
    sums = batch.sums(jnp.ones(empty.shape), 1, 3)
    assert sums.tolist() == [len(x.response) for x in examples[1:4]]


@pytest.mark.parametrize("variant", ["qwen2", "mistral"])  # mistral's window is short
def test_a_packed_example_has_the_states_that_it_has_alone(tiny, variant):
    model, examples = checkpoint.load(tiny(variant)), drawn(5, seed=1)
    batch, _ = packed_rows(examples, 2)
    batch = jax.tree.map(jnp.asarray, batch)
    hidden = model(batch.tokens, batch.mask, segments=batch.segments).hidden
    found = np.asarray(batch.at_places(hidden))
    assert not found[batch.examples < 0].any()
    rows = pad_examples(examples, max(x.size for x in examples), len(examples))
    alone = our_outputs(model, rows.tokens, rows.mask)[1]
    for number, example in enumerate(examples):
        ours, start = found[batch.examples == number], len(example.prompt) - 1
        np.testing.assert_allclose(ours, alone[number, start : example.size - 1], atol=2e-5)
