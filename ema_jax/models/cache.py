"""The cache of keys and values that decoding reads and extends, one token at a time."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ema_jax.models.config import DecoderConfig
from ema_jax.runtime.devices import GIB, memory_gib

# Rows that decode at once, where the memory decides: 256 came to 70 % of the bandwidth at 7B on one
# H100, and more have little left to share; 64 were the fastest of 32 to 256 on a CPU.
_MOST_ROWS, _LEAST_ROWS, _CPU_ROWS = 256, 16, 64
_ROOM = 0.85  # share of the memory that an estimate may fill
# Of a row's keys and values: filling rows and a prompt pass hold copies (36 MB a row for 14.7 MB of
# them, measured there).
_COPIES = 2.5


class KVCache(NamedTuple):
    """Keys and values of every layer, in a ring of slots that all rows write at the same index.

    Positions alone say what a slot holds, so rows may start at different times, and a slot may be
    overwritten once its token is out of use.
    """

    keys: tuple[Float[Array, "B K H S"], ...]  # of every layer
    values: tuple[Float[Array, "B K S H"], ...]
    positions: Int[Array, "B S"]  # in the row's sequence; negative: empty slot
    next: Int[Array, ""]  # the slot written next

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int, dtype: Any) -> "KVCache":
        """An empty cache with room for `slots` tokens per row."""
        heads, layers = (batch, config.num_kv_heads), range(config.num_layers)
        return cls(
            tuple(jnp.zeros((*heads, config.head_dim, slots), dtype) for _ in layers),
            tuple(jnp.zeros((*heads, slots, config.head_dim), dtype) for _ in layers),
            jnp.full((batch, slots), -1, jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def insert(
        self,
        rows: Int[Array, "F"],
        keys: Float[Array, "L F T K H"],
        values: Float[Array, "L F T K H"],
        mask: Bool[Array, "F T"],
    ) -> "KVCache":
        """Replaces `rows` by the keys and values of a forward pass, as if just decoded.

        Rows whose index is past the last are dropped.
        """
        slots, length = self.positions.shape[1], mask.shape[1]

        def placed(x: Array, axis: int, empty: int) -> Array:
            pads = [(0, slots - length) if i == axis else (0, 0) for i in range(x.ndim)]
            padded = jnp.pad(x, pads, constant_values=empty)
            return jnp.roll(padded, self.next - length, axis)

        # The new row that replaces each row, or -1. Selecting by it is one pass over the cache,
        # cheap next to the forward pass; a scatter into every layer would take longer to compile.
        source = jnp.full(self.positions.shape[0], -1)
        source = source.at[rows].set(jnp.arange(rows.shape[0]), mode="drop")

        def put(into: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
            hit = jnp.expand_dims(source >= 0, tuple(range(1, into[0].ndim)))
            pairs = zip(into, x, strict=True)
            return tuple(jnp.where(hit, new[source], layer) for layer, new in pairs)

        positions = placed(jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1), 1, -1)
        (merged,) = put((self.positions,), positions[None])
        return KVCache(
            put(self.keys, placed(keys.transpose(0, 1, 3, 4, 2), 4, 0)),
            put(self.values, placed(values.transpose(0, 1, 3, 2, 4), 3, 0)),
            merged,
            self.next,
        )


def rows_that_fit(config: DecoderConfig, slots: int, dtype: Any, mesh: Mesh) -> int:
    """Rows of `slots` tokens that decode at once in the devices' memory, by an estimate.

    Beside them there are the weights, and those of the blocks once more (`Decoder.layers`).
    """
    device, itemsize = mesh.devices.flat[0], jnp.dtype(dtype).itemsize
    if device.platform == "cpu":
        return _CPU_ROWS
    blocks = config.num_layers * config.block_weights
    tables = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    left = _ROOM * memory_gib(device) * GIB - (2 * blocks + tables) * itemsize / split
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots * itemsize
    # What the devices along data and fsdp have room for together.
    fitting = int(
        left / (_COPIES * row / mesh.shape["tensor"]) * (mesh.size / mesh.shape["tensor"])
    )
    return min(max(fitting // _LEAST_ROWS * _LEAST_ROWS, _LEAST_ROWS), _MOST_ROWS)
