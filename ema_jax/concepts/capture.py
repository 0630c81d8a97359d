"""Pooled residual streams of every layer, out of the ordinary forward pass.

Pooling is a weighted sum over tokens inside the layer scan, so device memory is O(L·B·d) and no
logits are computed. Layer convention: `ema_jax.concepts.vectors.LAYER_CONVENTION`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import batch_rows, host_array, make_mesh, place_batch

Pooling = Callable[[int], Float[np.ndarray, "T"]]


def _last_token(length: int) -> Float[np.ndarray, "T"]:
    weights = np.zeros(length, np.float32)
    weights[-1] = 1
    return weights


def _prompt_mean(length: int) -> Float[np.ndarray, "T"]:
    weights = np.full(length, 1 / max(length - 1, 1), np.float32)
    if length > 1:
        weights[0] = 0
    return weights


POOLINGS: Mapping[str, Pooling] = {
    # The last token of the rendered prompt: what the response is predicted from.
    "last_token": _last_token,
    # All tokens but the first, which is an attention sink of huge norm.
    "prompt_mean": _prompt_mean,
}
"""Weights over the tokens of a rendered prompt of a given length, summing to one."""


@functools.partial(jax.jit, static_argnames=("graph",))
def _pooled(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    weights: Float[Array, "B P T"],
) -> Float[Array, "L1 B P D"]:
    def tap(x: Float[Array, "B T D"]) -> Float[Array, "B P D"]:
        return jnp.einsum(
            "bpt,btd->bpd", weights, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )

    return nnx.merge(graph, state)(tokens, mask, tap=tap).taps


def capture(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    poolings: Sequence[str] = ("last_token",),
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> dict[str, Float[np.ndarray, "N L1 D"]]:
    """Pooled residuals of every layer for every prompt, in float32.

    Args:
        model: with or without adapters.
        prompts: token ids of rendered prompts.
        poolings: names in `POOLINGS`, all from one pass.
        batch_size: rows at once, rounded up to what the mesh divides.
        mesh: what the model lies on.
    """
    from ema_jax.data.chat import bucket, length_batches

    mesh = make_mesh() if mesh is None else mesh
    rows = batch_rows(min(batch_size, max(len(prompts), 1)), mesh)
    graph, state = nnx.split(model)
    depth, width = model.config.num_layers + 1, model.config.hidden_size
    result = {name: np.empty((len(prompts), depth, width), np.float32) for name in poolings}
    for indices in length_batches([len(ids) for ids in prompts], rows):
        length = bucket(len(prompts[indices[0]]))
        tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        weights = np.zeros((rows, len(poolings), length), np.float32)
        for row, i in enumerate(indices):
            size = len(prompts[i])
            tokens[row, :size], mask[row, :size] = prompts[i], True
            for place, name in enumerate(poolings):
                weights[row, place, :size] = POOLINGS[name](size)
        placed = place_batch((tokens, mask, weights), mesh)
        taps = host_array(_pooled(graph, state, *placed))  # [L+1, B, P, D]
        for place, name in enumerate(poolings):
            result[name][indices] = taps[:, : len(indices), place].swapaxes(0, 1)
    return result
