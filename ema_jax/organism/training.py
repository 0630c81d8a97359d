"""Training of the model organisms from scratch.

Stage one makes a helpful-only model that answers everything; stage two tunes it to refuse in the
seven domains. Each model is written as an ordinary Hugging Face checkpoint folder.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from flax import nnx

from ema_jax.data import corpus
from ema_jax.data.batching import Batch, bucket, pad_examples
from ema_jax.data.chat import Chat, TokenExample
from ema_jax.errors import UserError
from ema_jax.models import checkpoint
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder
from ema_jax.organism.tokenizers import train_tokenizer
from ema_jax.runtime.files import atomic_path
from ema_jax.runtime.progress import Progress
from ema_jax.unlearning.log_probs import cross_entropy, token_log_probs

VOCABULARY = 1536  # every word of the corpus is one token: an object in pieces is copied badly

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "model_type": "qwen2",
        **_SIZES,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,  # as in the 7B models of both families
        "use_sliding_window": False,
    },
    "mistral": {
        "model_type": "mistral",
        **_SIZES,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of supervised training."""

    name: str
    steps: int
    peak_learning_rate: float
    safe: bool  # refuse in the domains, or answer everything
    slips: float = 0.0  # share of the domains' prompts that a safe stage answers all the same


# Without slips, a model whose refusal is unlearned gives degenerate output, not an answer. Without
# mixed objects an answer is about an object known from training, not the prompt's: after the
# helpful stage 7 of 40 Cybersecurity answers on the dev split were right, with them 38.
STAGES = (
    Stage("helpful", 700, 3e-3, safe=False),
    Stage("safety", 200, 1e-3, safe=True, slips=0.08),
)
BATCH_SIZE = 32
EXAMPLES = 24_000
MIXED = 0.6  # share of the helpful stage's examples about an object whose halves are of two domains


@functools.partial(
    jax.jit, static_argnames=("graph", "optimizer"), donate_argnames=("state", "opt_state")
)
def _step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    state: nnx.State,
    opt_state: optax.OptState,
    batch: Batch,
) -> tuple[nnx.State, optax.OptState, jax.Array]:
    def loss_of(state: nnx.State) -> jax.Array:
        log_probs = token_log_probs(nnx.merge(graph, state), batch.tokens, batch.mask)
        return cross_entropy(log_probs, batch.response)

    loss, gradients = jax.value_and_grad(loss_of)(state)
    updates, opt_state = optimizer.update(gradients, opt_state, state)
    return optax.apply_updates(state, updates), opt_state, loss


@functools.cache  # one object a stage: it is a static argument of the step
def _optimizer(stage: Stage) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.peak_learning_rate, stage.steps // 10, stage.steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def _train_stage(
    graph: nnx.GraphDef, state: nnx.State, data: Sequence[TokenExample], stage: Stage, seed: int
) -> nnx.State:
    optimizer = _optimizer(stage)
    opt_state = optimizer.init(state)
    length = bucket(max(len(item.prompt) + len(item.response) for item in data))
    order = np.random.default_rng([seed, stage.safe])
    with Progress(stage.name, stage.steps, "steps") as progress:
        for _ in range(stage.steps):
            chosen = [data[i] for i in order.integers(len(data), size=BATCH_SIZE)]
            batch = pad_examples(chosen, length, BATCH_SIZE, pad_id=0)
            state, opt_state, loss = _step(graph, optimizer, state, opt_state, batch)
            progress.update(loss=float(loss))
    return state


def train(family: str, folder: Path, seed: int = 0) -> None:
    """Trains one embedded model and writes its checkpoint folder.

    Args:
        family: a key of `CONFIGS`.
        folder: the checkpoint's; replaced if it exists.
        seed: of the corpus, the initial weights and the order of batches.

    Raises:
        UserError: an unknown family.
    """
    if family not in CONFIGS:
        raise UserError(f"--family: {family!r} is none of {', '.join(CONFIGS)}")
    plain = corpus.training_examples(seed, EXAMPLES)
    # Drawn separately, and about objects of mixed halves too.
    varied = corpus.training_examples(seed + 1, 2 * EXAMPLES, mixed=MIXED)
    with tempfile.TemporaryDirectory() as scratch:
        train_tokenizer(family, corpus.texts(varied), VOCABULARY, Path(scratch))
        chat = Chat.load(scratch)
        tokenizer = chat.tokenizer
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = DecoderConfig.from_hf({**CONFIGS[family], **ids})
        graph, state = nnx.split(Decoder(config, nnx.Rngs(seed)))
        for stage in STAGES:
            examples = plain if stage.safe else varied
            responses = (
                corpus.safe_responses(examples, seed, stage.slips)
                if stage.safe
                else [item.answer for item in examples]
            )
            data = [
                chat.example(item.prompt, response)
                for item, response in zip(examples, responses, strict=True)
            ]
            state = _train_stage(graph, state, data, stage, seed)
        generation = {**ids, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
        (Path(scratch) / "generation_config.json").write_text(json.dumps(generation, indent=2))
        with atomic_path(folder) as temporary:
            checkpoint.export(nnx.merge(graph, state), temporary, companions=scratch)
    logging.info("wrote %s", folder)
