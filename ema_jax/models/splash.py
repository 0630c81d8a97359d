"""Splash attention of whole and of packed rows: JAX's kernel for TPUs, which stores no scores."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ema_jax.models.sharding import AXES, BATCH, batch_multiple

_LANES = 128  # of a TPU's vectors: blocks are multiples of it
_LEAST = 1024  # tokens of a row
_BLOCK = 512  # queries by keys at a time; what MaxText takes, of whatever TPU


def faster_by_splash(platform: str, dtype: Any, head_dim: int, length: int) -> bool:
    """Whether attention is splash's: on a TPU where it can, from 1,024 tokens on.

    Compiled for a v5e and not run: below, XLA keeps the scores of a few rows on the chip, and at
    512 tokens its cycles are those of the kernel (docs/scaling.md).
    """
    able = platform == "tpu" and dtype == jnp.bfloat16 and head_dim % _LANES == 0
    return able and length >= _LEAST


def platform_of(mesh: Any) -> str:
    """Platform of the devices that an array's (abstract) mesh is of: `cpu`, `gpu` or `tpu`."""
    device = getattr(mesh, "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def divides(mesh: Any, rows: int, heads: int) -> bool:
    """Whether each device of an array's mesh has whole rows and whole groups of heads."""
    if mesh.size <= 1:
        return True
    return mesh.axis_names == AXES and not (
        rows % batch_multiple(mesh) or heads % mesh.shape["tensor"]
    )


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    *,
    kept: str,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal grouped-query attention on the devices of the arrays' mesh, each with its own rows.

    Args:
        query: of every token.
        key: the same.
        value: the same.
        segments: of packed rows, as `causal_mask` takes them, in ascending order. Padding sees the
            example before it, and not all of them.
        kept: name under which the results and their normalisers are known to `jax.checkpoint`:
            with both the backward pass need not run the kernel again.
        interpret: run the kernel as XLA's operations, on any device.
    """
    mesh = jax.typeof(query).sharding.mesh
    length = query.shape[1]
    block, whole = _blocks(length)

    def laid_out(x: Float[Array, "B T N H"]) -> Float[Array, "B N S H"]:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, whole - length), (0, 0)))

    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    operands: list[Any] = [laid_out(x) for x in (scaled, key, value)]
    if segments is not None:
        keys = jnp.pad(segments, ((0, 0), (0, whole - length)))
        # A token of no example is a key of none, and as a query sees the last one. Before the
        # first there is none, and it sees its like: every query sees a key.
        operands += [jax.lax.cummax(keys, axis=1), keys]
    options = {"block": block, "kept": kept, "interpret": interpret}
    run: Callable[..., Array] = functools.partial(_kernel, **options)  # type: ignore[arg-type]
    if mesh.size > 1:
        heads = P(*BATCH, "tensor")
        specs = (heads,) * 3 + (BATCH,) * (len(operands) - 3)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return run(*operands)[:, :, :length].transpose(0, 2, 1, 3)


def _blocks(length: int) -> tuple[int, int]:
    """Size of a block, and the length of a whole number of them with little to spare."""
    count = math.ceil(length / _BLOCK)
    block = _LANES * math.ceil(length / count / _LANES)
    return block, count * block


def _kernel(
    query: Float[Array, "B N S H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    *ids: Int[Array, "B S"],
    block: int,
    kept: str,
    interpret: bool,
) -> Float[Array, "B N S H"]:
    """The kernel on one device's rows; `ids` are those of queries and of keys, or none."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, heads, length, _ = query.shape
    # In a single block both gradients come of one pass. Of more, each would leave a summand of the
    # queries' as large as these, which is more to write than the second pass has to read.
    fused = length == block
    apart = None if fused else block
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=apart,
        block_kv_dq=apart,
        use_fused_bwd_kernel=fused,
    )
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=kept,
        interpret=interpret,
    )
    if ids:
        return jax.vmap(lambda q, k, v, *own: kernel(q, k, v, splash.SegmentIds(*own)))(
            query, key, value, *ids
        )
    return jax.vmap(kernel)(query, key, value)
