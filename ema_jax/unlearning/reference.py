"""The reference model as numbers: log-probabilities of responses, computed once and stored."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ema_jax.data.batching import Batch, map_batches, pad_examples
from ema_jax.data.chat import TokenExample
from ema_jax.models import lora
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import batch_rows, host_array, make_mesh, place_batch
from ema_jax.unlearning.batches import MULTIPLE, padded_length
from ema_jax.unlearning.log_probs import sequence_log_probs, token_log_probs


@functools.partial(jax.jit, static_argnames=("graph",))
def _token_log_probs(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> Float[Array, "B next"]:
    return token_log_probs(nnx.merge(graph, state), batch.tokens, batch.mask)


@functools.partial(jax.jit, static_argnames=("graph",))
def _sequence_log_probs(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> Float[Array, "B"]:
    model = nnx.merge(graph, state)
    log_probs = token_log_probs(model, batch.tokens, batch.mask)
    return sequence_log_probs(log_probs, batch.response)


def reference_log_probs(
    model: Decoder,
    examples: Sequence[TokenExample],
    batch_size: int,
    mesh: Mesh | None = None,
    *,
    multiple: int = MULTIPLE,
) -> Float[np.ndarray, "N"]:
    """log π_ref of every response, summed over its tokens: the reference model as numbers.

    Args:
        model: its adapters, if it has any, are left out.
        examples: prompts with responses.
        batch_size: rows at once.
        mesh: the mesh that the model lies on.
        multiple: batches are padded to multiples of this; smaller ones pad less, compile more.
    """
    mesh = make_mesh() if mesh is None else mesh
    graph, state = nnx.split(lora.detach(model))
    sums = np.zeros(len(examples), np.float32)
    batches = map_batches(
        functools.partial(_sequence_log_probs, graph, state),
        examples,
        pad_examples,
        batch_size=batch_size,
        mesh=mesh,
        length=lambda item: item.size,
        multiple=multiple,
    )
    for places, found in batches:
        sums[places] = found
    return sums


def response_log_probs(
    model: Decoder, examples: Sequence[TokenExample], positions: int, mesh: Mesh
) -> Float[np.ndarray, "N P"]:
    """log π of each of the first `positions` tokens of every response; NaN after its end."""
    rows = batch_rows(len(examples), mesh)
    batch = pad_examples(examples, padded_length(examples), rows, 0)
    graph, state = nnx.split(model)
    log_probs = host_array(_token_log_probs(graph, state, place_batch(batch, mesh)))
    result = np.full((len(examples), positions), np.nan)
    for row, item in enumerate(examples):
        start, number = len(item.prompt) - 1, min(len(item.response), positions)
        result[row, :number] = log_probs[row, start : start + number]
    return result
