"""Rotary position embeddings and attention, the two places where positions enter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rotary_tables(
    positions: Int[Array, "B T"], frequencies: Float[Array, "H2"], factor: float
) -> tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]:
    """Cosines and sines for `positions`, in float32 whatever the model's dtype."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 H2"], sin: Float[Array, "B T 1 H2"]
) -> Float[Array, "B T N H"]:
    """Applies rotary embeddings in the half-split layout of Hugging Face checkpoints."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_mask(
    query_slots: Int[Array, "T"], key_mask: Bool[Array, "B S"], window: Int[Array, ""] | None
) -> Bool[Array, "B 1 T S"]:
    """Which keys each query sees: real ones, not after it, and within the window.

    Slots are columns of the padded sequence. Distances between real tokens are the same in slots
    as in positions, so one mask serves left and right padding.
    """
    key_slots = jnp.arange(key_mask.shape[1])
    distance = query_slots[:, None] - key_slots[None, :]  # [T, S]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return visible[None, None] & key_mask[:, None, None, :]


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention with softmax in float32. Rows that see nothing come out finite."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask)
