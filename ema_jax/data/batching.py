"""Padded batches of like length, and functions mapped over them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from ema_jax.data.chat import TokenExample
from ema_jax.models.sharding import batch_rows, host_array, make_mesh, on_cpu, place_batch

T = TypeVar("T")

ROWS = 64  # of one forward pass, where nobody says how many
_LEAST, _WORTH = 64, 16  # on accelerators: tokens of a row; batches for which a program is worth it


class Batch(NamedTuple):
    """Padded rows for one forward pass."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]  # real tokens
    response: Bool[Array, "B T"]  # tokens of the response, its end-of-sequence included


def pad_prompts(
    prompts: Sequence[Sequence[int]], length: int, rows: int, pad_id: int = 0
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Left-padded `(tokens, mask)`; missing rows repeat the last prompt."""
    tokens = np.full((rows, length), pad_id, np.int32)
    mask = np.zeros((rows, length), bool)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


def pad_examples(
    examples: Sequence[TokenExample], length: int, rows: int, pad_id: int = 0
) -> Batch:
    """A right-padded batch; missing rows are empty, with no token of a response."""
    tokens = np.full((rows, length), pad_id, np.int32)
    mask, response = np.zeros((rows, length), bool), np.zeros((rows, length), bool)
    for row, item in enumerate(examples):
        tokens[row, : item.size] = item.prompt + item.response
        mask[row, : item.size] = True
        response[row, len(item.prompt) : item.size] = True
    return Batch._make((tokens, mask, response))  # NumPy's here, the device's once placed


def bucket(length: int, multiple: int = 16) -> int:
    """The padded length of a bucket: few distinct ones, so that few programs are compiled."""
    return -(-length // multiple) * multiple


def padded_length(longest: int, mesh: Mesh) -> int:
    """The length that prompts are padded to, by the longest of them.

    A program takes a second to compile on a CPU, and many on accelerators, which have operations to
    spare: there it is a power of two.
    """
    if on_cpu(mesh):
        return bucket(longest)
    return max(_LEAST, 1 << (longest - 1).bit_length())


def few_lengths(longest: Sequence[int], mesh: Mesh) -> list[int]:
    """The padded lengths of batches, given the longest of each in descending order.

    On accelerators they fall only where enough batches are left to gain from another program.
    """
    worth, found = 1 if on_cpu(mesh) else _WORTH, [padded_length(longest[0], mesh)]
    for left, length in zip(range(len(longest) - 1, 0, -1), longest[1:], strict=True):
        found.append(padded_length(length, mesh) if left >= worth else found[-1])
    return found


def few_rows(batch_size: int, items: int) -> int:
    """Rows of a batch for so many items: `batch_size` halved while all of them still fit.

    Calls with few items have few sizes, so that few programs are compiled.
    """
    rows = batch_size
    while rows > 1 and -(-rows // 2) >= items:
        rows = -(-rows // 2)
    return rows


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, so that memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def map_batches(
    function: Callable[[Any], Any],
    items: Sequence[T],
    pad: Callable[[Sequence[T], int, int], Any],
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    length: Callable[[T], int] = len,  # type: ignore[assignment]
    axis: int | None = 0,
    start: int = 0,
) -> Iterator[tuple[list[int], Any]]:
    """Runs a function of a padded batch over all items, batches of like length, longest first.

    Args:
        function: takes a batch on the mesh; returns a tree of arrays.
        items: what the batches are made of.
        pad: `(items, length, rows)` → a batch in NumPy, as `pad_prompts` and `pad_examples` are.
        batch_size: rows at once, rounded up to what the mesh divides; 0 for 64. Where the items
            are fewer, `few_rows`.
        mesh: devices of the model.
        length: tokens of an item.
        axis: of the returned arrays along which the rows lie; None if they hold no rows.
        start: batches to leave out because an earlier run has done them.

    Yields:
        Indices of a batch's items, and the function's results for these alone, in NumPy.
    """
    mesh = make_mesh() if mesh is None else mesh
    rows = batch_rows(few_rows(batch_size or ROWS, len(items)), mesh)
    lengths = [length(item) for item in items]
    batches = list(length_batches(lengths, rows))
    padded = few_lengths([lengths[indices[0]] for indices in batches], mesh) if batches else []
    flying: tuple[list[int], Any] | None = None
    for indices, most in itertools.islice(zip(batches, padded, strict=True), start, None):
        batch = pad([items[i] for i in indices], most, rows)
        results = function(place_batch(batch, mesh))
        # The device works on these while the host reads those before.
        if flying is not None:
            yield _landed(*flying, axis)
        flying = indices, results
    if flying is not None:
        yield _landed(*flying, axis)


def _landed(indices: list[int], results: Any, axis: int | None) -> tuple[list[int], Any]:
    """A batch's results in NumPy."""
    return indices, jax.tree.map(partial(_on_host, count=len(indices), axis=axis), results)


def _on_host(x: jax.Array, count: int, axis: int | None) -> np.ndarray:
    """The array in NumPy, without the rows that fill up its batch."""
    array = host_array(x)
    return array if axis is None else np.moveaxis(np.moveaxis(array, axis, 0)[:count], 0, axis)
