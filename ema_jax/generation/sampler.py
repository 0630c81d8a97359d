"""Decoding with a cache: prompts in buckets of length, one compiled program a bucket."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ema_jax.data.chat import Chat, bucket, length_batches, pad_prompts
from ema_jax.errors import UserError
from ema_jax.models.decoder import Decoder, KVCache
from ema_jax.models.sharding import batch_rows, host_array, make_mesh, place_batch


class Response(NamedTuple):
    """What the model said to one prompt."""

    tokens: tuple[int, ...]  # with the end-of-sequence token, where it came
    text: str
    finished: bool  # it ended by itself, before the cap


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; by default greedily.

    Applied in transformers' order: repetition penalty, temperature, top-k, top-p. A draw is a
    function of `seed` and of the prompt's place among the prompts alone, whatever the batches.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that together have this probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens already in
            prompt or response (arXiv 1909.05858); 1 for none.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
        }
        for name, fine in checks.items():
            if not fine:
                raise UserError(f"sampling: {name} = {getattr(self, name)} is out of range")


GREEDY = Sampling()


def warp(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after temperature, top-k and top-p; what is ruled out is −∞."""
    logits = logits / sampling.temperature
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    if sampling.top_k:
        least = ordered[:, min(sampling.top_k, logits.shape[-1]) - 1, None]
        logits = jnp.where(logits < least, -jnp.inf, logits)
        ordered = jnp.where(ordered < least, -jnp.inf, ordered)
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of likelier tokens
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1)
        logits = jnp.where(logits < least[:, None], -jnp.inf, logits)
    return logits


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Logits with those of the tokens already seen made less likely."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


class _State(NamedTuple):
    cache: KVCache
    last: Int[Array, "B"]
    done: Bool[Array, "B"]
    seen: Bool[Array, "B V"] | None  # tokens of prompt and response, where a penalty needs them
    output: Int[Array, "B N"]
    step: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "sampling"))
def _decode(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    places: Int[Array, "B"],
    eos_ids: Int[Array, "E"],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> Int[Array, "B N"]:
    """Continuations; places after a row's end hold the first end-of-sequence id."""
    model = nnx.merge(graph, state)
    batch, length = tokens.shape
    rows = jnp.arange(batch)
    slots = length + max_new_tokens
    cache = KVCache.empty(model.config, batch, slots, model.embed[...].dtype)
    # Keys are masked by slot, so the prompt's mask goes in whole and later slots stay closed.
    prefilled = model(tokens, mask, cache=cache)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), places)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = jnp.zeros((batch, model.config.vocab_size), bool)
        seen = seen.at[rows[:, None], tokens].max(mask)

    def choose(hidden: Array, seen: Array | None, step: Int[Array, ""] | int) -> Int[Array, "B"]:
        logits = model.logits(hidden[:, -1])
        if seen is not None:
            logits = penalise(logits, seen, sampling.repetition_penalty)
        if sampling.temperature:
            logits = warp(logits, sampling)
            now = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
            logits += jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(now)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def noted(seen: Array | None, token: Array) -> Array | None:
        return None if seen is None else seen.at[rows, token].set(True)

    first = choose(prefilled.hidden, seen, 0)
    output = jnp.full((batch, max_new_tokens), eos_ids[0], jnp.int32).at[:, 0].set(first)
    done = jnp.isin(first, eos_ids)
    start = _State(prefilled.cache, first, done, noted(seen, first), output, jnp.int32(1))

    def unfinished(s: _State) -> Bool[Array, ""]:
        return (s.step < max_new_tokens) & ~jnp.all(s.done)

    def advance(s: _State) -> _State:
        out = model(s.last[:, None], jnp.ones((batch, 1), bool), cache=s.cache)
        token = jnp.where(s.done, eos_ids[0], choose(out.hidden, s.seen, s.step))
        output = jax.lax.dynamic_update_slice(s.output, token[:, None], (0, s.step))
        done = s.done | jnp.isin(token, eos_ids)
        return _State(out.cache, token, done, noted(s.seen, token), output, s.step + 1)

    return jax.lax.while_loop(unfinished, advance, start).output


def generate(
    model: Decoder,
    chat: Chat,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, Response]]:
    """Responds to every prompt; yields `(index, response)` as batches finish.

    Args:
        model: with or without adapters.
        chat: renders the prompts and ends the responses.
        prompts: user messages.
        max_new_tokens: the cap on a response.
        batch_size: rows at once, rounded up to what the mesh divides.
        sampling: how tokens are chosen.
        mesh: what the model lies on.
    """
    mesh = make_mesh() if mesh is None else mesh
    rows = batch_rows(min(batch_size, max(len(prompts), 1)), mesh)
    rendered = [chat.prompt_tokens(prompt) for prompt in prompts]
    graph, state = nnx.split(model)
    eos_ids = np.array(chat.eos_ids, np.int32)
    settings = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    for indices in length_batches([len(ids) for ids in rendered], rows):
        chosen = [rendered[i] for i in indices]
        tokens, mask = pad_prompts(chosen, bucket(len(chosen[0])), rows, chat.pad_id)
        places = np.resize(np.array(indices, np.int32), rows)
        placed = place_batch((tokens, mask, places), mesh)
        output = host_array(_decode(graph, state, *placed, eos_ids, **settings))
        for i, row in zip(indices, output, strict=False):
            ends = np.flatnonzero(np.isin(row, chat.eos_ids))
            kept = row[: ends[0] + 1] if len(ends) else row
            ids = tuple(int(token) for token in kept)
            yield i, Response(ids, chat.decode(ids), bool(len(ends)))
