"""Utility: the likelihood of benign answers, and the divergence from the base."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ema_jax.data.batching import Batch, bucket, pad_examples
from ema_jax.data.chat import TokenExample
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import batch_rows, host_array, make_mesh, place_batch
from ema_jax.unlearning.log_probs import map_chunks
from ema_jax.unlearning.reference import response_log_probs

_CHUNK = 32  # tokens whose logits, of both models, exist at a time


@functools.partial(jax.jit, static_argnames=("graph", "base_graph"))
def _totals(
    graph: nnx.GraphDef,
    state: nnx.State,
    base_graph: nnx.GraphDef,
    base_state: nnx.State,
    batch: Batch,
) -> Float[Array, "3"]:
    """Sums over response tokens of NLL, KL(base ‖ model) and one."""
    model, base = nnx.merge(graph, state), nnx.merge(base_graph, base_state)

    def chunk(
        h: Float[Array, "B C D"],
        base_h: Float[Array, "B C D"],
        targets: Int[Array, "B C"],
        response: Bool[Array, "B C"],
    ) -> Float[Array, "3"]:
        policy = jax.nn.log_softmax(model.logits(h))
        reference = jax.nn.log_softmax(base.logits(base_h))
        nll = -jnp.take_along_axis(policy, targets[..., None], axis=-1)[..., 0]
        divergence = jnp.sum(jnp.exp(reference) * (reference - policy), axis=-1)
        counted = (nll, divergence, jnp.ones_like(nll))
        return jnp.stack([jnp.sum(jnp.where(response, x, 0.0)) for x in counted])

    hidden = [m(batch.tokens, batch.mask, right_padded=True).hidden[:, :-1] for m in (model, base)]
    arrays = (*hidden, batch.tokens[:, 1:], batch.response[:, 1:])
    sums = map_chunks(chunk, model.config.vocab_size, *arrays, longest=_CHUNK)
    return jnp.sum(sums, axis=0)


def utility(
    model: Decoder,
    base: Decoder,
    examples: Sequence[TokenExample],
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """NLL and KL from the base per response token, on the base's own benign answers.

    Args:
        model: the one to measure.
        base: the untouched model.
        examples: benign prompts with the base's answers.
        batch_size: rows at once.
        mesh: the mesh that the models lie on.

    Returns:
        `benign_nll` and `kl_to_base` = KL(base ‖ model), in nats a token.
    """
    mesh = make_mesh() if mesh is None else mesh
    if model is base:  # no divergence, and the likelihood needs no program of its own
        return {"benign_nll": _nll(model, examples, mesh), "kl_to_base": 0.0}
    rows = batch_rows(batch_size, mesh)
    length = bucket(max(len(item.prompt) + len(item.response) for item in examples))
    totals = np.zeros(3)
    for start in range(0, len(examples), rows):
        batch = pad_examples(examples[start : start + rows], length, rows, 0)
        placed = place_batch(batch, mesh)
        totals += host_array(_totals(*nnx.split(model), *nnx.split(base), placed))
    return {"benign_nll": totals[0] / totals[2], "kl_to_base": max(totals[1] / totals[2], 0.0)}


def perplexity(
    model: Decoder, examples: Sequence[TokenExample], *, mesh: Mesh | None = None
) -> float:
    """Perplexity of responses to a model, per token of all of them together."""
    return math.exp(_nll(model, examples, make_mesh() if mesh is None else mesh))


def _nll(model: Decoder, examples: Sequence[TokenExample], mesh: Mesh) -> float:
    """Mean over all response tokens of −log π, in nats."""
    return -float(np.concatenate(response_log_probs(model, examples, mesh=mesh)).mean())
