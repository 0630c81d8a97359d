"""How much a study has to do, from its config alone: for the plan of a dry run.

Upper bounds: every response is taken to be as long as it may be, every run to take all its steps.
"""

from typing import NamedTuple

from ema_jax.config import StudyConfig
from ema_jax.data.prompts import DEFAULT_COUNTS


class Rates(NamedTuple):
    """Tokens a second of one device, measured with one model.

    Other sizes of model are taken to cost in proportion to their parameters.

    Attributes:
        parameters: of that model.
        decode: generated.
        forward: read in forward passes.
        train: trained on.
        programs_seconds: to compile what a study needs, at first.
    """

    parameters: float
    decode: float
    forward: float
    train: float
    programs_seconds: float

    def on(self, decode: float, others: float) -> "Rates":
        """Rates of a device that decodes, and does the rest, so many times as fast."""
        forward, train = self.forward * others, self.train * others
        return self._replace(decode=self.decode * decode, forward=forward, train=train)


# Qwen2.5-7B's shape in bfloat16, 64 rows that decode, full rows to train on: an H100 on 26 November
# 2026, before rows were packed, and an H200 the day after (benchmarks/accelerators.md). A first
# study has eleven programs, of 14 to 29 s on the H200.
H100 = Rates(7.6e9, 9_200.0, 45_000.0, 11_440.0, 6 * 60.0)
H200 = Rates(7.6e9, 11_900.0, 46_500.0, 16_490.0, 6 * 60.0)
# One core of an AMD EPYC (AVX2) that had other work too, SmolLM2-135M in float32: 72 tokens a
# processor second generated; 1,024 in 2.6 s of the blocks' forward pass and in 8.3 s of a training
# step (benchmarks/README.md, 26 November 2026).
CPU_CORE = Rates(134.5e6, 72.0, 390.0, 123.0, 5 * 60.0)
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

    def seconds(self, rates: Rates, parameters: float) -> float:
        """Seconds on a device, estimated from its rates; without compilation."""
        seconds = (
            self.response_tokens / rates.decode
            + (self.forward_tokens + SCREEN_PASSES * self.response_tokens) / rates.forward
            + self.train_tokens / rates.train
        )
        return seconds * parameters / rates.parameters


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
