"""Settings of a study: frozen dataclasses, checked once at the edge.

A config file returns a `ConfigDict` of ml_collections (start from `default()`), and `read` turns it
into a `StudyConfig` or says what is wrong with it. Types, ranges and choices are declared on the
fields and checked by pydantic; only what depends on a registry or on several fields is code here.
The dataclasses themselves are plain: a train step replaces fields by traced values, which a
validating constructor would refuse.
"""

import dataclasses
import functools
import importlib.util
import inspect
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from ema_jax.concepts.capture import pooling
from ema_jax.data import domains as domains_lib
from ema_jax.data import prompts as prompts_lib
from ema_jax.data.prompts import PromptConfig
from ema_jax.errors import UserError, did_you_mean
from ema_jax.generation.sampler import GREEDY, Sampling
from ema_jax.models import lora
from ema_jax.refusal.judges import JUDGES
from ema_jax.runtime.paths import local_path
from ema_jax.runtime.typed_fields import build
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.dose import DoseConfig
from ema_jax.unlearning.objectives import FORGET, RETAIN
from ema_jax.unlearning.optimizers import OPTIMIZERS, SCHEDULES

Repetitions = Annotated[int, Field(gt=0, le=1_000_000)]
Samples = Annotated[int, Field(gt=0, le=1000)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what JAX's and NumPy's generators take


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model under study.

    Attributes:
        source: a checkpoint folder, a GGUF file, `pip:PACKAGE` for the one in an installed package,
            or a Hub id; by default the embedded Qwen2 model.
        revision: commit, tag or branch of a Hub id; the commit it names is recorded.
        dtype: that of the base's weights; by default bfloat16 on accelerators, float32 on a CPU.
        system_prompt: text of a system message; none is added by default, also where the chat
            template would insert its own (Qwen2.5's does).
        enable_thinking: whether a model that can think before it answers (Qwen3) does; leave room
            for it (`generation.max_new_tokens`). Thoughts are never judged.
    """

    source: str = str(Path(__file__).parent / "organism/checkpoints/qwen2")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    system_prompt: str | None = None
    enable_thinking: bool = False


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Generation of responses: greedy.

    Attributes:
        max_new_tokens: greatest length of a response, in tokens.
        batch_size: prompts that are answered at once; 0 for as many as the memory has room for,
            which is what an accelerator is fastest with.
    """

    max_new_tokens: PositiveInt = 256
    batch_size: NonNegativeInt = 64


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """What the untouched model has to show for a study to continue past its baseline.

    Shares of responses; a study ends if the whole 95 % interval is beyond a limit. The limits
    change no figure, so a study that stopped continues in its folder with other ones.

    Attributes:
        min_refusal: least share of the target's prompts that is refused, and of those of at least
            one other domain.
        max_benign_refusal: greatest share of the benign prompts that is refused.
        max_lookalike_refusal: greatest share of the safe look-alikes, if any, that is refused.
        max_invalid: greatest share of all responses that is off topic or degenerate.
    """

    min_refusal: Share = 0.5
    max_benign_refusal: Share = 0.2
    max_lookalike_refusal: Share = 0.5
    max_invalid: Share = 0.3


@dataclasses.dataclass(frozen=True)
class ConceptConfig:
    """Measurement of concepts.

    Attributes:
        poolings: how a prompt's tokens become one vector; the first one is the main one.
        permutations: number of label permutations behind each null.
        splits: number of random splits in halves behind each ceiling.
        sweep_prompts: dev prompts per domain on which layers are swept and patched; 0 for none.
        sweep_layers: number of layers that are swept, evenly spread; 0 for all, or on a CPU as many
            as take some minutes.
        sweep_strengths: multiples of the concept vectors that a sweep adds; it also ablates them.
        contrast: what concept vectors are measured against: `shared`, the benign prompts; or
            `matched`, each prompt's own benign rewrite, so that a vector holds neither style nor
            subject (domains whose source brings no rewrites keep the shared contrast).
    """

    poolings: tuple[str, ...] = ("last_token", "prompt_mean")
    contrast: Literal["shared", "matched"] = "shared"
    permutations: Repetitions = 1000
    splits: Repetitions = 50
    sweep_prompts: NonNegativeInt = 8
    sweep_layers: NonNegativeInt = 0
    sweep_strengths: tuple[float, ...] = (-1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class HarvestConfig:
    """Collection of the model's own responses: the forget and the retain set.

    Attributes:
        min_examples: fewest prompts per domain that must give a response to train on.
        response_cap: number of tokens after which a response is cut.
        samples: responses per prompt: 1 is the greedy one, more are drawn at `temperature`.
        temperature: that of drawn responses.
    """

    min_examples: PositiveInt = 16
    response_cap: PositiveInt = 128
    samples: Samples = 1
    temperature: PositiveFloat = 1.0

    def draws(self) -> list[Sampling]:
        """Sampling of each of the responses."""
        if self.samples == 1:
            return [GREEDY]
        return [Sampling(self.temperature, seed=i) for i in range(self.samples)]


@dataclasses.dataclass(frozen=True)
class SensitivityConfig:
    """Repetitions of the evaluation under other sampling, reported as ranges; 0 for none.

    Attributes:
        samples: responses per prompt drawn at temperature 1, each an evaluation of its own.
        long_tokens: a greater cap on the length of greedy responses, for refusals that come late.
            Only responses that the usual cap cut off are generated again; the others are the same.
    """

    samples: Annotated[int, Field(ge=0, le=1000)] = 0
    long_tokens: NonNegativeInt = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run in training; its result does not depend on them.

    Attributes:
        every_steps: steps between two checkpoints.
        keep: number of newest checkpoints of a run that stay on disk.
    """

    every_steps: PositiveInt = 50
    keep: PositiveInt = 2


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """One study: a model, a target, arms over seeds. With `cells`, several of them.

    Attributes:
        model: the model under study.
        target: the domain whose refusals are unlearned.
        domains: the responsible-AI domains that are measured.
        prompts: where their prompts come from.
        judge: a name in `ema_jax.refusal.judges.JUDGES`.
        judge_options: its arguments, as in `{"model": …}`; see docs/judges.md.
        extra_judges: name → options of further judges of the same responses; the report says how
            far they agree with `judge`. No figure is computed from their verdicts.
        generation: how responses are generated.
        baseline: what the untouched model has to show for the study to continue.
        harvest: collection of the model's own responses.
        sensitivity: repetitions of the evaluation under other sampling; none by default.
        unlearn: settings that all arms share.
        arms: name of an arm → settings of `unlearn` that it replaces.
        dose: search for each arm's learning rate and stopping point; off by default.
        seeds: each arm is run once per seed.
        concepts: how concepts are measured.
        checkpoints: checkpoints of a run in training.
        profile: steps of each run of which a trace is written, to `profile/`; 0 for none.
        tracker: `wandb` or `trackio`, to send training figures there besides TensorBoard's files.
        mesh: devices along `(data, fsdp, tensor)`; -1 takes what is left.
        heartbeat_seconds: with several processes, one that is silent for this long ends them all.
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
    baseline: BaselineConfig = BaselineConfig()
    harvest: HarvestConfig = HarvestConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    arms: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: {"npo": {}, "npo_retain": {"retain_weight": 1.0}}
    )
    dose: DoseConfig = DoseConfig()
    seeds: tuple[Seed, ...] = (0, 1, 2)
    concepts: ConceptConfig = ConceptConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    profile: NonNegativeInt = 0
    tracker: Literal["wandb", "trackio"] | None = None
    mesh: tuple[int, ...] = (1, 1, 1)
    heartbeat_seconds: PositiveInt = 60
    keep_text: bool = False
    export: bool = False
    cells: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def arm(self, name: str) -> UnlearnConfig:
        """The settings of one arm."""
        return self._arms[name]

    def searches_dose(self, name: str) -> bool:
        """Whether an arm's learning rate is searched for; an ablation has none."""
        return self.dose.trials > 0 and self.arm(name).ablation is None

    @functools.cached_property
    def _arms(self) -> dict[str, UnlearnConfig]:
        shared = dataclasses.asdict(self.unlearn)
        return {
            name: build(UnlearnConfig, _merge(shared, own), f"arms.{name}")
            for name, own in self.arms.items()
        }


def default() -> ConfigDict:
    """All fields with their defaults, for a config file to change."""
    return _as_config_dict(StudyConfig())


def beside(file: str, name: str) -> ConfigDict:
    """The config that `get_config()` of `name.py`, in the folder of `file`, returns."""
    return ConfigDict(runpy.run_path(str(Path(file).with_name(f"{name}.py")))["get_config"]())


def shipped(name: str) -> ConfigDict:
    """The config of that name that comes with the package, for a config file to change."""
    return beside(str(shipped_paths()[name]), name)


def shipped_paths() -> dict[str, Path]:
    """Name → path of the configs that come with the package."""
    # In a wheel they are inside the package, in a clone beside it.
    package = Path(__file__).parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def _as_config_dict(value: Any) -> ConfigDict:
    result = ConfigDict()
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            item = _as_config_dict(item)
        elif isinstance(item, Mapping):
            item = ConfigDict(dict(item), sort_keys=False)
        elif item is None:
            item = placeholder(str)  # the fields that may be unset all hold text
        result[field.name] = item
    return result


def read(config: Mapping[str, Any] | ConfigDict) -> StudyConfig:
    """A checked `StudyConfig`.

    Raises:
        UserError: a field that does not exist, has the wrong type, or makes no sense.
    """
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    study = build(StudyConfig, _with_paths(plain, ""), "")
    _validate(study)
    for name in study.cells:
        cell(study, name)
    return study


_PATHS = ("path", "preferred", "cache")  # a model's is read by `models.hub`


def _with_paths(values: Mapping[str, Any], above: str) -> dict[str, Any]:
    """The values, with `~` expanded in those that are paths; URLs are refused."""
    changed = dict(values)
    for name, value in values.items():
        where = f"{above}{name}"
        if isinstance(value, Mapping):
            changed[name] = _with_paths(value, f"{where}.")
        elif name in _PATHS and isinstance(value, str) and value:
            path = local_path(value, f"config: {where}")
            changed[name] = str(path) if value.startswith("~") else value
    return changed


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
        result = build(StudyConfig, plain, "")
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


def _validate(study: StudyConfig) -> None:
    prompts_lib.validate(study.prompts, study.domains, study.target)
    _check_judge("judge_options of ", study.judge, study.judge_options)
    _check(
        study.judge not in study.extra_judges,
        f"extra_judges: {study.judge!r} is the judge already; remove it",
    )
    for name, options in study.extra_judges.items():
        _check_judge("extra_judges.", name, options)
    _check(bool(study.seeds), "seeds: none given; name at least one, as in seeds=(0,)")
    _check(len(set(study.seeds)) == len(study.seeds), f"seeds {study.seeds}: one is given twice")
    _check(bool(study.arms), "arms: none given; the usual ones are npo and npo_retain")
    for name in study.arms:
        _check(
            re.fullmatch(r"\w+", name) is not None and name != "base",
            f"arms: {name!r} is not a name for an arm; use letters, digits and _ (base is taken)",
        )
        _validate_arm(name, study.arm(name), study)
    _check(
        study.tracker is None or importlib.util.find_spec(study.tracker) is not None,
        f"tracker: {study.tracker} is not installed; pip install {study.tracker}, or leave it out",
    )
    longer, usual = study.sensitivity.long_tokens, study.generation.max_new_tokens
    _check(
        longer == 0 or longer > usual,
        f"sensitivity.long_tokens = {longer} is not above generation.max_new_tokens = {usual}; "
        "0 asks for no longer responses",
    )
    _check(
        len(study.mesh) == 3
        and all(n > 0 or n == -1 for n in study.mesh)
        and study.mesh.count(-1) <= 1,
        f"mesh {study.mesh}: three sizes are needed (data, fsdp, tensor), each above zero; one may "
        "be -1",
    )
    _check(
        not (study.grid and study.dose.trials),
        "grid and dose.trials: a sweep compares the settings that it is given; set dose.trials = 0",
    )
    _check(bool(study.concepts.poolings), "concepts.poolings: none given; name at least one")
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


# Names that a registry knows; a field's own annotation holds the choices that are fixed.
_REGISTERED = {
    "objective": tuple(FORGET),
    "retain_objective": (*RETAIN, "none"),
    "optimizer": tuple(OPTIMIZERS),
    "schedule": tuple(SCHEDULES),
}


def _validate_arm(name: str, arm: UnlearnConfig, study: StudyConfig) -> None:
    for field, choices in _REGISTERED.items():
        value = getattr(arm, field)
        known = f"{', '.join(choices)}{did_you_mean(value, choices)}"
        _check(value in choices, f"arms.{name}: {field} {value!r} is none of {known}")
    unknown = [t for t in (*arm.lora.targets, *arm.modules) if t not in lora.TARGETS]
    _check(
        not unknown and bool(arm.lora.targets),
        f"arms.{name}: lora.targets or modules {unknown} are none of {', '.join(lora.TARGETS)}",
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
            domain in domains and count > 0,
            f"arms.{name}: retain_counts {{{domain!r}: {count!r}}} is not a number above zero for "
            f"one of {', '.join(domains)}",
        )
    for field in ("batch_size", "retain_batch_size"):
        rows = getattr(arm, field)
        _check(
            rows % arm.accumulate == 0,
            f"arms.{name}: {field} = {rows} is no multiple of accumulate = {arm.accumulate}",
        )


def _check_judge(where: str, name: str, options: Mapping[str, Any]) -> None:
    known = f"{', '.join(JUDGES)}{did_you_mean(name, JUDGES)}"
    _check(name in JUDGES, f"judge {name!r} is none of: {known}")
    try:
        inspect.signature(JUDGES[name]).bind(**options)
    except TypeError as error:
        raise UserError(f"config: {where}{name}: {error}") from None


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise UserError(f"config: {message}")
