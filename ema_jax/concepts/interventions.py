"""Steering, ablation and patching of concepts at every layer, and their effect on refusal.

An intervention is part of the model, as an adapter is (`intervene`), so whatever takes a model also
takes a steered one: sampler, capture, judges. For effects on the first token of the response there
is no need to generate, nor to run the model from its first block: `sweep` changes the stream at
layer l and runs only the blocks after it, with the clean stream of the layers before shared by all
candidates. One compiled program does all layers, at (L + 1) / 2L of the blocks of a forward pass
each.

Layers as in `ema_jax.concepts.vectors.LAYER_CONVENTION`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ema_jax.concepts.vectors import LayerVectors
from ema_jax.data.batching import ROWS, map_batches, pad_prompts
from ema_jax.errors import UserError
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import host_array

if TYPE_CHECKING:
    from pandas import DataFrame


@functools.partial(jax.tree_util.register_dataclass, data_fields=["add", "remove"], meta_fields=[])
@dataclass(frozen=True)
class Intervention:
    """Steering and directional ablation of a residual stream, at all of its positions.

    Attributes:
      add: added to the stream.
      remove: a unit vector whose component is removed before `add` is added, or zeros.
    """

    add: Float[Array, "*layers D"]
    remove: Float[Array, "*layers D"]

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The changed stream, in its own dtype."""
        add, remove = self.add.astype(x.dtype), self.remove.astype(x.dtype)
        along = jnp.matmul(x, remove, precision=jax.lax.Precision.HIGHEST)
        return x - along[..., None] * remove + add


def steering(
    vector: Float[np.ndarray, "L1 D"], strength: float = 1.0, layers: Sequence[int] | None = None
) -> Intervention:
    """Adds `strength` times a concept vector, at some layers or at all."""
    add = strength * _at(layers, vector)
    return Intervention(jnp.asarray(add), jnp.zeros_like(add))


def ablation(
    vector: Float[np.ndarray, "L1 D"], layers: Sequence[int] | None = None
) -> Intervention:
    """Removes the component along a concept vector, at some layers or at all.

    At all layers it is the directional ablation of Arditi et al. (2024), with each layer's own
    vector. A zero vector removes nothing.
    """
    remove = _at(layers, _unit(vector))
    return Intervention(jnp.zeros_like(remove), jnp.asarray(remove))


def intervene(model: Decoder, intervention: Intervention | None) -> Decoder:
    """The model with an intervention in place of the one it may have, sharing its arrays."""
    model = nnx.merge(*nnx.split(model))
    model.edit = nnx.data(intervention)
    return model


def random_like(vectors: Float[np.ndarray, "L1 D"], seed: int = 0) -> Float[np.ndarray, "L1 D"]:
    """One random direction with the length of each layer's vector: the control for any change."""
    drawn = np.random.default_rng(seed).normal(size=vectors.shape[1])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (lengths * drawn / np.linalg.norm(drawn)).astype(np.float32)


class Grid(NamedTuple):
    """Candidates for a sweep: every direction at every strength, and ablated.

    `candidates` has leaves `[L+1, directions · (strengths + ablation), D]`.
    """

    directions: tuple[str, ...]
    strengths: tuple[float | str, ...]  # what to multiply the vector by, or "ablated"
    candidates: Intervention

    def unflatten(
        self, effects: Float[np.ndarray, "L1 C N"]
    ) -> Float[np.ndarray, "L1 directions strengths N"]:
        """Effects of the candidates by direction and strength."""
        shape = (len(effects), len(self.directions), len(self.strengths), effects.shape[-1])
        return effects.reshape(shape)


ABLATED = "ablated"


def grid(directions: LayerVectors, strengths: Sequence[float], *, ablate: bool = True) -> Grid:
    """Every direction at every strength, and ablated.

    Strength 1 adds the vector itself: with a difference in means it moves the mean of the contrast
    set onto the mean of the domain.
    """
    columns = []
    for vector in directions.values():
        columns += [steering(vector, strength) for strength in strengths]
        columns += [ablation(vector)] if ablate else []
    candidates = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *columns)
    names: list[float | str] = [*strengths, ABLATED] if ablate else [*strengths]
    return Grid(tuple(directions), tuple(names), candidates)


class Sweep(NamedTuple):
    """Refusal log-odds in nats: of every prompt as it is, and under every intervention."""

    clean: Float[np.ndarray, "N"]
    changed: Float[np.ndarray, "L1 C N"]  # NaN at layers that were left out

    def __repr__(self) -> str:
        layers, candidates, prompts = self.changed.shape
        return f"Sweep({candidates} candidates at {layers} layers, {prompts} prompts)"

    def to_frame(self, grid: Grid) -> "DataFrame":
        """One row a direction, strength and layer: the mean change of refusal log-odds in nats."""
        from pandas import DataFrame  # slow to import, and no study needs it

        change = grid.unflatten(self.changed - self.clean).mean(axis=-1)
        return DataFrame(
            [
                {"direction": direction, "strength": strength, "layer": layer, "change": x}
                for layer, by_direction in enumerate(change)
                for direction, by_strength in zip(grid.directions, by_direction, strict=True)
                for strength, x in zip(grid.strengths, by_strength, strict=True)
            ]
        )


def sweep(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    candidates: Intervention,
    refusing: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Sweep:
    """Refusal log-odds of every prompt under every candidate at every single layer.

    Equal to running the model with one candidate at one layer at a time, for half the price: see
    the module.

    Args:
        model: with or without adapters.
        prompts: token ids of N rendered prompts.
        candidates: leaves `[L+1, C, D]`; entry l is applied at layer l alone.
        refusing: ids of tokens that open a refusal.
        layers: those at which candidates are applied, in ascending order; all by default.
        batch_size: sequences at once, prompts times candidates.
        mesh: devices of the model.

    Raises:
        UserError: no token opens a refusal, or all of them do.
    """
    members = _members(refusing, model.config.vocab_size)
    graph, state = nnx.split(model)
    # On every process, like the batch.
    every = model.config.num_layers + 1
    chosen = np.arange(every) if layers is None else np.asarray(layers)
    candidates = jax.tree.map(lambda x: host_array(jnp.asarray(x))[chosen], candidates)
    count = candidates.add.shape[1]
    clean = np.zeros(len(prompts), np.float32)
    changed = np.full((every, count, len(prompts)), np.nan, np.float32)

    def effects(batch: Any) -> Array:
        chunk = max(1, min(count, (batch_size or ROWS) // len(batch[0])))
        # At least one that changes nothing, for the prompts as they are; and whole chunks, as the
        # rest of a broken one would be compiled for itself.
        spare = ((0, 0), (0, chunk - count % chunk), (0, 0))
        padded = jax.tree.map(lambda x: np.pad(x, spare), candidates)
        return _sweep(graph, state, *batch, members, chosen, padded, chunk=chunk)

    batches = map_batches(effects, prompts, pad_prompts, batch_size=batch_size, mesh=mesh, axis=-1)
    for indices, found in batches:
        clean[indices] = found[0, count]
        changed[np.ix_(chosen, np.arange(count), np.asarray(indices))] = found[:, :count]
    return Sweep(clean, changed)


def patch(
    below: Decoder,
    above: Decoder,
    prompts: Sequence[Sequence[int]],
    refusing: Sequence[int],
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "L1 N"]:
    """Refusal log-odds of one model with another's residual stream put in at layer l.

    All positions are patched, so it is `below` up to layer l and `above` from there: at 0 `above`
    alone (up to its embeddings), at L `below` under the head of `above`. With base below and
    unlearned above, the layers over which refusal comes back are those where unlearning acts.

    Args:
        below: gives the stream.
        above: of the same shape; takes it.
        prompts: token ids of N rendered prompts.
        refusing: ids of tokens that open a refusal.
        batch_size: prompts at once.
        mesh: devices of the models.

    Raises:
        UserError: no token opens a refusal, or all of them do.
    """
    members = _members(refusing, above.config.vocab_size)
    result = np.zeros((above.config.num_layers + 1, len(prompts)), np.float32)
    models = (*nnx.split(below), *nnx.split(above))
    for indices, found in map_batches(
        lambda batch: _patch(*models, *batch, members),
        prompts,
        pad_prompts,
        batch_size=batch_size,
        mesh=mesh,
        axis=-1,
    ):
        result[:, indices] = found
    return result


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def _sweep(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    refusing: Bool[Array, "V"],
    layers: Int[Array, "S"],
    candidates: Intervention,
    *,
    chunk: int,
) -> Float[Array, "S C B"]:
    model = nnx.merge(graph, state)
    last = model.config.num_layers

    def at_layer(x: Array, inputs: tuple[Array, Array, Intervention]) -> tuple[Array, Array]:
        before, layer, here = inputs
        x = model.run_blocks(x, mask, before, layer)

        def effect(candidate: Intervention) -> Float[Array, "B"]:
            return _log_odds(model, model.run_blocks(candidate(x), mask, layer, last), refusing)

        return x, jax.lax.map(effect, here, batch_size=chunk)

    before = jnp.append(0, layers[:-1])
    return jax.lax.scan(at_layer, model.embed[...][tokens], (before, layers, candidates))[1]


@functools.partial(jax.jit, static_argnames=("below_graph", "above_graph"))
def _patch(
    below_graph: nnx.GraphDef,
    below_state: nnx.State,
    above_graph: nnx.GraphDef,
    above_state: nnx.State,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    refusing: Bool[Array, "V"],
) -> Float[Array, "L1 B"]:
    below, above = nnx.merge(below_graph, below_state), nnx.merge(above_graph, above_state)
    last = above.config.num_layers

    def at_layer(x: Array, layer: Array) -> tuple[Array, Array]:
        effect = _log_odds(above, above.run_blocks(x, mask, layer, last), refusing)
        return below.run_blocks(x, mask, layer, jnp.minimum(layer + 1, last)), effect

    return jax.lax.scan(at_layer, below.embed[...][tokens], jnp.arange(last + 1))[1]


def _log_odds(
    model: Decoder, x: Float[Array, "B T D"], refusing: Bool[Array, "V"]
) -> Float[Array, "B"]:
    """Log-odds in nats that the next token is a refusing one; rows are padded on the left."""
    logits = model.logits(model.final_norm(x[:, -1]))
    inside, outside = (
        jax.nn.logsumexp(jnp.where(chosen, logits, -jnp.inf), axis=-1)
        for chosen in (refusing, ~refusing)
    )
    return inside - outside


def _members(refusing: Sequence[int], vocab_size: int) -> Bool[np.ndarray, "V"]:
    members = np.zeros(vocab_size, bool)
    members[list(refusing)] = True
    if not members.any() or members.all():
        raise UserError(
            f"layer sweep: {members.sum()} of {vocab_size} tokens open a refusal: name some"
        )
    return members


def _unit(vector: Float[np.ndarray, "L1 D"]) -> Float[np.ndarray, "L1 D"]:
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.divide(vector, length, out=np.zeros_like(vector), where=length > 0)


def _at(
    layers: Sequence[int] | None, vector: Float[np.ndarray, "L1 D"]
) -> Float[np.ndarray, "L1 D"]:
    """The vector at some layers, zeros at the others."""
    if layers is None:
        return np.asarray(vector, np.float32)
    chosen = np.zeros((len(vector), 1), np.float32)
    chosen[list(layers)] = 1
    return chosen * np.asarray(vector, np.float32)
