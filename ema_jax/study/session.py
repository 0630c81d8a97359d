"""The model under study: where it is, and everything that a stage does with it or its variants."""

import dataclasses
import functools
import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from ema_jax.concepts.capture import capture
from ema_jax.concepts.store import ActivationStore
from ema_jax.concepts.vectors import LAYER_CONVENTION, relative_to
from ema_jax.config import ModelConfig, StudyConfig
from ema_jax.data import corpus
from ema_jax.data.chat import Chat, TokenExample
from ema_jax.data.domains import BENIGN
from ema_jax.data.prompts import Prompt, build_prompts
from ema_jax.generation.sampler import GREEDY, Sampling
from ema_jax.models import checkpoint, gguf_folder, hub, lora, peft_config
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder
from ema_jax.models.hub import ModelSource
from ema_jax.models.sharding import make_mesh
from ema_jax.refusal.answer_screen import AnswerScreen
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.judges import get_judge
from ema_jax.refusal.responses import JudgedResponses, respond_and_judge
from ema_jax.refusal.verdicts import Judge
from ema_jax.study.artifacts import ACTIVATIONS, Pooled, by_pooling
from ema_jax.unlearning.reference import response_log_probs
from ema_jax.unlearning.utility import perplexity, utility


def find_model(config: ModelConfig, *, download: bool = True) -> ModelSource | None:
    """Finds the model under study and checks all that can be checked without reading weights.

    None for a Hub id that is not in the local cache, unless it is to be downloaded.
    """
    find = hub.find if download else hub.find_cached
    source = find(config.source, config.revision)
    if source is not None:
        Chat.check(source.folder)
    return source


_MOST_KNOWN = 1 << 16  # responses whose log-probabilities are kept

# The last base loaded: the cells of a replication and of a sweep share it.
_loaded: dict[tuple[Path, str | None, Mesh], Decoder] = {}


def _load(folder: Path, dtype: str | None, mesh: Mesh) -> Decoder:
    key = (folder, dtype, mesh)
    if key not in _loaded:
        if _loaded:  # two models are never in memory, not even where a cycle holds the first
            _loaded.clear()
            gc.collect()
        _loaded[key] = checkpoint.load(folder, mesh=mesh, dtype=dtype)
    return _loaded[key]


class ModelSession:
    """The base model with its tokenizer, judges and devices, each made when first needed."""

    def __init__(self, config: StudyConfig, source: ModelSource):
        self.config, self.source = config, source

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices."""
        return make_mesh(self.config.mesh)

    @functools.cached_property
    def base(self) -> Decoder:
        """The untouched model."""
        _ = self.chat  # whose faults are found before weights are read
        return _load(self.source.folder, self.config.model.dtype, self.mesh)

    @functools.cached_property
    def read_base(self) -> Decoder:
        """The base as it is asked and read: by the programs that the arms are read by.

        In bfloat16 an arm's adapters stay apart, so here are some that change nothing. They cost a
        fifth of the base's decoding steps, and save four programs.
        """
        trained = map(self.config.arm, self.config.arms)
        adapted = any(arm.trainable == "lora" for arm in trained)
        if not adapted or self.base.embed[...].dtype == jnp.float32:
            return self.base
        return lora.attach(self.base, self.config.unlearn.lora, jax.random.key(0))

    @functools.cached_property
    def chat(self) -> Chat:
        """Its tokenizer and chat template."""
        config = self.config.model
        return Chat.load(self.source.folder, config.system_prompt, config.enable_thinking)

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """Prompts as the config describes them; those of a public set are downloaded."""
        return build_prompts(self.config.prompts, self.config.domains, self.config.target)

    @functools.cached_property
    def judge(self) -> Judge:
        """The judge whose verdicts every figure is computed from."""
        return get_judge(self.config.judge, **self.config.judge_options)

    @functools.cached_property
    def extra_judges(self) -> list[Judge]:
        """Further judges, whose verdicts are recorded for agreement alone."""
        return [get_judge(name, **given) for name, given in self.config.extra_judges.items()]

    def trained(self, folder: Path) -> Decoder:
        """The model that an arm left in a folder: adapters on the base, or a whole checkpoint."""
        if (folder / peft_config.ADAPTER_CONFIG).exists():
            return lora.folded(lora.load_peft(self.base, folder))
        return checkpoint.load(folder, mesh=self.mesh, dtype=self.config.model.dtype)

    def respond_and_judge(
        self,
        model: Decoder,
        prompts: Sequence[Prompt],
        description: str | None = None,
        sampling: Sampling = GREEDY,
        journal: Path | None = None,
        screen: AnswerScreen | None = None,
        max_new_tokens: int | None = None,
    ) -> JudgedResponses:
        """A model's responses to prompts, judged and, with a screen, screened."""
        generation = dataclasses.asdict(self.config.generation)
        if max_new_tokens is not None:
            generation["max_new_tokens"] = max_new_tokens
        judged = respond_and_judge(
            model,
            self.chat,
            prompts,
            self.judge,
            generation,
            self.mesh,
            description,
            sampling,
            journal,
        )
        return self.screened(judged, screen)

    def screened(
        self, judged: JudgedResponses, screen: AnswerScreen | None, domain: str | None = None
    ) -> JudgedResponses:
        """`invalid` in place of `complied` where a screen finds no answer, in one domain or all."""
        if screen is None:
            return judged
        return judged.screened(screen, self.chat, self.log_probs, domain)

    def calibrated(self, judged: JudgedResponses) -> AnswerScreen | None:
        """The screen that the base's own responses give; None where they are too few."""
        return judged.calibrated_screen(self.chat, self.log_probs)

    def log_probs(self, examples: Sequence[TokenExample]) -> Float[np.ndarray, "N"]:
        """log p of each response under the base, in nats."""
        found = response_log_probs(self.read_base, examples, mesh=self.mesh)
        return np.array([values.sum() for values in found], np.float32)

    def rates(
        self, model: Decoder, prompts: Sequence[Prompt], screen: AnswerScreen | None
    ) -> Evaluation:
        """Refusal rate and shares of each domain of the prompts but benign."""
        asked = [prompt for prompt in prompts if prompt.domain != BENIGN]
        judged = self.respond_and_judge(model, asked)
        if screen is not None:
            judged = judged.screened(screen, self.chat, self._known_log_probs)
        return judged.rates()

    def _known_log_probs(self, examples: Sequence[TokenExample]) -> Float[np.ndarray, "N"]:
        """`log_probs` for rates alone: half of a model's responses are those of some steps before.

        What is written in full is computed again: how examples share rows shows in the last digit.
        """
        known = self._log_probs
        if len(known) > _MOST_KNOWN:
            known.clear()
        new = [example for example in dict.fromkeys(examples) if example not in known]
        known.update(zip(new, self.log_probs(new).tolist(), strict=True))
        return np.array([known[example] for example in examples], np.float32)

    @functools.cached_property
    def _log_probs(self) -> dict[TokenExample, float]:
        return {}

    @property
    def oracle(self) -> Callable[[str, str], bool] | None:
        """Whether a response answers a prompt, where the prompts are of the embedded corpus."""
        return corpus.is_answer if self.config.prompts.source == "organism" else None

    def utility(
        self, model: Decoder, answers: Sequence[TokenExample], judged: JudgedResponses
    ) -> dict[str, float]:
        """Likelihood of the base's benign answers to a model, and of the model's to the base."""
        measured = utility(model, self.base, answers, mesh=self.mesh)
        responses = [
            TokenExample(self.chat.prompt_tokens(prompt.prompt), response.tokens)
            for prompt, response, _ in judged
            if prompt.domain == BENIGN
        ]
        return {
            **measured,
            "benign_perplexity": math.exp(measured["benign_nll"]),
            "response_perplexity": perplexity(self.read_base, responses, mesh=self.mesh),
        }

    def capture(self, model: Decoder, prompts: Sequence[Prompt], folder: Path) -> Pooled:
        """Pooling → domain → residual stream at every layer, a row a prompt, memory-mapped.

        With `concepts.contrast = "matched"`, relative to the prompts' benign rewrites
        (`concepts.vectors.relative_to`).

        Args:
            model: the base, or a variant.
            prompts: of all domains.
            folder: where `ACTIVATIONS` and half of it, for a run that was killed, are written.
        """
        domains = [prompt.domain for prompt in prompts]
        texts = [prompt.prompt for prompt in prompts]
        if self.config.concepts.contrast == "shared":
            return by_pooling(self._pooled(model, texts, domains, folder / ACTIVATIONS))
        plain = self._pooled(model, texts, domains, folder / "plain.safetensors")
        again = [p for p in prompts if p.contrast and p.domain != BENIGN]
        rewrites = self._pooled(
            model,
            [p.contrast for p in again],
            [p.domain for p in again],
            folder / "rewrites.safetensors",
        )
        store = ActivationStore(
            folder / ACTIVATIONS,
            {key: x.shape for key, x in plain.items()},
            {"layer_convention": LAYER_CONVENTION},
        )
        has: dict[str, list[bool]] = {}
        for p in prompts:
            has.setdefault(p.domain, []).append(bool(p.contrast) and p.domain != BENIGN)
        blocks = (
            (key, *block)
            for key, x in plain.items()
            for pooling, domain in [key.split("/")]
            for block in relative_to(
                x, rewrites.get(key, x[:0]), has[domain], plain[f"{pooling}/{BENIGN}"]
            )
        )
        for number, (key, rows, values) in enumerate(blocks):
            if number >= store.done and not store.finished:
                store.commit(number + 1, {key: (rows, values)})
        return by_pooling(store.finish())

    def _pooled(
        self, model: Decoder, texts: Sequence[str], groups: Sequence[str], store: Path
    ) -> dict[str, Float[np.ndarray, "_ L1 D"]]:
        """`POOLING/DOMAIN` → residual stream at every layer, a row a prompt."""
        return capture(
            model,
            [self.chat.prompt_tokens(text) for text in texts],
            poolings=self.config.concepts.poolings,
            groups=groups,
            batch_size=self.config.generation.batch_size,
            mesh=self.mesh,
            store=store,
            model_hash=self.source.fingerprint,
        )

    def settings(self) -> dict[str, Any]:
        """The model's identity, as a stage's settings record it.

        The files come first: where one changed, it is named, and not the hash over all of them.
        """
        tokens = {"token_files": dict(self.source.token_files), "revision": self.source.revision}
        return tokens | self.first_settings() | {"fingerprint": self.source.fingerprint}

    def first_settings(self) -> dict[str, Any]:
        """`settings` as recorded before they covered template, tokenizer and generation config."""
        config = self.config.model
        return {
            "fingerprint": self.source.weights_fingerprint,
            "dtype": config.dtype,
            "system_prompt": config.system_prompt,
            # Only where it is on: folders made before the field existed can still be resumed.
            **({"enable_thinking": True} if config.enable_thinking else {}),
        }

    def describe(self) -> dict[str, Any]:
        """The entry `model` of `results.json`; loads no weights."""
        model = DecoderConfig.from_folder(self.source.folder)
        state = nnx.state(checkpoint.abstract_decoder(model))
        return {
            "id": self.source.id,
            "path": str(self.source.folder),
            "revision": self.source.revision,
            "family": model.family,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state)),
            "quantisation": model.hf.get(gguf_folder.DEQUANTISED_FROM),
            "fingerprint": self.source.fingerprint,
            "template": self.chat.template,
            "template_hash": self.chat.template_hash,
        }
