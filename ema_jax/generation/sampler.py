"""Decoding with a cache, in rows that take the next prompt as soon as their response has ended.

Responses differ much in length (a refusal is short), and a batch would wait for its longest. Here a
fixed number of rows decode side by side; once a quarter of them have ended, that many prompts are
run through the model at once and take their places in the cache, which is a ring (`KVCache`). What
a row generates does not depend on the other rows.
"""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from ema_jax.data.batching import bucket, few_rows, pad_prompts, padded_length
from ema_jax.data.chat import Chat
from ema_jax.errors import UserError
from ema_jax.models import lora
from ema_jax.models.cache import KVCache, rows_that_fit
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder, Layers
from ema_jax.models.sharding import (
    batch_rows,
    batch_sharding,
    cache_sharding,
    host_array,
    make_mesh,
    on_cpu,
    place_batch,
)

_REFILL = 4  # one prompt pass fills a quarter of the rows
_TAIL = 4  # without prompts left, the last responses continue in a quarter of the rows,
_MIN_TAIL = 16  # unless that is fewer rows than this,
_LARGE = 1 << 24  # or a step of a model with fewer weights: another program would take longer
_FEW = 8  # on accelerators all rows decode, unless the prompts are fewer than this part of them


class Response(NamedTuple):
    """The model's response to one prompt."""

    tokens: tuple[int, ...]  # with the end-of-sequence token, where it came
    text: str
    finished: bool  # it ended by itself, before the cap

    def __repr__(self) -> str:
        end = "" if self.finished else ", cut at the cap"
        return f"Response({self.text!r}, {len(self.tokens)} tokens{end})"

    @classmethod
    def of(cls, tokens: tuple[int, ...], chat: Chat) -> "Response":
        """From the tokens alone."""
        return cls(tokens, chat.decode(tokens), tokens[-1] in chat.eos_ids)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Choice of the next token; greedy by default.

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
    """Logits after temperature, top-k and top-p; excluded ones are −∞."""
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


class _Slots(NamedTuple):
    """The rows that decode side by side."""

    cache: KVCache
    last: Int[Array, "B"]  # token chosen last, which the next step reads
    live: Bool[Array, "B"]
    length: Int[Array, "B"]  # of the response so far
    draws: UInt32[Array, "B 2"]  # key of the draws, from the seed and the prompt's place
    seen: Bool[Array, "B V"] | None  # tokens of prompt and response, where a penalty needs them
    output: Int[Array, "B N"]

    @classmethod
    def empty(cls, config: DecoderConfig, rows: int, slots: int, cap: int, dtype: Any, seen: bool):
        """Rows without a prompt."""
        numbers = jnp.zeros(rows, jnp.int32)
        return cls(
            KVCache.empty(config, rows, slots, dtype),
            numbers,
            numbers > 0,
            numbers,
            jnp.zeros((rows, 2), jnp.uint32),
            jnp.zeros((rows, config.vocab_size), bool) if seen else None,
            jnp.zeros((rows, cap), jnp.int32),
        )

    def shardings(self, mesh: Mesh) -> "_Slots":
        """Large parts over the mesh, small ones on every device, so that any process reads them."""
        keys, rows = self.cache.keys, batch_sharding(mesh)
        everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), self)
        wide = (cache_sharding(keys[0].shape[1], mesh),) * len(keys)
        cache = everywhere.cache._replace(keys=wide, values=wide, positions=rows)
        return everywhere._replace(cache=cache, seen=None if self.seen is None else rows)

    def on(self, mesh: Mesh) -> "_Slots":
        """Laid out so, inside a program."""
        return jax.lax.with_sharding_constraint(self, self.shardings(mesh))


_empty = jax.jit(
    lambda *sizes, mesh: _Slots.empty(*sizes).on(mesh),
    static_argnums=tuple(range(6)),
    static_argnames="mesh",
)


def _choose(
    model: Decoder,
    hidden: Float[Array, "B D"],
    seen: Bool[Array, "B V"] | None,
    draws: UInt32[Array, "B 2"],
    length: Int[Array, "B"],
    sampling: Sampling,
) -> Int[Array, "B"]:
    """The next token of every row."""
    logits = model.logits(hidden)
    if seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature:
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(draws), length)
        logits = warp(logits, sampling)
        logits += jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    return most_likely(logits)


def most_likely(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The first of the highest logits; the first of all where one is NaN.

    Two plain reductions: on a CPU XLA's `argmax` compares pair by pair, which over 49,000 words
    takes 3.5 ms of a step of 16 rows, and they 0.5 ms.
    """
    best, words = jnp.max(logits, axis=-1, keepdims=True), logits.shape[-1]
    below = logits < best
    return jnp.min(jnp.where(below, words, jnp.arange(words)), axis=-1).astype(jnp.int32)


@jax.jit
def _draws(seed: Int[Array, ""], places: Int[Array, "F"]) -> UInt32[Array, "F 2"]:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), places)
    return jax.random.key_data(keys)


@functools.partial(jax.jit, static_argnames=("graph", "mesh"), donate_argnames="slots")
def _fill(
    graph: nnx.GraphDef,
    state: nnx.State,
    slots: _Slots,
    tokens: Int[Array, "F T"],
    mask: Bool[Array, "F T"],
    last: Int[Array, "F"],
    draws: UInt32[Array, "F 2"],
    rows: Int[Array, "F"],
    *,
    mesh: Mesh,
) -> _Slots:
    """Runs prompts without their last token through the model and puts them into `rows`.

    The last one is the first that `_advance` reads: so how tokens are chosen is compiled there
    alone, and here no logits are computed.
    """
    out = nnx.merge(graph, state)(tokens, mask, return_keys_values=True)
    keys, values = out.keys_values
    seen = None
    if slots.seen is not None:
        everywhere = jnp.arange(tokens.shape[0])
        seen = jnp.zeros((tokens.shape[0], slots.seen.shape[1]), bool)
        seen = seen.at[everywhere[:, None], tokens].max(mask).at[everywhere, last].set(True)
        seen = slots.seen.at[rows].set(seen, mode="drop")
    return _Slots(
        slots.cache.insert(rows, keys, values, mask),
        slots.last.at[rows].set(last, mode="drop"),
        slots.live.at[rows].set(True, mode="drop"),
        slots.length.at[rows].set(0, mode="drop"),
        slots.draws.at[rows].set(draws, mode="drop"),
        seen,
        slots.output,
    ).on(mesh)


@functools.partial(jax.jit, static_argnames="graph")
def _layers(graph: nnx.GraphDef, state: nnx.State) -> Layers:
    """The blocks taken apart, once for all of a `generate`: a copy of their weights."""
    return nnx.merge(graph, state).layers()


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "mesh"), donate_argnames="slots")
def _advance(
    graph: nnx.GraphDef,
    state: nnx.State,
    layers: Layers,
    slots: _Slots,
    few: Int[Array, ""],
    eos_ids: Int[Array, "E"],
    *,
    sampling: Sampling,
    mesh: Mesh,
) -> _Slots:
    """Decodes until at most `few` rows are live."""
    model = nnx.merge(graph, state)
    rows, cap = slots.output.shape
    everywhere = jnp.arange(rows)

    def unfinished(carry: tuple[_Slots, Int[Array, ""]]) -> Bool[Array, ""]:
        s, steps = carry
        # No response takes more steps than that; the bound is for the compiler.
        return (jnp.sum(s.live) > few) & (steps < cap)

    def step(carry: tuple[_Slots, Int[Array, ""]]) -> tuple[_Slots, Int[Array, ""]]:
        s, steps = carry
        hidden, cache = model.advance(s.last, s.cache, layers)
        token = _choose(model, hidden, s.seen, s.draws, s.length, sampling)
        # The tokens of a row that has ended are dropped.
        output = s.output.at[everywhere, jnp.where(s.live, s.length, cap)].set(token, mode="drop")
        length = s.length + s.live
        live = s.live & ~jnp.isin(token, eos_ids) & (length < cap)
        seen = None if s.seen is None else s.seen.at[everywhere, token].set(True)
        after = _Slots(cache, token, live, length, s.draws, seen, output).on(mesh)
        return after, steps + 1

    return jax.lax.while_loop(unfinished, step, (slots, jnp.int32(0)))[0]


@functools.partial(jax.jit, static_argnames="mesh")
def _narrow(slots: _Slots, rows: Int[Array, "F"], *, mesh: Mesh) -> _Slots:
    """The slots of some rows alone."""
    few = jax.tree.map(lambda x: x[rows] if x.ndim else x, slots)
    return few.on(mesh)


def generate(
    model: Decoder,
    chat: Chat,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    mesh: Mesh | None = None,
    done: Container[int] = (),
) -> Iterator[tuple[int, Response]]:
    """Responds to every prompt; yields `(index, response)` as responses end.

    Args:
        model: with or without adapters.
        chat: renders the prompts and ends the responses.
        prompts: user messages.
        max_new_tokens: the cap on a response.
        batch_size: rows at once, rounded up to what the mesh divides; 0 for as many as fit.
        sampling: how tokens are chosen.
        mesh: devices of the model.
        done: indices of prompts that are left out.
    """
    mesh = make_mesh() if mesh is None else mesh
    rendered = {i: chat.prompt_tokens(prompt) for i, prompt in enumerate(prompts) if i not in done}
    if not rendered:
        return
    model = lora.folded(model)
    layers = _layers(*nnx.split(model))
    for indices in _rings({i: len(ids) for i, ids in rendered.items()}, max_new_tokens):
        slots = padded_length(len(rendered[indices[0]]), mesh) + max_new_tokens
        most = batch_size or rows_that_fit(model.config, slots, model.embed[...].dtype, mesh)
        rows = batch_rows(_rows(most, len(indices), mesh), mesh)
        queue = deque((i, rendered[i]) for i in indices)
        for i, tokens in _serve(model, layers, chat, queue, rows, max_new_tokens, sampling, mesh):
            yield i, Response.of(tokens, chat)


def _rows(most: int, prompts: int, mesh: Mesh) -> int:
    if on_cpu(mesh):
        return min(most, prompts)
    # An accelerator's step takes much the same time for fewer rows, and would be compiled again.
    return most if prompts >= most // _FEW else few_rows(most, prompts)


def respond(
    model: Decoder, chat: Chat, prompts: Sequence[str], *, max_new_tokens: int, **options: Any
) -> list[Response]:
    """The responses to the prompts, in their order; arguments as for `generate`."""
    found = dict(generate(model, chat, prompts, max_new_tokens=max_new_tokens, **options))
    return [found[i] for i in range(len(prompts))]


def _rings(lengths: Mapping[int, int], cap: int) -> Iterator[list[int]]:
    """Indices, longest prompts first; a part ends where half of its ring would stay unused."""
    part: list[int] = []
    for i in sorted(lengths, key=lambda i: (-lengths[i], i)):
        if part and 2 * (bucket(lengths[i]) + cap) < bucket(lengths[part[0]]) + cap:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _serve(
    model: Decoder,
    layers: Layers,
    chat: Chat,
    queue: deque[tuple[int, tuple[int, ...]]],
    rows: int,
    cap: int,
    sampling: Sampling,
    mesh: Mesh,
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Tokens of the responses to the queue's prompts, longest prompts first, in `rows` rows."""
    graph, state = nnx.split(model)
    # What decoding needs beside its layers.
    outer_graph, outer = nnx.split(lora.detach(model))
    eos_ids = np.array(chat.eos_ids, np.int32)
    # The seed comes as keys, so that the same programs serve every one.
    fixed = {"sampling": dataclasses.replace(sampling, seed=0), "mesh": mesh}
    cpu = on_cpu(mesh)
    refill = rows if cpu and len(queue) <= rows else batch_rows(-(-rows // _REFILL), mesh)
    tail = batch_rows(rows // _TAIL, mesh)
    large = model.config.num_layers * model.config.block_weights >= _LARGE
    longest = padded_length(len(queue[0][1]), mesh)
    penalised = sampling.repetition_penalty != 1
    slots = _empty(
        model.config, rows, longest + cap, cap, model.embed[...].dtype, penalised, mesh=mesh
    )
    prompt_of = np.full(rows, -1)  # index of each row's prompt; below zero: none
    while queue or np.any(prompt_of >= 0):
        free = np.flatnonzero(prompt_of < 0)
        while queue and len(free) >= min(refill, len(queue)):
            taken = [queue.popleft() for _ in range(min(refill, len(queue)))]
            into, free = free[: len(taken)], free[len(taken) :]
            prompt_of[into] = [i for i, _ in taken]
            prompts = [ids[:-1] for _, ids in taken]
            length = bucket(max(len(prompts[0]), 1)) if cpu else longest
            tokens, mask = pad_prompts(prompts, length, refill, chat.pad_id)
            last = np.resize(np.array([ids[-1] for _, ids in taken], np.int32), refill)
            # Past the last row, so that padding of the batch is dropped.
            targets = np.full(refill, len(prompt_of), np.int32)
            targets[: len(into)] = into
            places = np.resize(prompt_of[into].astype(np.int32), refill)
            placed = place_batch((tokens, mask), mesh)
            draws = np.asarray(_draws(sampling.seed, places))
            slots = _fill(graph, state, slots, *placed, last, draws, targets, mesh=mesh)
        narrower = cpu and large and not queue and _MIN_TAIL <= tail < len(prompt_of)
        few = len(prompt_of) - min(refill, len(queue)) if queue else tail if narrower else 0
        slots = _advance(outer_graph, outer, layers, slots, np.int32(few), eos_ids, **fixed)
        live, ends, output = map(host_array, (slots.live, slots.length, slots.output))
        for row in np.flatnonzero((prompt_of >= 0) & ~live):
            yield int(prompt_of[row]), tuple(output[row, : ends[row]].tolist())
            prompt_of[row] = -1
        if narrower:
            live_rows = np.argsort(prompt_of < 0, kind="stable")[:tail]
            prompt_of, slots = prompt_of[live_rows], _narrow(slots, live_rows, mesh=mesh)
