"""What a study is told: frozen dataclasses, checked once at the edge.

The only module that knows ml_collections: a config file returns a `ConfigDict` (start from
`default()`), and `read` turns it into a `StudyConfig` or says what is wrong with it.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ema_jax.concepts.capture import pooling
from ema_jax.data import domains as domains_lib
from ema_jax.data import prompts as prompts_lib
from ema_jax.data.prompts import PromptConfig
from ema_jax.errors import UserError
from ema_jax.generation.sampler import GREEDY, Sampling
from ema_jax.models import lora
from ema_jax.refusal.judges import JUDGES
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import FORGET, RETAIN
from ema_jax.unlearning.optimizers import OPTIMIZERS, SCHEDULES


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model under study.

    Attributes:
        source: a checkpoint folder or a Hub id.
        revision: commit, tag or branch of a Hub id; the commit it names is recorded.
        dtype: of the base's weights; by default bfloat16 on accelerators, float32 on a CPU.
        system_prompt: text of a system message; none is added by default, also where the chat
            template would slip in its own (Qwen2.5's does).
        enable_thinking: whether a model that can do either (Qwen3) thinks before it answers; give
            it the tokens for it (`generation.max_new_tokens`). Thoughts are never judged.
    """

    source: str = "ema_jax/organism/checkpoints/qwen2"
    revision: str | None = None
    dtype: str | None = None
    system_prompt: str | None = None
    enable_thinking: bool = False


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How responses are generated: greedily, `batch_size` of them side by side."""

    max_new_tokens: int = 256
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class ConceptConfig:
    """How concepts are measured.

    Attributes:
        poolings: how a prompt's tokens become one vector; the first one is the main one.
        permutations: label permutations behind each null.
        splits: random halves behind each ceiling.
        sweep_prompts: dev prompts per domain on which layers are swept and patched; 0 for none.
        sweep_strengths: multiples of the concept vectors that a sweep adds, beside ablation.
    """

    poolings: tuple[str, ...] = ("last_token", "prompt_mean")
    permutations: int = 1000
    splits: int = 50
    sweep_prompts: int = 8
    sweep_strengths: tuple[float, ...] = (-1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class HarvestConfig:
    """What becomes of the model's own responses.

    Attributes:
        min_examples: fewest prompts per domain that must give one.
        response_cap: longest response kept, in tokens.
        samples: responses per prompt: 1 is the greedy one, more are drawn at `temperature`.
        temperature: of the draws.
    """

    min_examples: int = 16
    response_cap: int = 128
    samples: int = 1
    temperature: float = 1.0

    def draws(self) -> list[Sampling]:
        """How each of the samples is drawn."""
        if self.samples == 1:
            return [GREEDY]
        return [Sampling(self.temperature, seed=i) for i in range(self.samples)]


@dataclasses.dataclass(frozen=True)
class SensitivityConfig:
    """Other ways of asking the evaluation prompts, reported as ranges; 0 for none.

    Attributes:
        samples: responses a prompt drawn at temperature 1, each a way of its own.
        long_tokens: a greater cap on the length of greedy responses, for refusals that come late.
            Only those that the usual cap cut off are asked for again; the others are the same.
    """

    samples: int = 0
    long_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How the state of a run in training is kept; what it learns does not depend on it.

    Attributes:
        every_steps: steps between two checkpoints.
        keep: how many of a run's newest are kept.
    """

    every_steps: int = 50
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """One study: a model, a target, arms over seeds. With `cells`, several of them.

    Attributes:
        model: the model under study.
        target: the domain whose refusals are unlearned.
        domains: the responsible-AI domains that are measured.
        prompts: where their prompts come from.
        judge: a name in `ema_jax.refusal.judges.JUDGES`.
        judge_options: what it needs to be told, as in `{"model": …}`; see docs/judges.md.
        extra_judges: name → options of judges whose verdicts on the same responses are recorded
            beside; the report says how far they agree. No figure is computed from them.
        generation: how responses are generated.
        harvest: what becomes of the model's own responses.
        sensitivity: other ways of asking the evaluation prompts; none by default.
        unlearn: settings that all arms share.
        arms: name → settings of `unlearn` that this arm replaces.
        seeds: each arm is run once per seed.
        concepts: how concepts are measured.
        checkpoints: how the state of a run in training is kept.
        profile: steps of each run of which a trace is written, to `profile/`; 0 for none.
        mesh: devices along `(data, fsdp, tensor)`; -1 takes what is left.
        heartbeat_seconds: of several processes, one that is silent for as long ends them all.
        keep_text: keep model responses in artifacts and report; by default only their hashes.
        export: also write every trained model as a merged checkpoint.
        cells: for a replication: name → fields that this cell replaces, nested as in the config.
        grid: for a sweep: fields, nested as in the config, each with a tuple of its values.
    """

    model: ModelConfig = ModelConfig()
    target: str = "cybersecurity"
    domains: tuple[str, ...] = domains_lib.DOMAINS
    prompts: PromptConfig = PromptConfig()
    judge: str = "lexical"
    judge_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra_judges: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    generation: GenerationConfig = GenerationConfig()
    harvest: HarvestConfig = HarvestConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    arms: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: {"npo": {}, "npo_retain": {"retain_weight": 1.0}}
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    concepts: ConceptConfig = ConceptConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    profile: int = 0
    mesh: tuple[int, ...] = (1, 1, 1)
    heartbeat_seconds: int = 60
    keep_text: bool = False
    export: bool = False
    cells: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def arm(self, name: str) -> UnlearnConfig:
        """The settings of one arm."""
        return self._arms[name]

    @functools.cached_property
    def _arms(self) -> dict[str, UnlearnConfig]:
        shared = dataclasses.asdict(self.unlearn)
        return {
            name: _build(UnlearnConfig, _merge(shared, own), f"arms.{name}")
            for name, own in self.arms.items()
        }


def default() -> ConfigDict:
    """All fields with their defaults, for a config file to change."""
    return _as_config_dict(StudyConfig())


def beside(file: str, name: str) -> ConfigDict:
    """What `get_config()` of `name.py` in the folder of `file` returns, to start from."""
    return ConfigDict(runpy.run_path(str(Path(file).with_name(f"{name}.py")))["get_config"]())


def _as_config_dict(value: Any) -> ConfigDict:
    result = ConfigDict()
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            item = _as_config_dict(item)
        elif isinstance(item, Mapping):
            item = ConfigDict(dict(item), sort_keys=False)
        elif item is None:
            kinds = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
            item = placeholder(kinds[0])
        result[field.name] = item
    return result


def read(config: Mapping[str, Any] | ConfigDict) -> StudyConfig:
    """A checked `StudyConfig`.

    Raises:
        UserError: a field that does not exist, has the wrong type, or makes no sense.
    """
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    study = _build(StudyConfig, plain, "")
    _validate(study)
    for name in study.cells:
        cell(study, name)
    return study


def cell(study: StudyConfig, name: str) -> StudyConfig:
    """One study of a replication: its fields in place of the shared ones."""
    return replaced(study, study.cells[name], f"cells.{name}")


def replaced(study: StudyConfig, changes: Mapping[str, Any], where: str) -> StudyConfig:
    """One study out of several: with some fields changed, nested as in the config.

    Raises:
        UserError: what `read` finds wrong, with `where` in front.
    """
    shared = dataclasses.asdict(dataclasses.replace(study, cells={}, grid={}))
    plain = _merge(shared, changes)
    try:
        result = _build(StudyConfig, plain, "")
        _validate(result)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return result


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(kind: Any, values: Mapping[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    built = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            mend = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(fields)}"
            raise UserError(f"config: unknown field {where!r}; {mend}")
        built[name] = _convert(hints[name], value, where)
    return kind(**built)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(kind, value, where)
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        nested = typing.get_origin(arguments[1]) is Mapping
        for key, item in value.items():
            if nested and not isinstance(item, Mapping):
                raise UserError(f"config: {where}.{key} = {item!r} is not a set of fields")
        return {str(k): dict(v) if isinstance(v, Mapping) else v for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(kind, type)
        and isinstance(value, kind)
        and isinstance(value, bool) == (kind is bool)
    ):
        return value
    name = getattr(kind, "__name__", str(kind))
    raise UserError(f"config: {where} = {value!r} is not a {name}")


_POSITIVE = (
    "heartbeat_seconds",
    "generation.max_new_tokens",
    "generation.batch_size",
    "harvest.min_examples",
    "harvest.response_cap",
    "harvest.samples",
    "harvest.temperature",
    "concepts.permutations",
    "concepts.splits",
    "checkpoints.every_steps",
    "checkpoints.keep",
)
_ARM_POSITIVE = (
    "beta",
    "learning_rate",
    "clip_norm",
    "batch_size",
    "retain_batch_size",
    "max_steps",
    "eval_every",
    "accumulate",
    "length_pool",
    "steering",
    "lora.rank",
    "lora.alpha",
)
_ARM_NOT_NEGATIVE = (
    "forget_weight",
    "retain_weight",
    "warmup_steps",
    "min_steps",
    "weight_decay",
    "margin",
    "feature_layer",
)
_ARM_CHOICES = {
    "trainable": ("lora", "full", "ablation"),
    "objective": tuple(FORGET),
    "retain_objective": (*RETAIN, "none"),
    "forget_norm": ("sum", "mean"),
    "optimizer": tuple(OPTIMIZERS),
    "schedule": tuple(SCHEDULES),
    "remat_policy": ("full", "dots"),
}


def _validate(study: StudyConfig) -> None:
    prompts_lib.validate(study.prompts, study.domains, study.target)
    for path in _POSITIVE:
        _check(_get(study, path) > 0, f"{path} = {_get(study, path)} is not above zero")
    _check_judge("judge_options of ", study.judge, study.judge_options)
    _check(
        study.judge not in study.extra_judges,
        f"extra_judges: {study.judge!r} is the judge already; leave it away",
    )
    for name, options in study.extra_judges.items():
        _check_judge("extra_judges.", name, options)
    _check(bool(study.seeds), "seeds: none given; name at least one, as in seeds=(0,)")
    _check(len(set(study.seeds)) == len(study.seeds), f"seeds {study.seeds}: one is given twice")
    _check(min(study.seeds) >= 0, f"seeds {study.seeds}: a seed is not below zero")
    _check(bool(study.arms), "arms: none given; the usual ones are npo and npo_retain")
    for name in study.arms:
        _check(
            re.fullmatch(r"\w+", name) is not None and name != "base",
            f"arms: {name!r} is not a name for an arm; use letters, digits and _ (base is taken)",
        )
        arm = study.arm(name)
        for path in _ARM_POSITIVE:
            value = _get(arm, path)
            _check(0 < value < math.inf, f"arms.{name}: {path} = {value} is not above zero")
        for path in _ARM_NOT_NEGATIVE:
            value = _get(arm, path)
            _check(0 <= value < math.inf, f"arms.{name}: {path} = {value} is below zero")
        _validate_arm(name, arm, study)
        _check(0 <= arm.stop_at < 1, f"arms.{name}: stop_at = {arm.stop_at} is not in [0, 1)")
        _check(
            0 <= arm.max_invalid <= 1,
            f"arms.{name}: max_invalid = {arm.max_invalid} is not in [0, 1]",
        )
        unknown = [t for t in (*arm.lora.targets, *arm.modules) if t not in lora.TARGETS]
        _check(
            not unknown and bool(arm.lora.targets),
            f"arms.{name}: lora.targets or modules {unknown} are none of {', '.join(lora.TARGETS)}",
        )
    _check(study.sensitivity.samples >= 0, "sensitivity.samples is below zero")
    longer, usual = study.sensitivity.long_tokens, study.generation.max_new_tokens
    _check(
        longer == 0 or longer > usual,
        f"sensitivity.long_tokens = {longer} is not above generation.max_new_tokens = {usual}; "
        "0 asks for no longer responses",
    )
    _check(study.profile >= 0, f"profile = {study.profile} is below zero")
    _check(
        len(study.mesh) == 3
        and all(n > 0 or n == -1 for n in study.mesh)
        and study.mesh.count(-1) <= 1,
        f"mesh {study.mesh}: three sizes are needed (data, fsdp, tensor), each above zero; one may "
        "be -1",
    )
    _check(bool(study.concepts.poolings), "concepts.poolings: none given; name at least one")
    _check(study.concepts.sweep_prompts >= 0, "concepts.sweep_prompts is below zero")
    for name in study.concepts.poolings:
        _check(name != "response_mean", "concepts.poolings: response_mean needs responses")
        try:
            pooling(name)
        except UserError as error:
            raise UserError(f"config: concepts.poolings: {error}") from None
    for name in study.cells:
        _check(
            re.fullmatch(r"[\w-]+", name) is not None,
            f"cells: {name!r} is not a name for a cell; use letters, digits, _ and -",
        )
    _check(study.model.dtype in (None, "float32", "bfloat16"), "model.dtype: float32 or bfloat16")


def _validate_arm(name: str, arm: UnlearnConfig, study: StudyConfig) -> None:
    for field, choices in _ARM_CHOICES.items():
        value = getattr(arm, field)
        _check(value in choices, f"arms.{name}: {field} {value!r} is none of {', '.join(choices)}")
    _check(
        0 <= arm.lora.dropout < 1, f"arms.{name}: lora.dropout = {arm.lora.dropout} not in [0, 1)"
    )
    _check(
        not arm.layers or (len(arm.layers) == 2 and 0 <= arm.layers[0] <= arm.layers[1]),
        f"arms.{name}: layers {arm.layers} is not (first, last), as in (2, 5)",
    )
    _check(
        arm.trainable == "full" or not arm.modules,
        f"arms.{name}: modules is for trainable = 'full'; adapters have lora.targets",
    )
    domains = (*study.domains, domains_lib.BENIGN)
    for domain, count in arm.retain_counts.items():
        _check(
            domain in domains and isinstance(count, int) and count > 0,
            f"arms.{name}: retain_counts {{{domain!r}: {count!r}}} is not a number above zero for "
            f"one of {', '.join(domains)}",
        )
    if FORGET[arm.objective].preferred and arm.preferred not in ("idk", "organism"):
        _check(
            Path(arm.preferred).is_file(),
            f"arms.{name}: preferred {arm.preferred!r} is neither 'idk', 'organism' nor a file",
        )
    for field in ("batch_size", "retain_batch_size"):
        rows = getattr(arm, field)
        _check(
            rows % arm.accumulate == 0,
            f"arms.{name}: {field} = {rows} is no multiple of accumulate = {arm.accumulate}",
        )


def _check_judge(where: str, name: str, options: Mapping[str, Any]) -> None:
    _check(name in JUDGES, f"judge {name!r} is none of: {', '.join(JUDGES)}")
    try:
        inspect.signature(JUDGES[name]).bind(**options)
    except TypeError as error:
        raise UserError(f"config: {where}{name}: {error}") from None


def _get(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise UserError(f"config: {message}")
