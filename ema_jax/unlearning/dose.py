"""Search for an arm's dose: the learning rate at which the target's refusals go and answers stay.

A trial is a short run. If its model is damaged before the target is answered, or the target is
answered after a step or two, in which nothing of its fall can be seen, the rate was too high; if
the target still refuses at the end, too low. So the rate is multiplied or divided until both sides
are known, and halved on a log scale from there, until a trial fits.

Only the target and the benign contrast are looked at. A rate chosen by its effect on the other
domains would choose the result of the study.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.unlearning.config import UnlearnConfig

SEED = 0
"""Seed of all trials, whatever the study's."""

_FACTOR = 3.0  # between the rates of two trials while one side is unknown
_CLOSE = 1.3  # rates nearer than this count as one
_EVALUATIONS = 8  # of a trial
# Evaluations of a run until the step at which its trial stopped, at least; so a trial that fits has
# as many steps.
_BEFORE_STOP = 4

DOSE = ("learning_rate", "eval_every")
"""The settings of an arm that a search finds."""

Outcome = Literal["fits", "too_fast", "too_much", "too_little"]
Point = Mapping[str, Any]  # of a trajectory


@dataclasses.dataclass(frozen=True)
class DoseConfig:
    """Search for each arm's learning rate and stopping point, on dev prompts; off by default.

    Attributes:
        trials: greatest number of trials of an arm; 0 leaves the arms' settings as they are. The
            first one has the arm's own `learning_rate`.
        max_steps: greatest number of steps of a trial.
        prompts: number of dev prompts of the target, and of benign ones, at each evaluation.
    """

    trials: Annotated[int, Field(ge=0, le=100)] = 0
    max_steps: Annotated[int, Field(ge=_BEFORE_STOP)] = 40
    prompts: PositiveInt = 16


@dataclasses.dataclass(frozen=True)
class Trial:
    """A short run at one learning rate.

    Attributes:
        learning_rate: its peak.
        outcome: whether it fits, and if not, in which direction it fails.
        best_step: the step at which it fits; if it does not, that of the fewest refusals of the
            target among undamaged evaluations; None without any.
        target_refusal: the target's refusal rate at that step.
        steps: it was trained for.
        points: its evaluations, the untouched model's first.
    """

    learning_rate: float
    outcome: Outcome
    best_step: int | None
    target_refusal: float | None
    steps: int
    points: Sequence[Point]


def trial_settings(arm: UnlearnConfig, rate: float, dose: DoseConfig) -> UnlearnConfig:
    """The arm's settings for a trial.

    A schedule that decays to `max_steps` is only itself at its full length.
    """
    steps = min(dose.max_steps, arm.max_steps) if arm.schedule == "constant" else arm.max_steps
    every = min(arm.eval_every, max(steps // _EVALUATIONS, 1))
    return dataclasses.replace(
        arm, learning_rate=rate, max_steps=steps, min_steps=0, eval_every=every
    )


def assess(
    arm: UnlearnConfig, rate: float, points: Sequence[Point], target: str, contrast: str
) -> Trial:
    """The outcome of a trial from its evaluations, the first of them the untouched model's.

    Valid is an evaluation without damage (`max_invalid`), in which the contrast is answered about
    as often as by the untouched model. One with few refusals of the target (`stop_at`) fits, or
    came too fast if a run could not be evaluated `_BEFORE_STOP` times until then.
    """
    least = _answered(points[0], contrast) - arm.max_invalid
    valid = [
        point
        for point in points[1:]
        if not Evaluation.of_point(point).damaged(target, arm.max_invalid)
        and _answered(point, contrast) >= least
        and point["refusal"][target] is not None
    ]
    steps = points[-1]["step"]
    for point in valid:
        if point["refusal"][target] <= arm.stop_at:
            reached: Outcome = "fits" if point["step"] >= _BEFORE_STOP else "too_fast"
            return Trial(rate, reached, point["step"], point["refusal"][target], steps, points)
    # The last evaluation tells: with retain data, damage is repaired in time.
    outcome: Outcome = "too_little" if valid and valid[-1] is points[-1] else "too_much"
    best = min(valid, key=lambda point: point["refusal"][target], default=None)
    if best is None:
        return Trial(rate, outcome, None, None, steps, points)
    return Trial(rate, outcome, best["step"], best["refusal"][target], steps, points)


def _answered(point: Point, domain: str) -> float:
    shares = point.get("shares", {}).get(domain)
    return 1.0 if shares is None else shares[COMPLIED]


def next_rate(trials: Sequence[Trial], first: float) -> float | None:
    """The learning rate to try next; None once a trial fits or nothing is left between two."""
    if not trials:
        return first
    if any(trial.outcome == "fits" for trial in trials):
        return None
    above = [t.learning_rate for t in trials if t.outcome in ("too_fast", "too_much")]
    high = min(above, default=math.inf)
    low = max(
        (t.learning_rate for t in trials if t.outcome == "too_little" and t.learning_rate < high),
        default=0.0,
    )
    if math.isinf(high):
        return _rounded(low * _FACTOR)
    if not low:
        return _rounded(high / _FACTOR)
    return _rounded(math.sqrt(low * high)) if high / low > _CLOSE else None


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def search(
    run: Callable[[float], Trial],
    first: float,
    most: int,
    done: Sequence[Trial] = (),
) -> list[Trial]:
    """The trials of a search, in order.

    Args:
        run: makes the trial of a learning rate.
        first: the rate of the first one.
        most: their largest number.
        done: those made before, with which a search is resumed.
    """
    trials = list(done)
    while len(trials) < most and (rate := next_rate(trials, first)) is not None:
        trials.append(run(rate))
    return trials


def choose(trials: Sequence[Trial]) -> Trial:
    """The trial that fits, or else the one with the fewest refusals of the target undamaged.

    The lowest rate if none of them had an undamaged evaluation.
    """

    def order(trial: Trial) -> tuple:
        refusal = trial.target_refusal
        unknown = refusal is None
        return trial.outcome != "fits", unknown, refusal or 0.0, trial.learning_rate

    return min(trials, key=order)


def dosed(arm: UnlearnConfig, trial: Trial) -> UnlearnConfig:
    """The arm's settings at the dose of a trial.

    A run is evaluated often enough to stop near the step at which the trial did.
    """
    every = arm.eval_every
    if trial.outcome == "fits" and trial.best_step is not None:
        every = min(every, max(trial.best_step // _BEFORE_STOP, 1))
    return dataclasses.replace(arm, learning_rate=trial.learning_rate, eval_every=every)
