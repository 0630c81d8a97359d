"""Pooled residual streams of every layer, out of the ordinary forward pass.

Pooling is a weighted sum over tokens inside the layer scan, so device memory is O(L·B·d) and no
logits are computed. Layer convention: `ema_jax.concepts.vectors.LAYER_CONVENTION`.
"""

import functools
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ema_jax.concepts.store import ActivationStore
from ema_jax.concepts.vectors import LAYER_CONVENTION
from ema_jax.data.batching import ROWS, map_batches, pad_examples
from ema_jax.data.chat import TokenExample
from ema_jax.errors import UserError
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import batch_rows, make_mesh
from ema_jax.runtime.files import sha256_json

Pooling = Callable[[int, int], Float[np.ndarray, "T"]]


def _token(place: int, prompt: int, response: int) -> Float[np.ndarray, "T"]:
    """One token of the prompt, counted from its end."""
    if prompt + place < 0:
        raise UserError(f"pooling token:{place}: a prompt has only {prompt} tokens")
    weights = np.zeros(prompt + response, np.float32)
    weights[prompt + place] = 1
    return weights


def _prompt_mean(prompt: int, response: int) -> Float[np.ndarray, "T"]:
    weights = np.zeros(prompt + response, np.float32)
    weights[min(1, prompt - 1) : prompt] = 1 / max(prompt - 1, 1)
    return weights


def _response_mean(prompt: int, response: int) -> Float[np.ndarray, "T"]:
    if response == 0:
        raise UserError("pooling response_mean: no response given: pass responses to capture")
    weights = np.zeros(prompt + response, np.float32)
    weights[prompt:] = 1 / response
    return weights


POOLINGS: Mapping[str, Pooling] = {
    # The last token of the rendered prompt: what the response is predicted from.
    "last_token": functools.partial(_token, -1),
    # All tokens but the first, which is an attention sink of huge norm.
    "prompt_mean": _prompt_mean,
    # The tokens of a response that is given.
    "response_mean": _response_mean,
}
"""Weights over the tokens of a prompt and a response of given lengths, summing to one."""

STREAMS = ("residual", "attention", "mlp")
"""The residual stream `[L+1, …]`, and what attention and MLP add to it in each block `[L, …]`."""


def pooling(name: str) -> Pooling:
    """A pooling by name: one of `POOLINGS`, or `token:-K` for the K-th last token of the prompt.

    The tokens after the instruction, which the chat template writes, are the positions that
    refusal_direction chooses from; `template_tail` says how many there are.

    Raises:
        UserError: no such pooling.
    """
    if name in POOLINGS:
        return POOLINGS[name]
    if re.fullmatch(r"token:-[1-9]\d*", name):
        return functools.partial(_token, int(name.partition(":")[2]))
    raise UserError(f"pooling {name!r} is none of {', '.join(POOLINGS)}, token:-1, token:-2, …")


def template_tail(prompts: Sequence[Sequence[int]]) -> int:
    """Number of last tokens that all rendered prompts share: the template's own."""
    columns = zip(*(reversed(ids) for ids in prompts), strict=False)
    same = (len(set(column)) == 1 for column in columns)
    return next((i for i, alike in enumerate(same) if not alike), min(map(len, prompts)))


@functools.partial(jax.jit, static_argnames=("graph", "branches"))
def _pooled(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    weights: Float[Array, "B P T"],
    *,
    branches: bool,
) -> tuple[Float[Array, "L1 B P D"], ...]:
    def tap(x: Float[Array, "B T D"]) -> Float[Array, "B P D"]:
        return jnp.einsum(
            "bpt,btd->bpd", weights, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )

    out = nnx.merge(graph, state)(tokens, mask, right_padded=True, tap=tap, tap_branches=branches)
    return (out.taps, *(out.branches or ()))


def capture(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    poolings: Sequence[str] = ("last_token",),
    streams: Sequence[str] = ("residual",),
    responses: Sequence[Sequence[int]] | None = None,
    groups: Sequence[str] | None = None,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    store: str | os.PathLike | None = None,
    model_hash: str = "",
) -> dict[str, Float[np.ndarray, "N L1 D"]]:
    """Pooled residuals of every layer for every prompt, in float32.

    Args:
        model: with or without adapters.
        prompts: token ids of rendered prompts.
        poolings: names that `pooling` knows, all from one pass.
        streams: of `STREAMS`.
        responses: token ids that follow each prompt, for `response_mean`.
        groups: names, one a prompt, such as its domain: each group gets an array of its own.
        batch_size: rows at once, rounded up to what the mesh divides.
        mesh: devices of the model.
        store: a safetensors file to write batch by batch and to return memory-mapped; a run that
            was killed resumes after its last complete batch.
        model_hash: identifies this model, adapters included; recorded in the store, so that
            activations of another model are never resumed.

    Returns:
        Pooling → `[N, L+1, D]`; for other streams `STREAM/POOLING` → `[N, L, D]`; with groups
        `POOLING/GROUP` → `[n, L+1, D]`, a group's prompts in their order.

    Raises:
        UserError: an unknown pooling or stream, one that a prompt is too short for, or a store of
            other activations.
    """
    unknown = [name for name in streams if name not in STREAMS]
    if unknown:
        raise UserError(f"capture: stream {unknown[0]!r} is none of {', '.join(STREAMS)}")
    mesh = make_mesh() if mesh is None else mesh
    graph, state = nnx.split(model)
    layers, width = model.config.num_layers, model.config.hidden_size
    answers = [()] * len(prompts) if responses is None else responses
    examples = list(map(TokenExample, map(tuple, prompts), map(tuple, answers)))
    for sizes in {(len(item.prompt), len(item.response)) for item in examples}:
        for name in poolings:
            pooling(name)(*sizes)  # raises now where a pooling does not fit a prompt
    labels = [""] * len(prompts) if groups is None else list(groups)
    members: Counter[str] = Counter()
    place_of: list[int] = []  # of each prompt in its group
    for label in labels:
        place_of.append(members[label])
        members[label] += 1
    shapes = {
        _key(stream, name, label): (size, layers + (stream == "residual"), width)
        for stream in streams
        for name in poolings
        for label, size in members.items()
    }
    saved = None
    if store is not None:
        rows = batch_rows(min(batch_size or ROWS, len(prompts)), mesh)
        about: list[Any] = [list(map(list, prompts)), list(map(list, answers)), list(poolings)]
        about += [rows] if groups is None else [rows, labels]
        metadata = {"layer_convention": LAYER_CONVENTION, "model_hash": model_hash}
        saved = ActivationStore(store, shapes, metadata | {"inputs_sha256": sha256_json(about)})
        if saved.finished:
            return saved.finish()
    result = {} if saved else {key: np.empty(shape, np.float32) for key, shape in shapes.items()}
    branches = any(stream != "residual" for stream in streams)
    for indices, taps in map_batches(
        lambda batch: _pooled(graph, state, *batch, branches=branches),
        examples,
        functools.partial(_padded, poolings=poolings),
        batch_size=batch_size,
        mesh=mesh,
        length=operator.attrgetter("size"),
        axis=1,
        start=saved.done if saved else 0,
    ):
        columns: dict[str, list[int]] = {}  # of the batch, by group
        for column, i in enumerate(indices):
            columns.setdefault(labels[i], []).append(column)
        rows_of = {
            _key(stream, name, label): (
                [place_of[indices[column]] for column in chosen],
                tap[:, chosen, place].swapaxes(0, 1),  # from [L+1, B, P, D]
            )
            for stream, tap in zip(STREAMS, taps, strict=False)
            if stream in streams
            for place, name in enumerate(poolings)
            for label, chosen in columns.items()
        }
        if saved is not None:
            saved.commit(saved.done + 1, rows_of)
        else:
            for key, (places, values) in rows_of.items():
                result[key][places] = values
    return result if saved is None else saved.finish()


def _key(stream: str, pooling_name: str, group: str) -> str:
    parts = ("" if stream == "residual" else stream, pooling_name, group)
    return "/".join(filter(None, parts))


def _padded(
    examples: Sequence[TokenExample], length: int, rows: int, *, poolings: Sequence[str]
) -> tuple[Any, Any, Float[np.ndarray, "B P T"]]:
    """Tokens and mask `[B, T]`, and the weights of the poolings `[B, P, T]`."""
    tokens, mask, _ = pad_examples(examples, length, rows)
    weights = np.zeros((rows, len(poolings), length), np.float32)
    for row, item in enumerate(examples):
        for place, name in enumerate(poolings):
            weights[row, place, : item.size] = pooling(name)(len(item.prompt), len(item.response))
    return tokens, mask, weights


class Moments(NamedTuple):
    """Token-level statistics of chosen layers, K of them."""

    tokens: float
    mean: Float[np.ndarray, "K D"]
    scatter: Float[np.ndarray, "K D D"]  # sum of products of deviations from the mean

    @property
    def covariance(self) -> Float[np.ndarray, "K D D"]:
        """Unbiased."""
        return self.scatter / (self.tokens - 1)

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets of tokens; the centred merge of Chan et al. (1979).

        Raw second moments would lose a small variance next to a large mean (attention sinks).
        """
        total = self.tokens + other.tokens
        shift = other.mean - self.mean
        outer = shift[:, :, None] * shift[:, None, :]
        return Moments(
            total,
            self.mean + shift * (other.tokens / total),
            self.scatter + other.scatter + outer * (self.tokens * other.tokens / total),
        )


@functools.partial(jax.jit, static_argnames=("graph", "layers"))
def _moments(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    counted: Bool[Array, "B T"],
    *,
    layers: tuple[int, ...],
) -> tuple[Array, Float[Array, "K D"], Float[Array, "K D D"]]:
    model = nnx.merge(graph, state)
    x, weights = model.embed[...][tokens], counted[..., None].astype(jnp.float32)
    count, found = jnp.sum(weights), []
    # Only the blocks up to the last layer asked for are run.
    for before, layer in zip((0, *layers), layers, strict=False):
        x = model.run_blocks(x, mask, before, layer)
        wide = x.astype(jnp.float32)
        mean = jnp.sum(weights * wide, axis=(0, 1)) / count
        centred = (weights * (wide - mean)).reshape(-1, wide.shape[-1])
        found.append((mean, jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)))
    means, scatters = zip(*found, strict=True)
    return count, jnp.stack(means), jnp.stack(scatters)


def token_moments(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Moments:
    """Mean and scatter of the residuals of all tokens but each prompt's first, at some layers.

    Streamed: memory does not grow with the number of tokens. For prompts fewer than the width of
    the model, the activations of `capture` are smaller and hold more.

    Args:
        model: with or without adapters.
        prompts: token ids of rendered prompts, of two tokens at least.
        layers: ascending numbers from 0 to L.
        batch_size: rows at once.
        mesh: devices of the model.
    """
    graph, state = nnx.split(model)
    batches = map_batches(
        # What counts is what follows a prompt's first token.
        lambda batch: _moments(graph, state, *batch, layers=tuple(layers)),
        [TokenExample(tuple(ids[:1]), tuple(ids[1:])) for ids in prompts],
        pad_examples,
        batch_size=batch_size,
        mesh=mesh,
        length=operator.attrgetter("size"),
        axis=None,
    )
    return functools.reduce(
        Moments.merged,
        (
            Moments(float(count), np.asarray(mean, np.float64), np.asarray(scatter, np.float64))
            for _, (count, mean, scatter) in batches
        ),
    )
