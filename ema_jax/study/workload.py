"""How much a study has to do, from its config alone: for the dry run's plan and the time left.

Upper bounds: every response is taken to be as long as it may be, every run to take all its steps.
"""

from typing import NamedTuple

from ema_jax.config import StudyConfig
from ema_jax.data.prompts import DEFAULT_COUNTS

# A 7B model on one H100 (docs/one-gpu.md, 26 November 2026): tokens a second. Other sizes are taken
# to cost in proportion to their parameters.
MEASURED_PARAMETERS = 7.6e9
DECODE, FORWARD, TRAIN = 9_200.0, 45_000.0, 11_440.0
PROGRAMS_SECONDS = 15 * 60.0
SCREEN_PASSES = 4  # over each answer, of relevance and fluency
PROMPT_TOKENS = 128  # a guess for a rendered prompt, of which training rows and passes have one


class Work(NamedTuple):
    """What a stage does, at most.

    Attributes:
        responses: generated.
        response_tokens: generated.
        forward_tokens: read without being trained on or generated.
        steps: of training.
        train_tokens: in the rows of these steps.
    """

    responses: int = 0
    response_tokens: int = 0
    forward_tokens: int = 0
    steps: int = 0
    train_tokens: int = 0

    def plus(self, other: "Work") -> "Work":
        """The sum of both."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def h100_seconds(self, parameters: float) -> float:
        """Seconds on one H100, estimated from a 7B model's measured rates; without compilation."""
        seconds = (
            self.response_tokens / DECODE
            + (self.forward_tokens + SCREEN_PASSES * self.response_tokens) / FORWARD
            + self.train_tokens / TRAIN
        )
        return seconds * parameters / MEASURED_PARAMETERS


def work(config: StudyConfig, stage: str, arm: str | None = None) -> Work:
    """The work of a stage, of one run where it is a stage of runs."""
    counts = DEFAULT_COUNTS | dict(config.prompts.counts)
    domains, cap = len(config.domains), config.generation.max_new_tokens
    asked = counts["eval"] * (domains + 1 + (config.prompts.lookalike_source is not None))
    evaluation = _responses(asked, cap)
    sensitivity = _responses(asked * config.sensitivity.samples, cap)
    if config.sensitivity.long_tokens:
        sensitivity = sensitivity.plus(_responses(asked, config.sensitivity.long_tokens))
    captured = Work(forward_tokens=counts["concept"] * (domains + 1) * PROMPT_TOKENS)
    swept = config.concepts.sweep_prompts * (domains + 1)
    if stage == "baseline":
        return evaluation.plus(sensitivity)
    if stage == "concepts":
        return captured.plus(_responses(swept, cap))
    if stage == "harvest":
        prompts = counts["harvest"] + counts["retain"] * domains
        return _responses(prompts * config.harvest.samples, cap)
    if stage == "evaluate":
        return evaluation.plus(sensitivity).plus(captured)
    if stage == "unlearn" and arm is not None:
        return _training(config, arm, counts["dev"] * domains, cap)
    return Work()


def _training(config: StudyConfig, arm: str, dev: int, cap: int) -> Work:
    settings = config.arm(arm)
    if settings.ablation is not None:
        return _responses(dev, cap)
    rows = settings.batch_size + (settings.retain_batch_size if settings.retains else 0)
    tokens = PROMPT_TOKENS + min(cap, config.harvest.response_cap)
    evaluations = settings.max_steps // settings.eval_every + 1
    return _responses(evaluations * dev, cap).plus(
        Work(steps=settings.max_steps, train_tokens=settings.max_steps * rows * tokens)
    )


def _responses(number: int, cap: int) -> Work:
    return Work(number, number * cap, number * PROMPT_TOKENS)
