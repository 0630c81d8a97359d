"""Shared parts of judges that run a model: checkpoint, answer tokens, next-token probabilities."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ema_jax.data.batching import map_batches, pad_prompts
from ema_jax.data.chat import Chat, eos_ids, load_tokenizer
from ema_jax.models import checkpoint, hub
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder
from ema_jax.runtime.progress import Progress


@dataclass(frozen=True)
class JudgeModel:
    """The model of a judge: a checked folder, its architecture, and a label that identifies it."""

    folder: Path
    config: DecoderConfig
    revision: str

    @classmethod
    def find(cls, model: str, revision: str | None) -> "JudgeModel":
        """Resolves a model (`hub.find`) and checks it without reading weights."""
        found = hub.find(model, revision)
        Chat.check(found.folder)
        return cls(found.folder, found.config, found.label)

    def decoder(self) -> Decoder:
        """The model; the last one used stays in memory."""
        return _load(self.folder)


@functools.lru_cache(maxsize=1)
def _load(folder: Path) -> Decoder:
    return checkpoint.load(folder)


class Verbatim(Chat):
    """A tokenizer for prompts that are rendered already."""

    @classmethod
    def of(cls, folder: Path) -> "Verbatim":
        """Reads a checkpoint's tokenizer; it needs no chat template."""
        tokenizer = load_tokenizer(folder)
        return cls(tokenizer, eos_ids(folder, tokenizer))

    def render(self, prompt: str, response: str | None = None) -> str:
        """The prompt itself."""
        return prompt if response is None else prompt + response


def word_ids(chat: Chat, words: Sequence[str], rendered: str | None = None) -> dict[str, int]:
    """Ids of single-token words where a response begins, with and without a space before them.

    A word that the tokenizer splits is left out: its first piece begins other words too.

    Args:
        chat: tokenizer and template.
        words: without spaces.
        rendered: a prompt as the model sees it; by default the template around a placeholder.

    Returns:
        Word (or space and word) → id.
    """
    rendered = chat.render("PROMPT") if rendered is None else rendered

    def tokens(text: str) -> list[int]:
        return chat.tokenizer(text, add_special_tokens=False)["input_ids"]

    before, found = tokens(rendered), {}
    for word in words:
        for spelling in (word, f" {word}"):
            after = tokens(rendered + spelling)
            if after[:-1] == before:
                found[spelling] = after[-1]
    return found


@functools.partial(jax.jit, static_argnames="graph")
def _group_logprobs(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    groups: Bool[Array, "G V"],
) -> Float[Array, "B G"]:
    model = nnx.merge(graph, state)
    # The head reads the last position alone: [B, V] and never [B, T, V].
    logits = model.logits(model(tokens, mask).hidden[:, -1])
    total = jax.nn.logsumexp(logits, axis=-1)

    def of_group(group: Bool[Array, "V"]) -> Float[Array, "B"]:
        return jax.nn.logsumexp(jnp.where(group, logits, -jnp.inf), axis=-1) - total

    return jax.lax.map(of_group, groups).T


def next_token_logprobs(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int = 32,
    description: str = "prompts",
) -> Float[np.ndarray, "N G"]:
    """Log-probability that the next token is one of a group, and one more: that it is in none.

    Args:
        model: with or without adapters.
        prompts: token ids, N of them.
        groups: disjoint groups of ids.
        pad_id: token id at padded positions.
        batch_size: prompts at once.
        description: of the progress bar.

    Returns:
        Nats, float32 `[N, len(groups) + 1]`.
    """
    members = np.zeros((len(groups) + 1, model.config.vocab_size), bool)
    for row, ids in enumerate(groups):
        members[row, list(ids)] = True
    members[-1] = ~members.any(axis=0)
    graph, state = nnx.split(model)
    result = np.zeros((len(prompts), len(members)), np.float32)
    with Progress(description, len(prompts), "prompts") as progress:
        for indices, found in map_batches(
            lambda batch: _group_logprobs(graph, state, *batch, members),
            prompts,
            functools.partial(pad_prompts, pad_id=pad_id),
            batch_size=batch_size,
        ):
            result[indices] = found
            progress.update(len(indices))
    return result


def sigmoid(x: float) -> float:
    """The logistic function, without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
