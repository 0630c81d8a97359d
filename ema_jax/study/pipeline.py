"""The study, in the order in which the paper tells it.

prompts → baseline → concepts → forecast → harvest → [dose →] unlearn → evaluate → analyse → report

`STAGES` is the whole of it: names, settings, plan and run of a study are derived from its records.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from ema_jax.config import SensitivityConfig, StudyConfig
from ema_jax.data.prompts import Prompt, known_offline
from ema_jax.data.similarity import NEAR
from ema_jax.models.hub import ModelSource
from ema_jax.models.sharding import AXES
from ema_jax.refusal import sheet
from ema_jax.refusal.verdicts import RULES_VERSION
from ema_jax.study import checks, reproduction, results, stage_bodies
from ema_jax.study.artifacts import Artifacts, Run, runs_of
from ema_jax.study.session import ModelSession
from ema_jax.study.watching import Watch
from ema_jax.study.workdir import StageContext, Workdir
from ema_jax.unlearning.trainer import check_arm

Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the study.

    Attributes:
        name: as in `--stage`; the instances of a stage of runs are `NAME/ARM/seed_K`.
        needs: stages that it reads from.
        settings: everything of the config that it depends on, as JSON.
        run: does the work and returns the files that it wrote; see `stage_bodies`.
        of_runs: whether there is one instance for each arm and seed, not one for the study.
        of_doses: whether there is one for each arm whose dose is searched for.
        ablation_needs: stages that it reads from besides, where the arm is an ablation.
        optional: stages that it reads from where they were finished.
        repeatable: other settings make it again. Of the others they make another study, for which
            the folder is refused.
    """

    name: str
    needs: tuple[str, ...]
    settings: Callable[..., Settings]  # of (study), of runs of (study, run)
    run: Callable[..., Iterable[Path]]
    of_runs: bool = False
    of_doses: bool = False
    ablation_needs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    repeatable: bool = False


class Instance(NamedTuple):
    """A stage as it runs: once for the study, or for one of its runs."""

    stage: Stage
    run: Run | None  # of a search for a dose the arm's first

    @property
    def name(self) -> str:
        """The name of its manifest."""
        if self.run is not None and self.stage.of_doses:
            return f"{self.stage.name}/{self.run.arm}"
        return self.stage.name if self.run is None else f"{self.stage.name}/{self.run.folder}"

    @property
    def arguments(self) -> tuple[Run, ...]:
        """The run, for the functions of a stage of runs."""
        return () if self.run is None else (self.run,)


def _prompts(study: "Study") -> Settings:
    config = study.config
    prompts = dataclasses.asdict(config.prompts)
    # Left out at its default: folders made before the field existed can still be resumed.
    if config.prompts.near_split == NEAR:
        del prompts["near_split"]
    return {
        "prompts": prompts,
        "domains": config.domains,
        "target": config.target,
    }


def _judging(study: "Study") -> Settings:
    """Of every stage that asks a model and judges the responses."""
    config = study.config
    found = {
        "model": study.session.settings(),
        "judge": config.judge,
        "judge_options": config.judge_options,
        "generation": dataclasses.asdict(config.generation),
    }
    # Verdicts by other rules must not be mixed with these.
    return found if study.judged_by_first_rules else found | {"verdicts": RULES_VERSION}


def _measuring(study: "Study") -> Settings:
    """Of the stages that ask the evaluation prompts."""
    config = study.config
    found = {**_judging(study), "keep_text": config.keep_text, "extra_judges": config.extra_judges}
    if config.sensitivity != SensitivityConfig():
        found["sensitivity"] = dataclasses.asdict(config.sensitivity)
    return found


def _concepts(study: "Study") -> Settings:
    concepts = study.config.concepts
    found = {
        **_judging(study),
        **({} if concepts.contrast == "shared" else {"contrast": concepts.contrast}),
        "poolings": concepts.poolings,
        "sweep_prompts": concepts.sweep_prompts,
        "sweep_strengths": concepts.sweep_strengths,
    }
    return found | ({"sweep_layers": concepts.sweep_layers} if concepts.sweep_layers else {})


def _forecast(study: "Study") -> Settings:
    concepts = study.config.concepts
    return {"permutations": concepts.permutations, "splits": concepts.splits}


def _harvest(study: "Study") -> Settings:
    return {**_judging(study), "harvest": dataclasses.asdict(study.config.harvest)}


def _unlearn(study: "Study", run: Run) -> Settings:
    found = {**_judging(study), "arm": dataclasses.asdict(study.config.arm(run.arm))}
    if study.config.searches_dose(run.arm):
        found["dose"] = dataclasses.asdict(study.config.dose)
    return found


def _evaluate(study: "Study", run: Run) -> Settings:
    return {**_measuring(study), "export": study.config.export}


def _analyse(study: "Study") -> Settings:
    return {"version": results.VERSION, **sheet.settings(study.artifacts.root)}


STAGES = (
    Stage("prompts", (), _prompts, stage_bodies.make_prompts),
    Stage("baseline", ("prompts",), _measuring, stage_bodies.measure_base),
    Stage("concepts", ("prompts", "baseline"), _concepts, stage_bodies.find_concepts),
    Stage("forecast", ("concepts",), _forecast, stage_bodies.make_forecast, repeatable=True),
    Stage("harvest", ("prompts", "baseline"), _harvest, stage_bodies.harvest_refusals),
    Stage(
        "dose", ("prompts", "baseline", "harvest"), _unlearn, stage_bodies.find_dose, of_doses=True
    ),
    Stage(
        "unlearn",
        ("prompts", "baseline", "harvest", "dose"),
        _unlearn,
        stage_bodies.unlearn,
        of_runs=True,
        ablation_needs=("concepts",),
    ),
    Stage(
        "evaluate",
        ("prompts", "baseline", "concepts", "unlearn"),
        _evaluate,
        stage_bodies.evaluate,
        of_runs=True,
    ),
    Stage(
        "analyse",
        ("prompts", "baseline"),
        _analyse,
        stage_bodies.analyse,
        optional=("forecast", "evaluate"),
        repeatable=True,
    ),
    Stage("report", ("analyse",), lambda study: {}, stage_bodies.report, repeatable=True),
)

NAMES = tuple(stage.name for stage in STAGES)
SHARED = tuple(stage.name for stage in itertools.takewhile(lambda s: s.name != "dose", STAGES))
"""Stages that come before the arms, and do not depend on them."""
OF_RUNS = tuple(stage.name for stage in STAGES if stage.of_runs)
AFTER_RUNS = tuple(name for name in NAMES if name not in (*SHARED, "dose", *OF_RUNS))
"""Stages that compute from what was measured, and ask no model."""


def names(config: StudyConfig) -> list[str]:
    """Names of all instances of a study's stages, in order."""
    return [instance.name for instance in _instances(STAGES, config)]


def _instances(stages: Sequence[Stage], config: StudyConfig) -> Iterator[Instance]:
    """Every stage in order; those of runs follow one another run by run."""

    def kind(stage: Stage) -> tuple[bool, bool]:
        return stage.of_doses, stage.of_runs

    for _, some in itertools.groupby(stages, key=kind):
        several = list(some)
        for run in _runs_of(several[0], config):
            yield from (Instance(stage, run) for stage in several)


def _runs_of(stage: Stage, config: StudyConfig) -> Sequence[Run | None]:
    """The runs that a stage has an instance for; None for one of the study."""
    runs = runs_of(config)
    if stage.of_doses:
        return [r for r in runs if r.seed == config.seeds[0] and config.searches_dose(r.arm)]
    return runs if stage.of_runs else [None]


def _serves(instance: Instance, run: Run) -> bool:
    """Whether an instance is of the study, of this run or, where it is a dose's, of its arm."""
    stage, own = instance
    return own is None or own == run or (stage.of_doses and own.arm == run.arm)


class Study:
    """One study in its folder, of a config and a model."""

    def __init__(
        self,
        config: StudyConfig,
        workdir: Workdir,
        source: ModelSource,
        stages: Sequence[Stage] = STAGES,
    ):
        self.config, self.workdir = config, workdir
        self.session, self.artifacts = ModelSession(config, source), Artifacts(workdir.path)
        self.runs = runs_of(config)
        self._stages, self._checked = stages, False

    def instances(self) -> Iterator[Instance]:
        """Every stage in order; those of runs follow one another run by run."""
        return _instances(self._stages, self.config)

    def settings(self) -> dict[str, Settings]:
        """Instance → settings that tell this study from another."""
        return {
            instance.name: self._settings(instance)
            for instance in self.instances()
            if not instance.stage.repeatable
        }

    def _settings(self, instance: Instance) -> Settings:
        """The settings of an instance: of an older one, those that were recorded then."""
        found = instance.stage.settings(self, *instance.arguments)
        if found.get("keep_text"):  # asked for later: what was finished without text stays so
            made = self.workdir.manifest(instance.name)
            if made is not None:
                found["keep_text"] = made["settings"].get("keep_text", True)
        if instance.name in self.token_files_unrecorded:
            found["model"] = self.session.first_settings()
        return found

    @functools.cached_property
    def token_files_unrecorded(self) -> tuple[str, ...]:
        """Finished instances that did not record template, tokenizer and generation config."""
        made = {each.name: self.workdir.manifest(each.name) for each in self.instances()}
        models = {name: found["settings"].get("model") for name, found in made.items() if found}
        return tuple(name for name, model in models.items() if model and "token_files" not in model)

    def plan(self) -> Iterator[tuple[str, bool]]:
        """Every instance in order, and whether it was finished here."""
        for instance in self.instances():
            yield instance.name, self.workdir.manifest(instance.name) is not None

    def check(self) -> None:
        """Refuses whatever would end the study later on, before a weight is read (`checks`)."""
        if self._checked:
            return
        self.check_settings(self.session.mesh.shape)
        if self.asks_models:
            _ = self.session.judge, self.session.extra_judges  # making them checks them
            self.check_inputs()
        self._checked = True

    def check_settings(self, shape: Mapping[str, int] | None = None) -> None:
        """Checks config and architecture, for a mesh of this shape; by default the config's."""
        decoder = self.session.source.config
        checks.check_config(self.config)
        checks.check_model(self.config, decoder)
        if shape is None:  # -1 is for what devices are left, which only the devices can tell
            sizes = (max(size, 1) for size in self.config.mesh)
            shape = dict(zip(AXES, sizes, strict=True))
        for arm in self.config.arms:
            check_arm(decoder, self.config.arm(arm), shape, f"arms.{arm}")

    def check_inputs(self) -> None:
        """Checks tokenizer and template, and as many prompts as are known without a network."""
        chat, prompts = self.session.chat, self._known_prompts()
        if prompts is not None:
            checks.check_prompts(self.config, self.session.source.config, chat, prompts)

    @property
    def asks_models(self) -> bool:
        """Whether a stage that is wanted and not yet done asks the model, or a judge."""
        return any(
            "judge" in each.stage.settings(self, *each.arguments)
            for each in self.instances()
            if self.workdir.wanted(each.name) and self.workdir.manifest(each.name) is None
        )

    def _known_prompts(self) -> Sequence[Prompt] | None:
        made = self.workdir.manifest("prompts") is not None and self.artifacts.prompts.path.exists()
        if made:
            return [prompt for split in self.artifacts.prompts.read().values() for prompt in split]
        return self.session.prompts if known_offline(self.config.prompts) else None

    def run(self) -> bool:
        """Runs what is wanted and not yet done, in order; returns whether anything was."""
        self.workdir.check(self.settings())
        self.check()
        if self.token_files_unrecorded:
            logging.warning(
                "%s: the stages %s were finished before the chat template, the tokenizer's other "
                "files, the generation config and the Hub revision were recorded; whether these "
                "changed since is not known",
                self.workdir.path,
                ", ".join(self.token_files_unrecorded),
            )
        # What the first rules judged is complete: only its figures may be made again.
        names = AFTER_RUNS if self.judged_by_first_rules else NAMES
        wanted = [
            each
            for each in self.instances()
            if each.stage.name in names and self.workdir.wanted(each.name)
        ]
        watch = Watch(
            self.config,
            self.artifacts,
            [(each.stage.name, each.run) for each in wanted],
            self._measured(),
        )
        times = []
        for instance in wanted:
            shown = instance.stage.name, instance.run
            seconds = self.workdir.run(
                instance.name,
                self._settings(instance),
                self._needs(instance),
                functools.partial(self._work, instance),
                begin=functools.partial(watch.begin, *shown),
                # Results name the study's own settings and date, which its inputs do not.
                of_another=instance.stage.name not in AFTER_RUNS,
            )
            watch.end(*shown, seconds)
            times.append(seconds)
        ran = any(seconds is not None for seconds in times)
        if ran and self.workdir.manifest("analyse") and self.artifacts.results.path.exists():
            reproduction.write(self.config, self.workdir)
        return ran

    def _measured(self) -> Iterator[tuple[str, Run | None, float]]:
        """Seconds of every stage that was finished here."""
        for each in self.instances():
            made = self.workdir.manifest(each.name)
            if made is not None:
                yield each.stage.name, each.run, made["wall_seconds"]

    def _work(self, instance: Instance, context: StageContext) -> Iterable[Path]:
        return instance.stage.run(self.session, self.artifacts, context, *instance.arguments)

    def _needs(self, instance: Instance) -> Iterator[str]:
        """The instances that one reads from."""
        stage, run = instance
        needs = stage.needs
        if run is not None and self.config.arm(run.arm).ablation is not None:
            needs += stage.ablation_needs
        for each in self.instances():
            # Of a stage of runs a run needs its own instance, a stage of the study all of them.
            needed = each.stage.name in needs and (run is None or _serves(each, run))
            there = each.stage.name in stage.optional and self.workdir.manifest(each.name)
            if needed or there:
                yield each.name

    @functools.cached_property
    def judged_by_first_rules(self) -> bool:
        """Whether all responses here were judged by the first rules, which were not recorded."""
        names = ["baseline", *(f"evaluate/{run.folder}" for run in self.runs)]
        made = [self.workdir.manifest(name) for name in names]
        return all(each is not None and "verdicts" not in each["settings"] for each in made)
