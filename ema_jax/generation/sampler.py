"""Greedy decoding with a cache: prompts in buckets of length, one compiled program a bucket."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from ema_jax.data.chat import Chat, bucket, length_batches, pad_prompts
from ema_jax.models.decoder import Decoder, KVCache
from ema_jax.models.sharding import batch_multiple, batch_sharding, make_mesh


class Response(NamedTuple):
    """What the model said to one prompt."""

    tokens: tuple[int, ...]  # with the end-of-sequence token, where it came
    text: str
    finished: bool  # it ended by itself, before the cap


class _State(NamedTuple):
    cache: KVCache
    last: Int[Array, "B"]
    done: Bool[Array, "B"]
    output: Int[Array, "B N"]
    step: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens"))
def _greedy(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    eos_ids: Int[Array, "E"],
    *,
    max_new_tokens: int,
) -> Int[Array, "B N"]:
    """Greedy continuations; places after a row's end hold the first end-of-sequence id."""
    model = nnx.merge(graph, state)
    batch, length = tokens.shape
    slots = length + max_new_tokens
    cache = KVCache.empty(model.config, batch, slots, model.embed[...].dtype)
    # Keys are masked by slot, so the prompt's mask goes in whole and later slots stay closed.
    prefilled = model(tokens, mask, cache=cache)

    def choose(hidden: Array) -> Int[Array, "B"]:
        return jnp.argmax(model.logits(hidden[:, -1]), axis=-1).astype(jnp.int32)

    first = choose(prefilled.hidden)
    output = jnp.full((batch, max_new_tokens), eos_ids[0], jnp.int32).at[:, 0].set(first)
    start = _State(prefilled.cache, first, jnp.isin(first, eos_ids), output, jnp.int32(1))

    def unfinished(s: _State) -> Bool[Array, ""]:
        return (s.step < max_new_tokens) & ~jnp.all(s.done)

    def advance(s: _State) -> _State:
        out = model(s.last[:, None], jnp.ones((batch, 1), bool), cache=s.cache)
        token = jnp.where(s.done, eos_ids[0], choose(out.hidden))
        output = jax.lax.dynamic_update_slice(s.output, token[:, None], (0, s.step))
        return _State(out.cache, token, s.done | jnp.isin(token, eos_ids), output, s.step + 1)

    return jax.lax.while_loop(unfinished, advance, start).output


def generate(
    model: Decoder,
    chat: Chat,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, Response]]:
    """Responds greedily to every prompt; yields `(index, response)` as batches finish.

    Args:
        model: with or without adapters.
        chat: renders the prompts and ends the responses.
        prompts: user messages.
        max_new_tokens: the cap on a response.
        batch_size: rows at once, rounded up to what the mesh divides.
        mesh: what the model lies on.
    """
    mesh = make_mesh() if mesh is None else mesh
    multiple = batch_multiple(mesh)
    rows = -(-min(batch_size, max(len(prompts), 1)) // multiple) * multiple
    rendered = [chat.prompt_tokens(prompt) for prompt in prompts]
    graph, state = nnx.split(model)
    eos_ids = jnp.array(chat.eos_ids, jnp.int32)
    for indices in length_batches([len(ids) for ids in rendered], rows):
        chosen = [rendered[i] for i in indices]
        tokens, mask = pad_prompts(chosen, bucket(len(chosen[0])), rows, chat.pad_id)
        placed = jax.device_put((tokens, mask), batch_sharding(mesh))
        output = np.asarray(_greedy(graph, state, *placed, eos_ids, max_new_tokens=max_new_tokens))
        for i, row in zip(indices, output, strict=False):
            ends = np.flatnonzero(np.isin(row, chat.eos_ids))
            kept = row[: ends[0] + 1] if len(ends) else row
            ids = tuple(int(token) for token in kept)
            yield i, Response(ids, chat.decode(ids), bool(len(ends)))
