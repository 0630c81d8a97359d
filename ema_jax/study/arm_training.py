"""Training of one arm on the harvest of a study: data, checkpoints, the record of a failure."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ema_jax.config import StudyConfig
from ema_jax.data.chat import TokenExample
from ema_jax.errors import RunStoppedError
from ema_jax.models.decoder import Decoder
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.runtime import files
from ema_jax.study.artifacts import Artifacts, Run
from ema_jax.study.session import ModelSession
from ema_jax.study.workdir import StageContext
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.dose import DOSE
from ema_jax.unlearning.harvest import Harvested, retained
from ema_jax.unlearning.metrics import MetricsWriter, Profile
from ema_jax.unlearning.objectives import FORGET
from ema_jax.unlearning.preferred import preferred_responses
from ema_jax.unlearning.run_checkpoints import Checkpoints, NonFiniteError
from ema_jax.unlearning.trainer import Trained, unlearn


def train_arm(
    session: ModelSession,
    artifacts: Artifacts,
    context: StageContext,
    run: Run,
    evaluate: Callable[[Decoder], Evaluation],
) -> Trained:
    """Trains an arm with one seed, or resumes where it was stopped.

    Args:
        session: the base model and its tokenizer.
        artifacts: the study's, with its forget and retain sets.
        context: the stage's settings and inputs, to which checkpoints of the run are bound.
        run: the arm and the seed of adapters and batches.
        evaluate: dev rates of a model.

    Raises:
        UserError: retain or preferred examples that the arm needs are missing.
        RunStoppedError: see `unlearn`; the batch of a non-finite loss is in `failures/`.
    """
    study = session.config
    config = arm_settings(study, artifacts, run.arm)
    checkpoints = _checkpoints(session, artifacts, context, run)
    writer = MetricsWriter(artifacts.root, run.arm, run.seed, study.tracker)
    with writer as metrics, checkpoints:
        try:
            return train(
                session,
                artifacts,
                config,
                run.seed,
                evaluate,
                log=metrics,
                checkpoints=checkpoints,
                profile=Profile(artifacts.profile(run), study.profile) if study.profile else None,
            )
        except NonFiniteError as error:
            forget, _ = artifacts.forget_set.read()
            retain = _retain_set(artifacts, config)
            ids = {
                "forget": [forget[i].id for i in error.forget],
                "retain": [retain[i].id for i in error.retain],
            }
            failure = {"step": error.step, "error": str(error), **ids}
            path = artifacts.failure(run).write(failure)
            raise RunStoppedError(f"{error}; its batch is in {path}") from None


def arm_settings(study: StudyConfig, artifacts: Artifacts, arm: str) -> UnlearnConfig:
    """The settings that an arm is trained with: its dose is that of its search, if it had one."""
    settings = study.arm(arm)
    if not study.searches_dose(arm):
        return settings
    found = artifacts.dose(arm).read()
    return dataclasses.replace(settings, **{name: found[name] for name in DOSE})


def train(
    session: ModelSession,
    artifacts: Artifacts,
    config: UnlearnConfig,
    seed: int,
    evaluate: Callable[[Decoder], Evaluation],
    **how: Any,
) -> Trained:
    """Trains with some settings on the study's forget and retain sets; `how`: see `unlearn`."""
    chat = session.chat
    forget, reference = artifacts.forget_set.read()
    return unlearn(
        session.base,
        [item.example(chat) for item in forget],
        [item.example(chat) for item in _retain_set(artifacts, config)],
        reference,
        config,
        seed=seed,
        target=session.config.target,
        evaluate=evaluate,
        preferred=_preferred(session, config, forget),
        mesh=session.mesh,
        **how,
    )


def _retain_set(artifacts: Artifacts, config: UnlearnConfig) -> list[Harvested]:
    return retained(artifacts.retain_set.read(), config.retain_counts)


def _checkpoints(
    session: ModelSession, artifacts: Artifacts, context: StageContext, run: Run
) -> Checkpoints:
    """The run's own, bound to everything that it depends on."""
    needed = ("prompts", "baseline", "harvest", f"dose/{run.arm}")
    inputs = [context.inputs[name] for name in needed if name in context.inputs]
    return Checkpoints(
        artifacts.training_state(run),
        every=session.config.checkpoints.every_steps,
        keep=session.config.checkpoints.keep,
        fingerprint=files.sha256_json([context.settings, inputs]),
    )


def _preferred(
    session: ModelSession, config: UnlearnConfig, forget: Sequence[Harvested]
) -> list[TokenExample]:
    """The responses that the objective prefers to the forget prompts, if it needs any.

    They are cut where the harvested ones are: a longer one would weigh more in a sum over tokens.
    """
    if not FORGET[config.objective].preferred:
        return []
    prompts = [item.prompt for item in forget]
    responses = preferred_responses(config.preferred, prompts)
    cap = session.config.harvest.response_cap
    return [
        session.chat.example(prompt, response).cut(cap)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
