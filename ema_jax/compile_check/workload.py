"""Shapes of the programs that a study runs, from its config alone."""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ema_jax.config import ModelConfig, StudyConfig
from ema_jax.data.batching import ROWS, bucket
from ema_jax.data.chat import TokenExample
from ema_jax.errors import UserError
from ema_jax.models import hub
from ema_jax.models.cache import rows_that_fit
from ema_jax.models.config import DecoderConfig
from ema_jax.models.sharding import batch_multiple
from ema_jax.unlearning.batches import Data, StepBatch
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import FORGET
from ema_jax.unlearning.remat import choose_remat

_SHAPES = resources.files("ema_jax.models") / "shapes"

Lengths = Literal["full", "drawn"]
"""Lengths of the training examples: all as long as a row, or as different as responses are."""


def architecture(model: ModelConfig) -> DecoderConfig:
    """Architecture of a model, without its weights and without a network.

    From `config.json` of a folder or of a cached Hub snapshot, or else from the sizes that come
    with the package (`ema_jax/models/shapes`).

    Raises:
        UserError: a Hub id that is neither in the cache nor among those sizes.
    """
    found = hub.cached(model.source, model.revision)
    if found is not None:
        return DecoderConfig.from_folder(found[0])
    file = _SHAPES / f"{model.source.replace('/', '--')}.json"
    if not file.is_file():
        known = sorted(path.name[: -len(".json")].replace("--", "/") for path in _SHAPES.iterdir())
        raise UserError(
            f"{model.source}: not in the local cache, and its sizes are not among those that come "
            f"along ({', '.join(known)}); name a folder with its config.json"
        )
    return DecoderConfig.from_hf(json.loads(file.read_text(encoding="utf-8")), where=file.name)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes of the programs that a study runs.

    Attributes:
        model: the architecture.
        dtype: of its weights.
        arm: the arm that needs most memory, of all arms of the study.
        prompt_tokens: padded length of a rendered prompt.
        train_tokens: most tokens of a training example.
        lengths: of the training examples.
        prompt_rows: rows of a forward pass that does not train.
        decode_rows: rows that decode side by side; 0 for as many as fit (`resolved`).
        new_tokens: most tokens of a response.
        poolings: number of poolings in a capture.
        candidates: interventions that a sweep tries at each layer.
    """

    model: DecoderConfig
    dtype: Any
    arm: UnlearnConfig
    prompt_tokens: int
    train_tokens: int
    lengths: Lengths
    prompt_rows: int
    decode_rows: int
    new_tokens: int
    poolings: int
    candidates: int

    @classmethod
    def of(cls, config: StudyConfig, prompt_tokens: int, lengths: Lengths = "full") -> "Workload":
        """Shapes of a config, for prompts of a given length (which only its data would show)."""
        arms = [config.arm(name) for name in config.arms]
        arm = max(arms, key=lambda a: (a.trainable == "full", a.retain_weight > 0, a.batch_size))
        prompt = bucket(prompt_tokens)
        concepts = config.concepts
        return cls(
            model=architecture(config.model),
            dtype=jnp.dtype(config.model.dtype or jnp.bfloat16),
            arm=arm,
            prompt_tokens=prompt,
            train_tokens=bucket(prompt + config.harvest.response_cap),
            lengths=lengths,
            prompt_rows=config.generation.batch_size or ROWS,
            decode_rows=config.generation.batch_size,
            new_tokens=config.generation.max_new_tokens,
            poolings=len(concepts.poolings),
            # Of every domain and of a random direction: each strength, and the ablation.
            candidates=(len(config.domains) + 1) * (len(concepts.sweep_strengths) + 1),
        )

    @property
    def train_rows(self) -> int:
        """Examples per train step, forget and retain together."""
        return self.arm.batch_size + self.arm.retains * self.arm.retain_batch_size

    @property
    def slots(self) -> int:
        """Tokens of a row that decodes."""
        return self.prompt_tokens + self.new_tokens

    @property
    def data(self) -> Data:
        """As many examples as a step takes, of tokens that are all the same."""
        sizes = self.prompt_tokens, self.train_tokens, self.lengths
        return _data(*sizes, self.arm.batch_size, self.arm.retain_batch_size, self.arm.objective)

    def step_batch(self, groups: int = 1) -> StepBatch:
        """A step's batch as training packs it, for rows that so many devices share."""
        return self.data.host_batch(self.arm, 0, 0, groups)


def resolved(work: Workload, mesh: Mesh) -> Workload:
    """The workload with what a study chooses by the memory of its devices.

    That is what a train step keeps (`unlearn.remat = "auto"`) and how many rows decode at once
    (`generation.batch_size = 0`).
    """
    tokens = work.data.pass_tokens(work.arm, batch_multiple(mesh))
    choice = choose_remat(work.model, work.arm, tokens, work.dtype.itemsize, mesh)
    return dataclasses.replace(
        work,
        arm=dataclasses.replace(work.arm, remat=choice.name),
        decode_rows=work.decode_rows or rows_that_fit(work.model, work.slots, work.dtype, mesh),
    )


# Data knows how its batches lie in rows, which takes a second to find: the meshes share it.
@functools.lru_cache(maxsize=16)
def _data(
    prompt: int, tokens: int, lengths: Lengths, batch_size: int, retained: int, objective: str
) -> Data:
    """Examples of at most `tokens`; of full length all have prompts of `prompt` tokens."""

    def side(number: int, seed: int) -> list[TokenExample]:
        sizes = _drawn(number, tokens, seed)
        if lengths == "full":
            sizes = [(prompt, tokens - prompt)] * number
        return [TokenExample((0,) * prompt, (0,) * response) for prompt, response in sizes]

    zeros = np.zeros(batch_size, np.float32)
    data = Data(side(batch_size, 0), zeros, side(retained, 1))
    if not FORGET[objective].preferred:
        return data
    return dataclasses.replace(data, preferred=side(batch_size, 2), preferred_reference=zeros)


def _drawn(number: int, length: int, seed: int) -> list[tuple[int, int]]:
    """Tokens of prompts and responses; the median response takes a fifth of a row, one row all."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(length / 4 * rng.lognormal(0, 0.4, number), 4, length // 2).astype(int)
    responses = np.clip(length / 5 * rng.lognormal(0, 0.8, number), 4, length - prompts).astype(int)
    responses[0] = length - prompts[0]
    return list(zip(prompts.tolist(), responses.tolist(), strict=True))
