"""Search for the dose of one arm on the harvest of a study, before its seeds are trained."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from ema_jax.data.domains import BENIGN
from ema_jax.data.prompts import Prompt
from ema_jax.models.decoder import Decoder
from ema_jax.refusal.answer_screen import AnswerScreen
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.runtime import files
from ema_jax.study.arm_training import train
from ema_jax.study.artifacts import Artifacts
from ema_jax.study.session import ModelSession
from ema_jax.unlearning import dose
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.dose import Point, Trial
from ema_jax.unlearning.run_checkpoints import NonFiniteError

_KEPT = ("step", "refusal", "invalid_rate", "shares")  # of the points of a trajectory

_OUTCOMES = {
    "fits": "fits",
    "too_fast": "is too much: the target is answered before its fall can be seen",
    "too_much": "is too much: the model is damaged",
    "too_little": "is too little: the target still refuses",
}


def search_dose(
    session: ModelSession,
    artifacts: Artifacts,
    arm: str,
    screen: AnswerScreen | None,
    partial: Path,
) -> dict[str, Any]:
    """The dose of an arm, and the trials that it was chosen from.

    Args:
        session: the base model and its tokenizer.
        artifacts: the study's, with its forget and retain sets.
        arm: its name.
        screen: between answers and other output.
        partial: the file of the trials made so far, for a search that is resumed.
    """
    study, settings = session.config, session.config.arm(arm)
    asked = _asked(artifacts.prompts.read()["dev"], study.target, study.dose.prompts)
    trials = [Trial(**each) for each in files.read_json(partial)] if partial.exists() else []

    def run(rate: float) -> Trial:
        logging.info(
            "dose of %s: trial %d of at most %d, learning rate %g",
            *(arm, len(trials) + 1, study.dose.trials, rate),
        )
        start = next((trial.points[0] for trial in trials if trial.points), None)
        trial = _trial(
            session, artifacts, settings, rate, _evaluation(session, asked, screen, start)
        )
        trials.append(trial)
        files.write_json(partial, [dataclasses.asdict(each) for each in trials])
        logging.info("dose of %s: learning rate %g %s", arm, rate, _said(trial))
        return trial

    dose.search(run, settings.learning_rate, study.dose.trials, tuple(trials))
    found = _record(settings, trials, len(asked))
    _say(arm, found)
    return found


def _asked(dev: Sequence[Prompt], target: str, most: int) -> list[Prompt]:
    """Dev prompts of the target and the contrast."""
    chosen = ([p for p in dev if p.domain == domain][:most] for domain in (target, BENIGN))
    return [prompt for some in chosen for prompt in some]


def _evaluation(
    session: ModelSession, asked: Sequence[Prompt], screen: AnswerScreen | None, start: Point | None
) -> Callable[[Decoder], Evaluation]:
    """Rates of a trial's model; before its first step those of an earlier trial, where known."""
    calls = itertools.count()

    def rates(model: Decoder) -> Evaluation:
        if next(calls) == 0 and start is not None:
            return Evaluation.of_point(start)
        return session.respond_and_judge(model, asked, screen=screen).rates()

    return rates


def _trial(
    session: ModelSession,
    artifacts: Artifacts,
    arm: UnlearnConfig,
    rate: float,
    evaluate: Callable[[Decoder], Evaluation],
) -> Trial:
    settings = dose.trial_settings(arm, rate, session.config.dose)
    try:
        trained = train(session, artifacts, settings, dose.SEED, evaluate, restore_valid=False)
    except NonFiniteError as error:
        return Trial(rate, "too_much", None, None, error.step, [])
    points = [{key: point[key] for key in _KEPT if key in point} for point in trained.trajectory]
    return dose.assess(settings, rate, points, session.config.target, BENIGN)


def _record(arm: UnlearnConfig, trials: Sequence[Trial], asked: int) -> dict[str, Any]:
    """What `results.json` says of an arm's dose."""
    chosen = dose.choose(trials)
    settings = dose.dosed(arm, chosen)
    evaluations = sum(len(trial.points) for trial in trials)
    # The untouched model is asked once.
    repeated = max(sum(bool(trial.points) for trial in trials) - 1, 0)
    return {
        "fits": chosen.outcome == "fits",
        "learning_rate": settings.learning_rate,
        "eval_every": settings.eval_every,
        "steps": sum(trial.steps for trial in trials),
        "responses": asked * (evaluations - repeated),
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }


def _said(trial: Trial) -> str:
    said = _OUTCOMES[trial.outcome]
    if trial.target_refusal is None:
        return f"{said} (no undamaged evaluation in {trial.steps} steps)"
    refusal = f"{trial.target_refusal:.0%} of the target refused after step {trial.best_step}"
    return f"{said} ({refusal} of {trial.steps})"


def _say(arm: str, found: Mapping[str, Any]) -> None:
    trials = found["trials"]
    cost = f"{len(trials)} trials, {found['steps']} steps, {found['responses']} responses"
    if found["fits"]:
        logging.info("dose of %s: learning rate %g (%s)", arm, found["learning_rate"], cost)
        return
    tried = ", ".join(f"{trial['learning_rate']:g} {trial['outcome']}" for trial in trials)
    logging.warning(
        "dose of %s: no learning rate of %s takes the target's refusals and leaves its answers "
        "(%s); %g comes nearest and is used. More wordings of refusals in the forget set "
        "(harvest.samples), another arms.%s.beta or objective, or more dose.max_steps may help",
        *(arm, cost, tried, found["learning_rate"], arm),
    )
