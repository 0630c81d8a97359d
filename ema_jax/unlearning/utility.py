"""What else changed: likelihood of benign answers and divergence from the base."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ema_jax.data.chat import Batch, TokenExample, bucket, pad_examples
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import batch_multiple, batch_sharding, make_mesh


@functools.partial(jax.jit, static_argnames=("graph", "base_graph"))
def _totals(
    graph: nnx.GraphDef,
    state: nnx.State,
    base_graph: nnx.GraphDef,
    base_state: nnx.State,
    batch: Batch,
) -> Float[Array, "3"]:
    def log_probs(model: Decoder) -> Float[Array, "B T1 V"]:
        hidden = model(batch.tokens, batch.mask).hidden[:, :-1]
        return jax.nn.log_softmax(model.logits(hidden))

    ours = log_probs(nnx.merge(graph, state))
    base = log_probs(nnx.merge(base_graph, base_state))
    weights = batch.response[:, 1:]
    targets = batch.tokens[:, 1:, None]
    nll = -jnp.take_along_axis(ours, targets, axis=-1)[..., 0]
    divergence = jnp.sum(jnp.exp(base) * (base - ours), axis=-1)
    return jnp.stack(
        [jnp.sum(jnp.where(weights, x, 0.0)) for x in (nll, divergence, jnp.ones_like(nll))]
    )


def utility(
    model: Decoder,
    base: Decoder,
    examples: Sequence[TokenExample],
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Per response token on the base's own benign answers: NLL, and KL from the base.

    Args:
        model: the one to measure.
        base: the untouched model.
        examples: benign prompts with the base's answers.
        batch_size: rows at once; both models' full logits are held for them.
        mesh: what the models lie on.

    Returns:
        `benign_nll` and `kl_to_base` = KL(base ‖ model), in nats a token.
    """
    mesh = make_mesh() if mesh is None else mesh
    multiple = batch_multiple(mesh)
    rows = -(-batch_size // multiple) * multiple
    length = bucket(max(len(item.prompt) + len(item.response) for item in examples))
    totals = np.zeros(3)
    for start in range(0, len(examples), rows):
        batch = pad_examples(examples[start : start + rows], length, rows, 0)
        placed = jax.device_put(batch, batch_sharding(mesh))
        totals += np.asarray(_totals(*nnx.split(model), *nnx.split(base), placed), np.float64)
    return {"benign_nll": totals[0] / totals[2], "kl_to_base": max(totals[1] / totals[2], 0.0)}
