"""Optimizers and learning-rate schedules by name, all of them optax's."""

from collections.abc import Callable

import optax

from ema_jax.unlearning.config import UnlearnConfig

OPTIMIZERS: dict[str, Callable[[optax.Schedule, float], optax.GradientTransformation]] = {
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "adafactor": lambda rate, decay: optax.adafactor(rate, weight_decay_rate=decay or None),
    "lion": lambda rate, decay: optax.lion(rate, weight_decay=decay),
    "sgd": lambda rate, decay: optax.sgd(rate),
}


def _constant(peak: float, steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


def _linear(peak: float, steps: int) -> optax.Schedule:
    return optax.linear_schedule(peak, 0.0, steps)


# What follows the warm-up: the peak and the steps left → a schedule.
SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": optax.cosine_decay_schedule,
}


def schedule(config: UnlearnConfig) -> optax.Schedule:
    """The learning rate at a step: a linear warm-up, then the named schedule."""
    peak, warmup = config.learning_rate, config.warmup_steps
    after = SCHEDULES[config.schedule](peak, max(config.max_steps - warmup, 1))
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(config: UnlearnConfig) -> optax.GradientTransformation:
    """Clips by the global norm, then the named optimizer. The rate may be a traced number."""
    named = OPTIMIZERS[config.optimizer](schedule(config), config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), named)
