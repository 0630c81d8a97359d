"""Rotary position embeddings, causal masks and grouped-query attention."""

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ema_jax.models.blocked_attention import KEPT, blocked_attention
from ema_jax.models.splash import divides, faster_by_splash, platform_of, splash_attention

_AMPERE, _HOPPER = (8, 0), (9, 0)


def rotary_tables(
    positions: Int[Array, "B T"], frequencies: Float[Array, "H2"], factor: float
) -> tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]:
    """Cosines and sines of `positions`, times `factor`, in float32 for every dtype of the model."""
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
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"],
    window: Int[Array, ""] | int | None,
    segments: Int[Array, "B T"] | None = None,
    continued: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B 1 T S"]:
    """True where a query attends to a key: a real token, not after it, within the window.

    Args:
        queries: positions in the sequence.
        keys: positions; negative where there is no token.
        window: tokens that a query attends to, itself included; None for all before it.
        segments: in packed rows, the example of each token, from 1: of query and key the same one.
            Padding, of segment 0, sees all before it, as it does without segments.
        continued: the segment that each token's own one continues, and so sees too; 0 for none.
    """
    distance = queries[:, :, None] - keys[:, None, :]  # [B, T, S]
    visible = (keys[:, None, :] >= 0) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    if segments is not None:
        own = segments[:, :, None]
        seen = (own == segments[:, None, :]) | (own == 0)
        if continued is not None:
            seen |= continued[:, :, None] == segments[:, None, :]
        visible &= seen
    return visible[:, None]


def positions_within(
    segments: Int[Array, "B T"], continued: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Positions of right-padded rows: each segment of equal numbers counts from zero.

    A segment that continues another one (see `causal_mask`) counts from that one's length. Padding,
    which is of segment zero, has the place in its segment of the last token before it.
    """
    places = jnp.arange(segments.shape[1])
    starts = (jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0) & (segments > 0)
    real = jnp.where(segments > 0, places, 0)
    first = jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
    positions = jax.lax.cummax(real, axis=1) - first
    if continued is None:
        return positions
    before = (continued[:, :, None] == segments[:, None, :]) & (continued > 0)[:, :, None]
    return positions + jnp.sum(before, axis=2)


def compute_capability() -> tuple[int, int]:
    """Compute capability of the first NVIDIA GPU, as in (9, 0); (0, 0) on any other device."""
    named = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    found = re.fullmatch(r"(\d+)\.(\d+)", named)  # an AMD GPU's is a name, such as gfx942
    return (int(found[1]), int(found[2])) if found else (0, 0)


def faster_by_cudnn(
    capability: tuple[int, int], dtype: Any, head_dim: int, length: int, *, masked: bool = False
) -> bool:
    """Whether attention is cuDNN's: where it can, and was measured faster.

    On an H100 and an H200 causal rows took half of XLA's time at 256 tokens, a fifth at 1,024 and a
    tenth at 4,096; packed rows, with their mask, 0.8, 0.4 and 0.4 (benchmarks/accelerators.md).
    cuDNN has none for cards before Ampere. With a mask, whose gradient it computes too, it was
    tried on Hopper alone.
    """
    able = capability >= (_HOPPER if masked else _AMPERE) and dtype in (jnp.bfloat16, jnp.float16)
    return able and head_dim % 8 == 0 and head_dim <= 128 and length >= 256


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B 1 T T"],
    *,
    causal: bool = False,
    packed: bool = False,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, softmax in float32; rows without a visible key stay finite.

    The one place where an implementation is chosen. What it mixes has the name `KEPT`.

    Args:
        query: of every token.
        key: the same.
        value: the same.
        mask: true where a query attends to a key; for a real token, to nothing after its own place.
            Padding's results are arbitrary.
        causal: the mask hides what comes after, and padding on the right. There causality hides
            padding from real tokens by itself, so that the mask need not be read; what padding
            gets is arbitrary.
        packed: rows of several examples, whose mask the faster attention takes too.
        segments: of packed rows whose mask hides other examples and what comes after, no more.

    Splash is taken on any number of TPUs, and for short rows there what XLA makes of JAX's own
    attention: as compiled for a v5e it takes fewer cycles than the blocks (docs/scaling.md). cuDNN
    is taken on one GPU alone, as that is where it was tried: with rows on several, XLA would have
    to split it.
    """
    mesh = jax.typeof(query).sharding.mesh
    platform, about = platform_of(mesh), (query.dtype, query.shape[3], query.shape[1])
    if (
        (causal or segments is not None)
        and faster_by_splash(platform, *about)
        and divides(mesh, key.shape[0], key.shape[2])
    ):
        return splash_attention(query, key, value, segments, kept=KEPT)
    seen: dict[str, Any] = {"mask": mask}
    fast = (
        (causal or packed)
        and mesh.size <= 1
        and faster_by_cudnn(compute_capability(), *about, masked=not causal)
    )
    if fast and causal:
        seen = {"is_causal": True}
    if fast or platform == "tpu":
        by: Literal["cudnn", "xla"] = "cudnn" if fast else "xla"
        mixed = jax.nn.dot_product_attention(query, key, value, **seen, implementation=by)
        return checkpoint_name(mixed, KEPT)
    return blocked_attention(query, key, value, mask)


def attend_cached(
    query: Float[Array, "B 1 N H"],
    keys: Float[Array, "B K H S"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "B 1 1 S"],
) -> Float[Array, "B 1 N H"]:
    """`attend` of one query per row, over keys and values in the layout of a cache.

    In this layout both products are of row-major matrices, which a CPU multiplies without
    transposing keys and values at every step.
    """
    grouped = query.reshape(*keys.shape[:2], -1, query.shape[-1])  # [B, K, N/K, H]
    scores = jnp.matmul(grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.matmul(weights, values).reshape(query.shape)
