"""Log-probabilities of given responses, and by them the reference model as numbers.

Everything that asks for them (the reference, the screening of answers, the curve over a response's
first tokens) runs one program: examples are packed into rows of one length, so many at once.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ema_jax.data.batching import map_batches
from ema_jax.data.chat import TokenExample
from ema_jax.data.packing import fit, lay_out
from ema_jax.models import lora
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import make_mesh, on_cpu
from ema_jax.unlearning.log_probs import token_log_probs

# Rows are of this many tokens, or of the next power of two that the longest example needs.
_LENGTH = 128
# Tokens of a pass: enough to keep the device busy, few enough that a small call wastes little.
_TOKENS, _TOKENS_CPU = 1 << 14, 1 << 11


@functools.partial(jax.jit, static_argnames="graph")
def _token_log_probs(
    graph: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B next"]:
    return token_log_probs(nnx.merge(graph, state), tokens, segments > 0, segments=segments)


def pass_shape(longest: int, mesh: Mesh) -> tuple[int, int]:
    """Most rows of a forward pass, and their length, for examples of at most so many tokens."""
    length = max(_LENGTH, 1 << (longest - 1).bit_length())
    return max((_TOKENS_CPU if on_cpu(mesh) else _TOKENS) // length, 1), length


def response_log_probs(
    model: Decoder,
    examples: Sequence[TokenExample],
    *,
    batch_size: int = 0,
    mesh: Mesh | None = None,
) -> list[Float[np.ndarray, "_"]]:
    """log π of every token of every response, in nats.

    Args:
        model: with or without adapters.
        examples: prompts with responses.
        batch_size: most rows at once, each of several examples; 0 for what the device likes.
        mesh: the mesh that the model lies on.
    """
    if not examples:
        return []
    mesh = make_mesh() if mesh is None else mesh
    graph, state = nnx.split(lora.folded(model))
    most, length = pass_shape(max(item.size for item in examples), mesh)
    rows = min(batch_size or most, most)
    filled = fit([item.size for item in examples], length)
    filled += [[] for _ in range(-len(filled) % rows)]  # so that all batches are of one size
    found: list[np.ndarray] = [np.empty(0, np.float32)] * len(examples)

    def laid_out(chosen: Sequence[Sequence[int]], length: int, number: int) -> Any:
        return lay_out([[examples[i] for i in row] for row in chosen], length, number)

    for places, log_probs in map_batches(
        lambda batch: _token_log_probs(graph, state, *batch),
        filled,
        laid_out,
        batch_size=rows,
        mesh=mesh,
        length=lambda row: length,
    ):
        for row, values in zip(places, log_probs, strict=True):
            start = 0
            for i in filled[row]:
                end = start + examples[i].size
                # The first token is predicted by none.
                found[i] = values[start + max(len(examples[i].prompt), 1) - 1 : end - 1]
                start = end
    return found


def reference_log_probs(
    model: Decoder,
    examples: Sequence[TokenExample],
    batch_size: int = 0,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "N"]:
    """log π_ref of every response, summed over its tokens: the reference model as numbers.

    Args:
        model: its adapters, if it has any, are left out.
        examples: prompts with responses.
        batch_size: most rows at once; see `response_log_probs`.
        mesh: the mesh that the model lies on.
    """
    found = response_log_probs(lora.detach(model), examples, batch_size=batch_size, mesh=mesh)
    return np.array([values.sum() for values in found], np.float32)


def leading_log_probs(
    model: Decoder, examples: Sequence[TokenExample], positions: int, mesh: Mesh
) -> Float[np.ndarray, "N P"]:
    """log π of each of the first `positions` tokens of every response; NaN after its end."""
    result = np.full((len(examples), positions), np.nan)
    for row, values in enumerate(response_log_probs(model, examples, mesh=mesh)):
        result[row, : len(values)] = values[:positions]
    return result
