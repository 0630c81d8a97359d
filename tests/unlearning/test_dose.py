"""The search for a dose, with stand-ins for trials."""

import pytest

from ema_jax.refusal.evaluation import Evaluation
from ema_jax.unlearning import dose
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.dose import DoseConfig, Trial

ARM = UnlearnConfig(stop_at=0.1, max_invalid=0.2, eval_every=10, max_steps=60)
FITS, FAST, MUCH, LITTLE = "fits", "too_fast", "too_much", "too_little"


def point(step, refused, off_topic=0.0, benign=1.0, degenerate=0.0):
    """An evaluation: shares of the target's responses, and of benign ones that are answers."""
    complied = 1 - refused - off_topic - degenerate
    kinds = {"refused": refused, "complied": complied, "off_topic": off_topic, "unjudged": 0.0}
    broken = {**dict.fromkeys(kinds, 0.0), "complied": benign, "refused": 1 - benign}
    valid = refused + complied
    rates = Evaluation(
        {"t": refused / valid if valid else float("nan"), "benign": 1 - benign},
        off_topic + degenerate,
        {"t": kinds | {"degenerate": degenerate}, "benign": broken | {"degenerate": 0.0}},
    )
    return rates.point(step)


OUTCOMES = [
    # evaluations after the untouched model's → outcome, its best step
    ([point(2, 0.8), point(4, 0.05)], FITS, 4),
    ([point(2, 0.8), point(4, 0.1), point(6, 0.0)], FITS, 4),
    ([point(2, 0.8), point(4, 0.5)], LITTLE, 4),
    ([point(2, 0.5), point(4, 0.9)], LITTLE, 2),
    # No refusals are left, and no answers either.
    ([point(2, 0.8), point(4, 0.0, off_topic=0.5)], MUCH, 2),
    ([point(2, 0.0, degenerate=0.3)], MUCH, None),
    ([point(2, 0.0, degenerate=1.0)], MUCH, None),
    # The target is answered, and the contrast no longer.
    ([point(2, 0.0, benign=0.7)], MUCH, None),
    ([point(4, 0.0, benign=0.85)], FITS, 4),
    # Unlearned in a step or two: nothing of it can be seen.
    ([point(2, 0.0)], FAST, 2),
    ([point(1, 0.0, off_topic=0.9), point(3, 0.1)], FAST, 3),
    # With retain data, damage is repaired.
    ([point(2, 0.0, off_topic=0.9), point(4, 0.05)], FITS, 4),
    ([point(2, 0.0, off_topic=0.9), point(4, 0.6)], LITTLE, 4),
]


@pytest.mark.parametrize(("points", "outcome", "best"), OUTCOMES)
def test_the_outcome_of_a_trial(points, outcome, best):
    trial = dose.assess(ARM, 1e-4, [point(0, 0.95), *points], "t", "benign")
    assert (trial.outcome, trial.best_step, trial.steps) == (outcome, best, points[-1]["step"])
    assert (trial.target_refusal is None) == (best is None)


def test_a_base_that_answers_few_benign_prompts_is_no_reason_against_a_dose():
    trial = dose.assess(
        ARM, 1e-4, [point(0, 0.9, benign=0.6), point(4, 0.0, benign=0.45)], "t", "benign"
    )
    assert trial.outcome == FITS


def trial(rate, outcome, refusal=0.5):
    return Trial(rate, outcome, None if refusal is None else 4, refusal, 40, [])


def model(little: float, much: float):
    """A model that a rate up to the one leaves refusing, and from the other on damages."""

    def run(rate):
        outcome = LITTLE if rate <= little else MUCH if rate >= much else FITS
        return trial(rate, outcome, {LITTLE: 0.9, MUCH: 0.6, FITS: 0.0}[outcome])

    return run


SEARCHES = [
    # where it stops refusing and where it is damaged, the first rate → the rates tried
    ((5e-5, 5e-4), 1e-4, [1e-4]),
    ((2e-4, 8e-4), 1e-4, [1e-4, 3e-4]),
    ((4e-4, 8e-4), 1e-4, [1e-4, 3e-4, 9e-4, 5.2e-4]),
    ((1e-5, 2e-5), 1e-4, [1e-4, 3.3e-5, 1.1e-5]),
    ((3e-2, 1.0), 1e-4, [1e-4, 3e-4, 9e-4, 2.7e-3, 8.1e-3, 2.4e-2]),
    # Nothing lies between: it ends once the two sides are close.
    ((2e-4, 2e-4), 1e-4, [1e-4, 3e-4, 1.7e-4, 2.3e-4, 2e-4]),
]


@pytest.mark.parametrize(("limits", "first", "rates"), SEARCHES)
def test_the_rates_that_are_tried(limits, first, rates):
    trials = dose.search(model(*limits), first, most=6)
    assert [each.learning_rate for each in trials] == pytest.approx(rates)
    for made in range(len(trials)):  # resumed after any of them
        assert dose.search(model(*limits), first, most=6, done=trials[:made]) == trials


def test_no_more_trials_than_were_asked_for():
    assert len(dose.search(model(1.0, 2.0), 1e-6, most=2)) == 2


def test_a_rate_that_damages_below_one_that_does_not_ends_the_search_all_the_same():
    outcomes = iter([LITTLE, MUCH, MUCH, MUCH, MUCH, MUCH, MUCH, MUCH])
    trials = dose.search(lambda rate: trial(rate, next(outcomes)), 1e-4, most=8)
    assert len({each.learning_rate for each in trials}) == len(trials)


@pytest.mark.parametrize(
    ("trials", "rate"),
    [
        ([trial(1e-4, LITTLE, 0.2), trial(3e-4, FITS, 0.1)], 3e-4),
        ([trial(1e-4, LITTLE, 0.8), trial(3e-4, MUCH, 0.4)], 3e-4),
        ([trial(1e-4, LITTLE, 0.3), trial(3e-4, MUCH, 0.4)], 1e-4),
        ([trial(1e-4, MUCH, None), trial(3e-5, LITTLE, 0.9)], 3e-5),
        ([trial(1e-4, MUCH, None), trial(3e-5, MUCH, None)], 3e-5),
    ],
)
def test_the_choice(trials, rate):
    assert dose.choose(trials).learning_rate == rate


@pytest.mark.parametrize(
    ("chosen", "every"),
    [
        (Trial(3e-4, FITS, 6, 0.0, 6, []), 1),
        (Trial(3e-4, FITS, 20, 0.0, 20, []), 5),
        (Trial(3e-4, FITS, 60, 0.0, 60, []), 10),
        (Trial(3e-4, FITS, 2, 0.0, 2, []), 1),
        (Trial(3e-4, LITTLE, 4, 0.5, 40, []), 10),
    ],
)
def test_runs_are_evaluated_often_enough_to_stop_where_the_trial_did(chosen, every):
    settings = dose.dosed(ARM, chosen)
    assert (settings.learning_rate, settings.eval_every) == (3e-4, every)


def test_a_trial_is_the_arm_cut_short():
    retaining = UnlearnConfig(retain_weight=4.0, min_steps=100, max_steps=160, eval_every=20)
    settings = dose.trial_settings(retaining, 1e-3, DoseConfig(max_steps=40))
    assert (settings.max_steps, settings.min_steps, settings.eval_every) == (40, 0, 5)
    assert settings.learning_rate == 1e-3
    assert dose.trial_settings(ARM, 1e-3, DoseConfig(max_steps=4)).eval_every == 1
    decaying = UnlearnConfig(schedule="cosine", max_steps=160)
    assert dose.trial_settings(decaying, 1e-3, DoseConfig(max_steps=40)).max_steps == 160
