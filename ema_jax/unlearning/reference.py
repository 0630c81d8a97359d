"""Log-probabilities of given responses, and by them the reference model as numbers.

Everything that asks for them (the reference, the screening of answers, the curve over a response's
first tokens) runs one program: examples are packed into rows of one length, so many at once, and
those with the same prompt share it.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ema_jax.data.batching import map_batches
from ema_jax.data.chat import TokenExample
from ema_jax.data.packing import Branch, Branched, fit, lay_out_branches
from ema_jax.models import lora
from ema_jax.models.decoder import Decoder
from ema_jax.models.sharding import make_mesh, on_cpu
from ema_jax.unlearning.log_probs import target_log_probs

# Rows are of this many tokens, or of the next power of two that the longest example needs.
_LENGTH = 256
# Tokens of a pass: enough to keep the device busy, few enough that a small call wastes little.
_TOKENS, _TOKENS_CPU = 1 << 14, 1 << 11


@functools.partial(jax.jit, static_argnames="graph")
def _token_log_probs(graph: nnx.GraphDef, state: nnx.State, rows: Branched) -> Float[Array, "B T"]:
    model = nnx.merge(graph, state)
    out = model(
        rows.tokens,
        rows.segments > 0,
        right_padded=True,
        segments=rows.segments,
        continued=rows.continued,
    )
    hidden = jax.vmap(lambda states, places: states[places])(out.hidden, rows.places)
    return target_log_probs(model, hidden, rows.targets)


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
        examples: prompts with responses. Of an example without a prompt the first token is
            predicted by nothing, and left out.
        batch_size: most rows at once, each of several examples; 0 for what the device likes.
        mesh: the mesh that the model lies on.
    """
    if not examples:
        return []
    mesh = make_mesh() if mesh is None else mesh
    graph, state = nnx.split(lora.folded(model))
    most, length = pass_shape(max(item.size for item in examples), mesh)
    rows = min(batch_size or most, most)
    branches, members = _by_prompt(examples, length)
    filled = fit([branch.size for branch in branches], length)
    filled += [[] for _ in range(-len(filled) % rows)]  # so that all batches are of one size
    found: list[np.ndarray] = [np.empty(0, np.float32)] * len(examples)

    def laid_out(chosen: Sequence[Sequence[int]], length: int, number: int) -> Branched:
        return lay_out_branches([[branches[i] for i in row] for row in chosen], length, number)

    for places, log_probs in map_batches(
        functools.partial(_token_log_probs, graph, state),
        filled,
        laid_out,
        batch_size=rows,
        mesh=mesh,
        length=lambda row: length,
    ):
        for row, values in zip(places, log_probs, strict=True):
            start = 0
            for i in filled[row]:
                for example, response in zip(members[i], branches[i].responses, strict=True):
                    found[example] = values[start : start + len(response)]
                    start += len(response)
    return found


def _by_prompt(examples: Sequence[TokenExample], room: int) -> tuple[list[Branch], list[list[int]]]:
    """Branches of at most `room` tokens, and the examples that each one's responses are of."""
    responses: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for i, (prompt, response) in enumerate(examples):
        if not prompt:
            prompt, response = response[:1], response[1:]
        if response:
            responses.setdefault(prompt, []).append((i, response))
    branches: list[Branch] = []
    members: list[list[int]] = []
    for prompt, listed in responses.items():
        together = Branch(prompt, ())
        for i, response in listed:
            together = Branch(prompt, (*together.responses, response))
            if len(together.responses) > 1 and together.size <= room:
                branches[-1] = together
                members[-1].append(i)
            else:
                together = Branch(prompt, (response,))
                branches.append(together)
                members.append([i])
    return branches, members


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
