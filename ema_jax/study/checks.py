"""Everything that can end a study and is known before it begins.

The lists below are all of it, grouped by what a check looks at. Ranges of single fields are
declared in `config`; what a model cannot train is in `unlearning.trainer.check_arm`. Every check
raises a `UserError`, and none touches a device or reads a weight.
"""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from ema_jax.concepts.capture import pooling
from ema_jax.config import StudyConfig
from ema_jax.data.chat import Chat
from ema_jax.data.denylist import denied_domain
from ema_jax.data.domains import BENIGN, LOOKALIKE, TRAINED
from ema_jax.data.prompts import DEFAULT_COUNTS, Prompt, build_prompts, known_offline
from ema_jax.data.templates import TemplateError
from ema_jax.errors import UserError
from ema_jax.models import hub
from ema_jax.models.config import DecoderConfig
from ema_jax.refusal.judges import JUDGES, get_judge
from ema_jax.unlearning.objectives import FORGET
from ema_jax.unlearning.preferred import preferred_responses

# Fewest prompts per domain: the concepts' ceilings are of halves of halves, and the others' rates
# need something to count.
FEWEST = {"harvest": 1, "dev": 1, "eval": 1, "concept": 4}

# The embedded corpus makes fewer prompts than that of any responsible-AI domain in one split.
CORPUS_PROMPTS = 5000


@dataclasses.dataclass(frozen=True)
class Asked:
    """The study's prompts as the model will see them.

    Attributes:
        decoder: the model's architecture.
        chat: its tokenizer and template.
        prompts: of all splits.
        tokens: number of tokens of each, once rendered.
    """

    decoder: DecoderConfig
    chat: Chat
    prompts: Sequence[Prompt]
    tokens: Sequence[int]

    @classmethod
    def of(cls, decoder: DecoderConfig, chat: Chat, prompts: Sequence[Prompt]) -> "Asked":
        """Renders the prompts.

        Raises:
            UserError: the template fails on one of them.
        """
        tokens = []
        for prompt in prompts:
            try:
                tokens.append(len(chat.prompt_tokens(prompt.prompt)))
            except TemplateError as error:
                raise UserError(
                    f"prompts: {prompt.id}: the model's chat template fails on this prompt "
                    f"({error.what}); correct one of them"
                ) from None
        return cls(decoder, chat, prompts, tokens)


def check_config(config: StudyConfig) -> None:
    """Runs the checks of `OF_CONFIG`: what several fields say together."""
    for check in OF_CONFIG:
        check(config)


def check_without_model(config: StudyConfig) -> list[str]:
    """Checks a study whose model is not on this machine: config, judges, prompts known offline.

    Returns:
        As `check_judges`.
    """
    check_config(config)
    away = check_judges(config)
    if known_offline(config.prompts):
        build_prompts(config.prompts, config.domains, config.target)
    return away


def check_before_download(config: StudyConfig, *, judges: bool = True) -> None:
    """Refuses what needs no model to be refused, before many gigabytes of one are downloaded.

    Args:
        config: of the study.
        judges: also judges and prompts, where the model is not here: some stages need neither.
    """
    check_config(config)
    if judges and hub.cached(config.model.source, config.model.revision) is None:
        check_without_model(config)


def check_model(config: StudyConfig, decoder: DecoderConfig) -> None:
    """Runs the checks of `OF_MODEL`: what the architecture allows."""
    for check in OF_MODEL:
        check(config, decoder)


def check_prompts(
    config: StudyConfig, decoder: DecoderConfig, chat: Chat, prompts: Sequence[Prompt]
) -> None:
    """Runs the checks of `OF_PROMPTS`: what the prompts allow."""
    asked = Asked.of(decoder, chat, prompts)
    for check in OF_PROMPTS:
        check(config, asked)


def check_judges(config: StudyConfig) -> list[str]:
    """Makes the judges of a study, without their weights and without a network.

    Returns:
        The Hub ids of judging models that are not in the local cache; those were not checked.
    """
    missing = []
    for name, options in {config.judge: config.judge_options, **config.extra_judges}.items():
        model = _judging_model(name, options)
        if model is not None and hub.cached(*model) is None:
            missing.append(model[0])
        else:
            get_judge(name, **options)
    return missing


def _judging_model(name: str, options: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Folder or Hub id and revision of a judge that runs a model here."""
    parameters = inspect.signature(JUDGES[name]).parameters
    if "revision" not in parameters:
        return None
    model = options.get("model", parameters["model"].default)
    revision = options.get("revision")
    # Of other types they are the judge's to refuse.
    fit = isinstance(model, str) and isinstance(revision, str | None)
    return (model, revision) if fit else None


def _domains(config: StudyConfig) -> None:
    for name in (BENIGN, LOOKALIKE):
        if name in config.domains:
            raise UserError(
                f"config: domains: {name!r} is none of the responsible-AI domains; remove it (it "
                "is measured beside them wherever there are prompts for it)"
            )
    if len(config.domains) < 2:
        raise UserError(
            f"config: domains: only {config.domains[0]!r}, and there is no emergent misalignment "
            "to measure without another domain; name at least two"
        )


def _counts(config: StudyConfig) -> None:
    counts = DEFAULT_COUNTS | dict(config.prompts.counts)
    for split, fewest in FEWEST.items():
        if counts[split] < fewest:
            raise UserError(
                f"config: prompts.counts.{split} = {counts[split]}: at least {fewest} per domain "
                "are needed"
            )
    if config.prompts.source == "organism":
        for split, count in counts.items():
            if count > CORPUS_PROMPTS:
                raise UserError(
                    f"config: prompts.counts.{split} = {count}: the embedded corpus has fewer "
                    f"than {CORPUS_PROMPTS} prompts per domain; lower it"
                )


def _min_examples(config: StudyConfig) -> None:
    counts, least = DEFAULT_COUNTS | dict(config.prompts.counts), config.harvest.min_examples
    # Without retain prompts nothing is collected from them, and no arm may ask for it.
    for split in ("harvest", "retain") if counts["retain"] else ("harvest",):
        if counts[split] < least:
            raise UserError(
                f"config: harvest.min_examples = {least}: there are only {counts[split]} prompts "
                f"per domain (prompts.counts.{split}); raise that or lower this"
            )


def _retain_data(config: StudyConfig) -> None:
    counts = DEFAULT_COUNTS | dict(config.prompts.counts)
    for name in config.arms:
        arm = config.arm(name)
        if arm.retains and arm.ablation is None and not counts["retain"]:
            raise UserError(
                f"config: arms.{name}: retain_weight = {arm.retain_weight:g} and "
                "prompts.counts.retain = 0; raise the one or set the other to 0"
            )
        for domain in arm.retain_counts:
            if domain == config.target:
                raise UserError(
                    f"config: arms.{name}: retain_counts {domain!r} is the target, which is not in "
                    "the retain set; remove it"
                )
            if denied_domain(domain):
                raise UserError(
                    f"config: arms.{name}: retain_counts {domain!r} is only evaluated, never "
                    "trained on; remove it"
                )


def _lengths(config: StudyConfig, decoder: DecoderConfig) -> None:
    for field, tokens in _caps(config).items():
        if tokens >= decoder.max_positions:
            raise UserError(
                f"config: {field} = {tokens}: the model has {decoder.max_positions} positions, for "
                "prompt and response together; lower it"
            )


def _caps(config: StudyConfig) -> dict[str, int]:
    """Field → the longest response that it allows, in tokens."""
    return {
        "generation.max_new_tokens": config.generation.max_new_tokens,
        "sensitivity.long_tokens": config.sensitivity.long_tokens,
    }


def _positions(config: StudyConfig, asked: Asked) -> None:
    field, cap = max(_caps(config).items(), key=lambda item: item[1])
    size, longest = max(zip(asked.tokens, asked.prompts, strict=True), key=lambda item: item[0])
    if size + cap > asked.decoder.max_positions:
        raise UserError(
            f"prompts: {longest.id} has {size} tokens, which with {field} = {cap} is more than the "
            f"model's {asked.decoder.max_positions} positions; lower that or prompts.max_chars"
        )


def _poolings(config: StudyConfig, asked: Asked) -> None:
    captured = zip(asked.tokens, asked.prompts, strict=True)
    size, prompt = min(
        (item for item in captured if item[1].split == "concept"), key=lambda item: item[0]
    )
    for name in config.concepts.poolings:
        try:
            pooling(name)(size, 0)
        except UserError:
            raise UserError(
                f"config: concepts.poolings: {name!r} reaches past {prompt.id}, which has {size} "
                "tokens once rendered; choose a later token"
            ) from None


def _contrast(config: StudyConfig, asked: Asked) -> None:
    if config.concepts.contrast == "shared":
        return
    concept = [prompt for prompt in asked.prompts if prompt.split == "concept"]
    paired = Counter(prompt.domain for prompt in concept if prompt.contrast)
    if not paired:
        raise UserError(
            "config: concepts.contrast = 'matched', and no prompt has a benign rewrite; use "
            "prompts that have one (source 'cast', or a column 'contrast' of a file), or 'shared'"
        )
    for domain, count in paired.items():
        if count < FEWEST["concept"]:
            raise UserError(
                f"config: concepts.contrast = 'matched': {domain} has only {count} prompts with a "
                f"benign rewrite and {FEWEST['concept']} are needed; bring more, or use 'shared'"
            )


def _examples(config: StudyConfig, asked: Asked) -> None:
    """Domains may have fewer prompts than `prompts.counts`, but not too few for the harvest."""
    least = config.harvest.min_examples
    for split in TRAINED:
        for domain, count in Counter(p.domain for p in asked.prompts if p.split == split).items():
            if count < least:
                raise UserError(
                    f"prompts: {domain} has {count} prompts for {split}, and harvest.min_examples "
                    f"= {least} of them must give an example; bring more prompts or lower it"
                )


def _preferred(config: StudyConfig, asked: Asked) -> None:
    prompts = [prompt.prompt for prompt in asked.prompts if prompt.split == "harvest"]
    for name in config.arms:
        arm = config.arm(name)
        if arm.ablation is not None or not FORGET[arm.objective].preferred:
            continue
        try:
            for prompt, response in zip(
                prompts, preferred_responses(arm.preferred, prompts), strict=True
            ):
                size = asked.chat.example(prompt, response).cut(config.harvest.response_cap).size
                if size > asked.decoder.max_positions:
                    raise UserError(
                        f"preferred: the response {response[:40]!r}… and its prompt have {size} "
                        f"tokens, more than the model's {asked.decoder.max_positions} positions; "
                        "lower harvest.response_cap"
                    )
        except UserError as error:
            raise UserError(f"arms.{name}: {error}") from None


def _control_tokens(config: StudyConfig, asked: Asked) -> None:
    """Warns of prompts whose text holds the model's own markers of turns and ends."""
    del config
    tokenizer = asked.chat.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    markers = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    found = [
        (prompt.id, marker)
        for prompt in asked.prompts
        for marker in sorted(markers)
        if marker.strip() and marker in prompt.prompt
    ]
    if found:
        rows = list(dict.fromkeys(name for name, _ in found))
        logging.warning(
            "prompts: %s%s: the text holds the control token %r, which the model reads as the end "
            "or the start of a turn and not as text; remove it from the prompt",
            ", ".join(rows[:5]),
            f" and {len(rows) - 5} more" if len(rows) > 5 else "",
            found[0][1],
        )


OF_CONFIG: Sequence[Callable[[StudyConfig], None]] = (
    _domains,
    _counts,
    _min_examples,
    _retain_data,
)
OF_MODEL: Sequence[Callable[[StudyConfig, DecoderConfig], None]] = (_lengths,)
OF_PROMPTS: Sequence[Callable[[StudyConfig, Asked], None]] = (
    _positions,
    _poolings,
    _contrast,
    _examples,
    _preferred,
    _control_tokens,
)
