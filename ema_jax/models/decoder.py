"""One decoder for every family: blocks stacked on a leading layer axis, applied by a scan.

The scan's outputs are the capture: `tap` is applied to the residual stream entering each block, and
its results come out of the ordinary forward pass, stacked over layers, with no hooks and no cache
of activations. Layer convention (DESIGN): index 0 = embeddings, l = residual entering block l,
L = after the last block and before the final norm. Only decoding, one token at a time,
unrolls the layers (`advance`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ema_jax.models.attention import (
    attend,
    attend_cached,
    causal_mask,
    positions_within,
    rotary_tables,
    rotate,
)
from ema_jax.models.blocked_attention import KEPT
from ema_jax.models.cache import KVCache
from ema_jax.models.config import DecoderConfig, rope_frequencies
from ema_jax.models.sharding import (
    at_precision,
    exact,
    matmul_precision,
    product,
    vocabulary_product,
)

NO_WINDOW = np.iinfo(np.int32).max


class LoRAParam(nnx.Param):
    """A trainable low-rank factor; `nnx.split` by this type separates adapters from the base."""


class DropoutKey(nnx.Variable):
    """A random key per layer, for the dropout before an adapter in one training forward pass."""


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
        # backward pass, which makes a training step 1.5 times as slow.
        rows = x.reshape(-1, x.shape[-1])
        y = product(rows, self.kernel[...])
        if self.bias is not None:
            y += self.bias[...]
        if self.lora_a is not None and self.lora_b is not None:
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            if self.dropout_key is not None:
                keep = jax.random.bernoulli(self.dropout_key[...], 1 - self.dropout, rows.shape)
                rows = jnp.where(keep, rows / (1 - self.dropout), 0.0)
            # Scaled while narrow: wide, its gradient would be one more array as large as `y`.
            y += (_narrowed(matmul_precision(), rows, a) * self.lora_scale) @ b
        return checkpoint_name(y, KEPT).reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@at_precision
def _narrowed(rows: Float[Array, "R I"], a: Float[Array, "I r"]) -> Float[Array, "R r"]:
    """`rows @ a`; on a CPU the gradient of `a` takes a seventh of the time of JAX's own.

    As it is laid out: XLA's product of this shape, contracted over rows, is slow if it is tall.
    """
    return rows @ a


def _narrowed_forward(rows: Array, a: Array) -> tuple[Array, tuple[Array, Array]]:
    return rows @ a, (rows, a)


def _narrowed_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    rows, a = kept
    # The barrier, as XLA would exchange the factors to be rid of the transpose.
    return slope @ a.T, jax.lax.optimization_barrier(slope.T @ rows).T


_narrowed.defvjp(at_precision(_narrowed_forward), at_precision(_narrowed_backward))


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return self.scale[...] * wide.astype(x.dtype)


class Output(NamedTuple):
    """Results of a forward pass."""

    hidden: Float[Array, "B T D"]  # after the final norm: input of the head
    taps: Any  # `tap` of the residual stream, stacked `[L + 1, …]`; None without a tap
    branches: Any  # `tap` of what attention and MLP add: a pair, each stacked `[L, …]`
    keys_values: Any  # a pair `[L, B, T, K, H]` for a cache; None unless requested


class Block(nnx.Module):
    """One pre-norm decoder block: attention, then a gated MLP. Names follow PEFT's targets."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c, sizes = config, config.projections
        self.input_norm = RMSNorm(c.hidden_size, c.norm_epsilon)
        self.q_proj = Linear(*sizes["q_proj"], rngs, bias=c.qkv_bias)
        self.k_proj = Linear(*sizes["k_proj"], rngs, bias=c.qkv_bias)
        self.v_proj = Linear(*sizes["v_proj"], rngs, bias=c.qkv_bias)
        self.o_proj = Linear(*sizes["o_proj"], rngs)
        self.q_norm = nnx.data(RMSNorm(c.head_dim, c.norm_epsilon) if c.qk_norm else None)
        self.k_norm = nnx.data(RMSNorm(c.head_dim, c.norm_epsilon) if c.qk_norm else None)
        self.post_norm = RMSNorm(c.hidden_size, c.norm_epsilon)
        self.gate_proj = Linear(*sizes["gate_proj"], rngs)
        self.up_proj = Linear(*sizes["up_proj"], rngs)
        self.down_proj = Linear(*sizes["down_proj"], rngs)
        self.head_dim = c.head_dim

    def queries_keys_values(
        self, x: Float[Array, "B T D"], cos: Array, sin: Array
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries and keys (projected, normalised, rotated) and values."""
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
        """Residual stream leaving the block, and what attention and MLP added to it."""
        attention = self.o_proj(mixed.reshape(*x.shape[:2], -1))
        x += attention
        mlp = self.mlp(x)
        return x + mlp, attention, mlp

    def mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Gated MLP of the normalised residual stream."""
        x = self.post_norm(x)
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


Layers = Sequence[tuple[Block, Callable[[Array], Array] | None]]
"""Blocks with their edits, one pair per layer."""


class Decoder(nnx.Module):
    """Token embeddings, `L` stacked blocks, a final norm and a head.

    Build it abstractly (`nnx.eval_shape`) and fill it from a checkpoint, or call it with
    `nnx.Rngs` for random weights.

    Attributes:
      edit: an intervention, as a callable pytree whose leaves lead with `L + 1`: entry l changes
        the residual stream entering block l (L: leaving the last block) before it is tapped, as
        a scan input. None costs nothing.
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

    @exact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        *,
        right_padded: bool = False,
        segments: Int[Array, "B T"] | None = None,
        continued: Int[Array, "B T"] | None = None,
        return_keys_values: bool = False,
        tap: Callable[[Float[Array, "B T D"]], Any] | None = None,
        tap_branches: bool = False,
        remat: bool | str = False,
    ) -> Output:
        """Runs the decoder.

        Args:
            tokens: ids; arbitrary where padded.
            mask: true at real tokens. Padding may be on the left or on the right.
            right_padded: padding is on the right, and nothing reads what comes of it: a faster
                attention may be used.
            segments: for packed rows, the example of each token: positions start again with each,
                and none sees another.
            continued: the segment of its row that each token's segment continues, which it sees,
                and from whose length its positions start; 0 for none.
            return_keys_values: also return every layer's keys and values, for a cache.
            tap: applied to the residual stream entering each block and to the one leaving the
                last; its results are stacked over `L + 1`.
            tap_branches: also apply it to what attention and MLP add to the stream.
            remat: recompute the blocks in the backward pass instead of storing activations;
                "projections" stores their projections and what attention mixes.
        """
        c = self.config
        if segments is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        else:
            positions = positions_within(segments, continued)
        key_positions = jnp.where(mask, positions, -1)
        cos, sin = self._rotary(positions)

        def visible_in(window: Int[Array, ""] | None) -> Bool[Array, "B 1 T T"]:
            return causal_mask(positions, key_positions, window, segments, continued)

        # A window that no row fills hides nothing.
        windowed = any(window is not None and window < tokens.shape[1] for window in c.windows)
        causal = right_padded and segments is None and not windowed
        alone = None if windowed or continued is not None else segments
        shared = None if windowed else visible_in(None)

        def step(x: Float[Array, "B T D"], layer: tuple) -> tuple[Float[Array, "B T D"], tuple]:
            block, window, change = layer
            x = x if change is None else change(x)
            tapped = None if tap is None else tap(x)
            query, key, value = block.queries_keys_values(x, cos, sin)
            visible = visible_in(window) if shared is None else shared
            packed = segments is not None
            mixed = attend(query, key, value, visible, causal=causal, packed=packed, segments=alone)
            x, *added = block.add_branches(x, mixed)
            branches = None if tap is None or not tap_branches else tuple(map(tap, added))
            return x, (tapped, branches, (key, value) if return_keys_values else None)

        x = self.embed[...][tokens]
        # Without an intervention these are empty trees, which cost nothing.
        inner = jax.tree.map(lambda leaf: leaf[:-1], self.edit)
        last = jax.tree.map(lambda leaf: leaf[-1], self.edit)
        kept = jax.checkpoint_policies.save_only_these_names(KEPT)
        policy = kept if remat == "projections" else None
        body = jax.checkpoint(step, policy=policy) if remat else step
        layers = (self.blocks, self._windows(), inner)
        x, (taps, branches, keys_values) = jax.lax.scan(body, x, layers)
        x = x if last is None else last(x)
        if tap is not None:
            taps = jax.tree.map(
                lambda inside, last: jnp.concatenate([inside, last[None]]), taps, tap(x)
            )
        return Output(self.final_norm(x), taps, branches, keys_values)

    def layers(self) -> Layers:
        """Blocks and edits, unstacked, for `advance`.

        A second copy of the blocks' weights for as long as it is held, which matters where they
        fill more than about half of the devices' memory (14 GB at 7B, bfloat16).
        """
        stacks = (self.blocks, self.edit)
        return [
            jax.tree.map(lambda leaf, i=i: leaf[i], stacks) for i in range(self.config.num_layers)
        ]

    @exact
    def advance(
        self,
        tokens: Int[Array, "B"],
        cache: KVCache,
        layers: Layers,
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """Decodes one token per row: its hidden state for the head, and the extended cache.

        The loop over layers is unrolled, and they are unstacked (`layers`) before the loop over
        tokens: a scan would copy each layer's weights and cache out of their stacks at every step,
        which for a single token takes as long as the products do.
        """
        positions = jnp.max(cache.positions, axis=1, keepdims=True) + 1
        seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.next))
        # From a table, as XLA's CPU backend would recompute them for every head of every layer; a
        # position is below the number of slots, or its row would not fit in the ring.
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

    @exact
    def run_blocks(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        first: int | Int[Array, ""],
        last: int | Int[Array, ""],
    ) -> Float[Array, "B T D"]:
        """Residual stream entering block `last`, from the one entering block `first`.

        The bounds may be traced: one compiled program runs any range of blocks, at the cost of
        that range alone.
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
        """Attention window of each layer, in tokens."""
        return jnp.array([NO_WINDOW if w is None else w for w in self.config.windows], jnp.int32)

    @exact
    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32 of hidden states after the final norm."""
        head = self.embed[...].T if self.head is None else self.head[...]
        return vocabulary_product(hidden, head)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The initialisation of the supported families: normal with standard deviation 0.02."""
    return 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
