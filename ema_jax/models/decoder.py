"""One decoder for every family: blocks stacked on a leading layer axis, applied by a scan.

The scan's outputs are the capture: whatever `tap` makes of the residual stream that enters each
block comes out of the ordinary forward pass, stacked over layers, with no hooks and no cache of
activations. Layer convention (DESIGN): index 0 = embeddings, l = residual entering block l,
L = after the last block and before the final norm. Only decoding, a token at a time, writes the
layers out (`advance`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ema_jax.models.attention import attend, attend_cached, causal_mask, rotary_tables, rotate
from ema_jax.models.config import DecoderConfig, rope_frequencies
from ema_jax.models.sharding import product, vocabulary_product

NO_WINDOW = np.iinfo(np.int32).max


class LoRAParam(nnx.Param):
    """A trainable low-rank factor; `nnx.split` by this type separates adapters from the base."""


class DropoutKey(nnx.Variable):
    """A random key a layer, for the dropout before an adapter in one forward pass of training."""


class Linear(nnx.Module):
    """`x @ kernel + bias`, plus `scale · (x @ a) @ b` where an adapter is attached."""

    def __init__(self, size_in: int, size_out: int, rngs: nnx.Rngs, *, bias: bool = False):
        self.kernel = nnx.Param(_normal(rngs, (size_in, size_out)))
        self.bias = nnx.data(nnx.Param(jnp.zeros(size_out)) if bias else None)
        self.lora_a: LoRAParam | None = nnx.data(None)
        self.lora_b: LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0
        self.dropout_key: DropoutKey | None = nnx.data(None)
        self.dropout = 0.0

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Projects the last axis."""
        # Two-dimensional products: XLA's CPU backend transposes three-dimensional ones in the
        # backward pass, which makes a training step half as fast again.
        rows = x.reshape(-1, x.shape[-1])
        y = product(rows, self.kernel[...])
        if self.bias is not None:
            y += self.bias[...]
        if self.lora_a is not None and self.lora_b is not None:
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            if self.dropout_key is not None:
                keep = jax.random.bernoulli(self.dropout_key[...], 1 - self.dropout, rows.shape)
                rows = jnp.where(keep, rows / (1 - self.dropout), 0.0)
            y += (rows @ a) @ b * self.lora_scale
        return y.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Norms the last axis."""
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return self.scale[...] * wide.astype(x.dtype)


class KVCache(NamedTuple):
    """Keys and values of every layer, in a ring of slots that all rows write at one place.

    What a slot holds is told by its position alone, so rows may begin at different times, and a
    slot may be written again once what it holds is no longer wanted.
    """

    keys: tuple[Float[Array, "B K H S"], ...]  # of every layer
    values: tuple[Float[Array, "B K S H"], ...]
    positions: Int[Array, "B S"]  # in the row's sequence; below zero: no token
    next: Int[Array, ""]  # the slot written next

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int, dtype: Any) -> "KVCache":
        """A cache with room for `slots` tokens a row."""
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
        """Puts what a forward pass kept in place of `rows`, as if it had just been written.

        A row that is not there (its index is past the last) is left out.
        """
        slots, length = self.positions.shape[1], mask.shape[1]

        def placed(x: Array, axis: int, empty: int) -> Array:
            pads = [(0, slots - length) if i == axis else (0, 0) for i in range(x.ndim)]
            padded = jnp.pad(x, pads, constant_values=empty)
            return jnp.roll(padded, self.next - length, axis)

        # Which of the new rows each row takes. Choosing by it is one pass over the cache, little
        # beside the forward pass; a scatter into every layer would take longer to compile.
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


class Output(NamedTuple):
    """What a forward pass gives."""

    hidden: Float[Array, "B T D"]  # after the final norm: what the head reads
    taps: Any  # what `tap` made of the residual stream, stacked `[L + 1, …]`; None without one
    branches: Any  # the same of what attention and MLP add: a pair, stacked `[L, …]`
    kept: Any  # keys and values `[L, B, T, K, H]` for a cache; None unless asked for


class Block(nnx.Module):
    """One pre-norm decoder block: attention, then a gated MLP. Names follow PEFT's targets."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = config
        attention, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.input_norm = RMSNorm(c.hidden_size, c.norm_epsilon)
        self.q_proj = Linear(c.hidden_size, attention, rngs, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv, rngs, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv, rngs, bias=c.qkv_bias)
        self.o_proj = Linear(attention, c.hidden_size, rngs)
        self.q_norm = nnx.data(RMSNorm(c.head_dim, c.norm_epsilon) if c.qk_norm else None)
        self.k_norm = nnx.data(RMSNorm(c.head_dim, c.norm_epsilon) if c.qk_norm else None)
        self.post_norm = RMSNorm(c.hidden_size, c.norm_epsilon)
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, rngs)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, rngs)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, rngs)
        self.head_dim = c.head_dim

    def queries_keys_values(
        self, x: Float[Array, "B T D"], cos: Array, sin: Array
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Projected, normed and rotated queries and keys, and the values."""
        x = self.input_norm(x)
        shape = (*x.shape[:2], -1, self.head_dim)
        query = self.q_proj(x).reshape(shape)
        key = self.k_proj(x).reshape(shape)
        value = self.v_proj(x).reshape(shape)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def add_branches(
        self, x: Float[Array, "B T D"], mixed: Float[Array, "B T N H"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Float[Array, "B T D"]]:
        """The residual stream that leaves the block, and what attention and MLP added to it."""
        attention = self.o_proj(mixed.reshape(*x.shape[:2], -1))
        x += attention
        mlp = self.mlp(x)
        return x + mlp, attention, mlp

    def mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The gated MLP on the normed residual."""
        x = self.post_norm(x)
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


Layers = Sequence[tuple[Block, Callable[[Array], Array] | None]]  # each with its edit


class Decoder(nnx.Module):
    """Token embeddings, `L` stacked blocks, a final norm and a head.

    Build it abstractly (`nnx.eval_shape`) and fill it from a checkpoint, or call it with
    `nnx.Rngs` for random weights.

    Attributes:
      edit: an intervention, as a callable pytree whose leaves lead with `L + 1`: entry l changes
        the residual stream entering block l (and L the one that leaves the last) before it is
        tapped, as a scan input. None costs nothing.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Param(_normal(rngs, (config.vocab_size, config.hidden_size)))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.edit: Callable[[Array], Array] | None = nnx.data(None)
        self.head = nnx.data(
            None
            if config.tied_embeddings
            else nnx.Param(_normal(rngs, (config.hidden_size, config.vocab_size)))
        )

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        mask: Bool[Array | np.ndarray, "B T"],
        *,
        keep: bool = False,
        tap: Callable[[Float[Array, "B T D"]], Any] | None = None,
        tap_branches: bool = False,
        remat: bool | str = False,
    ) -> Output:
        """Runs the decoder.

        Args:
            tokens: ids; anything at padded places.
            mask: true at real tokens. Padding may be on the left or on the right.
            keep: also return every layer's keys and values, for a cache.
            tap: applied to the residual stream entering each block and to the one leaving the
                last; its results come back stacked over `L + 1`.
            tap_branches: apply it to what attention and MLP add to the stream, too.
            remat: recompute the blocks in the backward pass in place of keeping activations;
                "dots" keeps the products with weights.
        """
        c = self.config
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        key_positions = jnp.where(mask, positions, -1)
        cos, sin = self._rotary(positions)
        windowed = any(window is not None for window in c.windows)
        shared = None if windowed else causal_mask(positions, key_positions, None)

        def step(x: Float[Array, "B T D"], layer: tuple) -> tuple[Float[Array, "B T D"], tuple]:
            block, window, change = layer
            x = x if change is None else change(x)
            tapped = None if tap is None else tap(x)
            query, key, value = block.queries_keys_values(x, cos, sin)
            visible = causal_mask(positions, key_positions, window) if shared is None else shared
            x, *added = block.add_branches(x, attend(query, key, value, visible))
            branches = None if tap is None or not tap_branches else tuple(map(tap, added))
            return x, (tapped, branches, (key, value) if keep else None)

        x = self.embed[...][tokens]
        # Without an intervention these are empty trees, which cost nothing.
        inner = jax.tree.map(lambda leaf: leaf[:-1], self.edit)
        last = jax.tree.map(lambda leaf: leaf[-1], self.edit)
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(step, policy=policy if remat == "dots" else None) if remat else step
        layers = (self.blocks, self._windows(), inner)
        x, (taps, branches, kept) = jax.lax.scan(body, x, layers)
        x = x if last is None else last(x)
        if tap is not None:
            taps = jax.tree.map(
                lambda inside, last: jnp.concatenate([inside, last[None]]), taps, tap(x)
            )
        return Output(self.final_norm(x), taps, branches, kept)

    def layers(self) -> Layers:
        """The blocks and edits, each by itself, for `advance`.

        That is a second copy of the blocks' weights for as long as it is held, which matters where
        they fill more than about half of the devices' memory (14 GB at 7B, bfloat16).
        """
        stacks = (self.blocks, self.edit)
        return [
            jax.tree.map(lambda leaf, i=i: leaf[i], stacks) for i in range(self.config.num_layers)
        ]

    def advance(
        self,
        tokens: Int[Array, "B"],
        cache: KVCache,
        layers: Layers,
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """One more token a row: what the head reads there, and the cache with it added.

        The layers are written out, and taken apart (`layers`) before the loop over tokens: a scan
        copies each one's weights and cache out of their stacks at every step, which for a single
        token takes as long as the products do.
        """
        positions = jnp.max(cache.positions, axis=1, keepdims=True) + 1
        seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.next))
        # From a table, for XLA's CPU backend would compute them anew for every head of every layer;
        # a position is below the number of slots, or its row would not fit in the ring.
        tables = self._rotary(jnp.arange(seen.shape[1])[None])
        cos, sin = (table[0, positions] for table in tables)
        x = self.embed[...][tokens[:, None]]
        keys, values = list(cache.keys), list(cache.values)
        for i, (block, change) in enumerate(layers):
            x = x if change is None else change(x)
            query, key, value = block.queries_keys_values(x, cos, sin)
            key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
            keys[i] = jax.lax.dynamic_update_slice_in_dim(keys[i], key, cache.next, 3)
            values[i] = jax.lax.dynamic_update_slice_in_dim(values[i], value, cache.next, 2)
            visible = causal_mask(positions, seen, self.config.windows[i])
            x, *_ = block.add_branches(x, attend_cached(query, keys[i], values[i], visible))
        last = jax.tree.map(lambda leaf: leaf[-1], self.edit)
        x = x if last is None else last(x)
        after = (cache.next + 1) % seen.shape[1]
        return self.final_norm(x[:, 0]), KVCache(tuple(keys), tuple(values), seen, after)

    def run_blocks(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        first: int | Int[Array, ""],
        last: int | Int[Array, ""],
    ) -> Float[Array, "B T D"]:
        """The residual stream entering block `last`, from the one entering block `first`.

        The bounds may be traced: one compiled program runs any stretch of blocks at its own price.
        """
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        key_positions = jnp.where(mask, positions, -1)
        cos, sin = self._rotary(positions)
        windows = self._windows()

        def step(index: Int[Array, ""], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            layers = (self.blocks, windows, self.edit)
            block, window, change = jax.tree.map(lambda leaf: leaf[index], layers)
            x = x if change is None else change(x)
            query, key, value = block.queries_keys_values(x, cos, sin)
            visible = causal_mask(positions, key_positions, window)
            return block.add_branches(x, attend(query, key, value, visible))[0]

        return jax.lax.fori_loop(first, last, step, x)

    def _rotary(self, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
        frequencies, factor = rope_frequencies(self.config)
        return rotary_tables(positions, jnp.asarray(frequencies), factor)

    def _windows(self) -> Int[Array, "L"]:
        """How far back each layer's attention reaches, in tokens."""
        return jnp.array([NO_WINDOW if w is None else w for w in self.config.windows], jnp.int32)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32 of hidden states after the final norm."""
        head = self.embed[...].T if self.head is None else self.head[...]
        return vocabulary_product(hidden, head)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The initialisation of the supported families: normal with standard deviation 0.02."""
    return 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
