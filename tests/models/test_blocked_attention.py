"""Attention in blocks of queries against JAX's, outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ema_jax.models.attention import causal_mask
from ema_jax.models.blocked_attention import KEPT, blocked_attention


def drawn(length: int, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """Queries of four heads, keys and values of two, and slopes of what comes out."""
    shapes = [(3, length, heads, 16) for heads in (4, 2, 2, 4)]
    keys = jax.random.split(jax.random.key(length), len(shapes))
    return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))


def masks(length: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Which keys a query sees, and the real tokens, of packed, windowed and padded rows."""
    places = jnp.broadcast_to(jnp.arange(length), (3, length))
    segments = jnp.stack([places[0] // n + 1 for n in (length, 70, 9)])
    segments = jnp.where(places < length - 8, segments, 0)
    real = jnp.where(segments > 0, places, -1)
    left = jnp.maximum(places - jnp.array([[0], [5], [length - 3]]), -1)
    return {
        "packed": (causal_mask(places, real, None, segments), real >= 0),
        "windowed": (causal_mask(places, real, 11), real >= 0),
        "left-padded": (causal_mask(jnp.maximum(left, 0), left, None), left >= 0),
    }


@functools.partial(jax.jit, static_argnums=0)
def gradients(attention, mask: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """What comes out, and the slopes of queries, keys and values."""
    *own, slope = arrays
    out, pull = jax.vjp(lambda *x: attention(*x, mask), *own)
    return out, *pull(slope)


def theirs(query, key, value, mask):
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


@pytest.mark.parametrize("length", [40, 203, 401])  # one block, two, four of unequal size
@pytest.mark.parametrize("rows", ["packed", "windowed", "left-padded"])
def test_it_is_jax_attention(length, rows):
    mask, real = masks(length)[rows]
    *own, slope = drawn(length)
    arrays = (mask, *own, slope * real[..., None, None])
    (out, *slopes), (expected, *others) = (
        gradients(f, *arrays) for f in (blocked_attention, theirs)
    )
    # What comes of padding nobody reads: it is arbitrary, and finite.
    assert jnp.isfinite(out).all()
    np.testing.assert_allclose(out[real], expected[real], atol=2e-5)
    for ours, other in zip(slopes, others, strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-5)


def test_bfloat16_is_as_near_to_float32_as_jax_attention_is():
    mask = masks(203)["packed"][0]
    exact = gradients(theirs, mask, *drawn(203))
    narrow = [x.astype(jnp.bfloat16) for x in drawn(203)]
    ours, other = (gradients(f, mask, *narrow) for f in (blocked_attention, theirs))
    for mine, jaxs, true in zip(ours, other, exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        errors = [float(jnp.abs(x.astype(jnp.float32) - true).mean()) for x in (mine, jaxs)]
        assert errors[0] <= 1.1 * errors[1]


def test_under_remat_the_forward_pass_runs_once():
    """Two products forwards, and backwards the scores again and four slopes."""
    *own, slope = (x[None] for x in drawn(40))  # of a stack of layers
    mask = masks(40)["packed"][0]
    kept = jax.checkpoint_policies.save_only_these_names(KEPT)
    layer = jax.checkpoint(functools.partial(blocked_attention, mask=mask), policy=kept)

    def total(*own: jax.Array) -> jax.Array:
        return jnp.sum(slope * jax.lax.scan(lambda carry, x: (carry, layer(*x)), 0, own)[1])

    program = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    assert program.lower(*own).compile().as_text().count(" dot(") == 7
