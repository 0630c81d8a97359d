"""Attention by XLA's own products, with a backward pass that keeps no matrix of weights.

For rows in which no token sees a later one. Queries go in a few blocks, each of which multiplies
with the keys up to its own end alone: five eighths of the pairs, in four blocks. The backward pass
computes the weights again from the logarithm of their sum, as Dao et al. (arXiv 2205.14135) do, and
its products are laid out so that no matrix of queries by keys is transposed. On a CPU that takes a
third of the time of `jax.nn.dot_product_attention` and its gradient (benchmarks/README.md).
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ema_jax.models.sharding import at_precision, matmul_precision

KEPT = "kept"
"""Name of the values that a train step under `remat = "projections"` does not compute again."""

# At most so many blocks, of no fewer queries, and of whole vectors of an accelerator.
_BLOCKS, _LEAST, _MULTIPLE = 4, 96, 16
_UNSEEN = -1e30  # finite: what comes of a query that sees nothing is arbitrary, and no NaN

_Kept = tuple[Array, Array, Array, Array, Array, Array]


def blocked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B 1 T T"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, softmax in float32; queries without a visible key stay finite.

    Args:
        query: of every token.
        key: the same.
        value: the same.
        mask: true where a query attends to a key, which must be at its own place or before it.
    """
    return _attention(matmul_precision(), query, key, value, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@at_precision
def _attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
    return _forward(query, key, value, mask)[0]


def _forward(query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, _Kept]:
    queries, keys, values = _grouped(query, key.shape[2]), _by_head(key), _by_head(value)
    mixed, totals = [], []
    for start, end in _blocks(query.shape[1]):
        scores = _scores(queries[..., start:end, :], keys[..., :end, :], mask[..., start:end, :end])
        most = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed.append(_product(weights.astype(value.dtype), values[..., :end, :]) / total)
        totals.append((most + jnp.log(total))[..., 0])
    out = _as_rows(jnp.concatenate(mixed, axis=3)).astype(query.dtype)
    # Named here, or the backward pass would compute them again to have them.
    out = checkpoint_name(out, KEPT)
    log_total = checkpoint_name(jnp.concatenate(totals, axis=3), KEPT)
    return out, (query, key, value, mask, out, log_total)


def _backward(kept: _Kept, slope: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, mask, out, log_total = kept
    queries, keys, values = _grouped(query, key.shape[2]), _by_head(key), _by_head(value)
    slopes = _grouped(slope, key.shape[2])
    # Of the softmax: what the weights' slopes are compared with.
    mean = jnp.sum(slopes.astype(jnp.float32) * _grouped(out, key.shape[2]), axis=-1)
    length = query.shape[1]
    of_queries, of_keys, of_values = [], [], []
    for start, end in _blocks(length):
        own, own_slope = queries[..., start:end, :], slopes[..., start:end, :]
        scores = _scores(own, keys[..., :end, :], mask[..., start:end, :end])
        weights = jnp.exp(scores - log_total[..., start:end, None])
        change = _product(own_slope, values[..., :end, :].swapaxes(-1, -2))
        change = weights * (change - mean[..., start:end, None]) * query.shape[-1] ** -0.5
        change = change.astype(query.dtype)
        of_queries.append(_product(change, keys[..., :end, :]))
        of_keys.append(_across(own, change, length))
        of_values.append(_across(own_slope, weights.astype(query.dtype), length))
    return (
        _as_rows(jnp.concatenate(of_queries, axis=3)).astype(query.dtype),
        sum(of_keys[1:], of_keys[0]).transpose(0, 3, 1, 2).astype(key.dtype),
        sum(of_values[1:], of_values[0]).transpose(0, 3, 1, 2).astype(value.dtype),
        None,
    )


_attention.defvjp(at_precision(_forward), at_precision(_backward))


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where each block of queries begins and ends."""
    number = max(min(_BLOCKS, length // _LEAST), 1)
    size = _MULTIPLE * -(-length // (number * _MULTIPLE))
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _grouped(x: Float[Array, "B T N H"], groups: int) -> Float[Array, "B K G T H"]:
    """Queries by key-value head."""
    return x.reshape(*x.shape[:2], groups, -1, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _by_head(x: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
    return x.transpose(0, 2, 1, 3)


def _as_rows(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    """`_grouped` undone."""
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _scores(
    queries: Float[Array, "B K G Q H"], keys: Float[Array, "B K S H"], mask: Bool[Array, "B 1 Q S"]
) -> Float[Array, "B K G Q S"]:
    scores = _product(queries, keys.swapaxes(-1, -2)) * queries.shape[-1] ** -0.5
    return jnp.where(mask[:, :, None], scores, _UNSEEN)


def _product(
    left: Float[Array, "B K G Q I"], right: Float[Array, "B K I J"]
) -> Float[Array, "B K G Q J"]:
    """Of all queries that share a key-value head in one product, summed in float32."""
    merged = left.reshape(*left.shape[:2], -1, left.shape[-1])
    found = jnp.matmul(merged, right, preferred_element_type=jnp.float32)
    return found.reshape(*left.shape[:4], -1)


def _across(
    left: Float[Array, "B K G Q H"], right: Float[Array, "B K G Q S"], length: int
) -> Float[Array, "B K H T"]:
    """Sums over queries of `left ⊗ right`, summed in float32, with zeros for later keys."""
    left, right = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (left, right))
    found = jnp.matmul(left.swapaxes(-1, -2), right, preferred_element_type=jnp.float32)
    return jnp.pad(found, ((0, 0),) * 3 + ((0, length - found.shape[-1]),))
