"""A study of the embedded Qwen2 model that is small enough for the tests."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ema_jax import config as ema
from ema_jax.organism import CHECKPOINTS

EMBEDDED = ("qwen2", "mistral")


def small_config(family: str = "qwen2") -> ConfigDict:
    """A config to change; `ema.read` makes a study of it."""
    config = ema.default()
    config.model.source = str(CHECKPOINTS / family)
    config.prompts.source = "organism"
    config.prompts.lookalike_source = "organism"
    config.prompts.counts = {"harvest": 16, "retain": 8, "dev": 4, "eval": 12, "concept": 8}
    config.extra_judges = {"substring_arditi": {}}
    config.harvest.min_examples = 4
    config.generation.max_new_tokens = 48
    config.generation.batch_size = 32
    config.unlearn.lora.rank = 4
    config.unlearn.learning_rate = 1e-3
    config.unlearn.max_steps = 4
    config.unlearn.eval_every = 4
    config.unlearn.batch_size = 8
    config.unlearn.retain_batch_size = 8
    config.arms = {"npo": {}, "npo_retain": {"retain_weight": 5.0}}
    config.seeds = (0,)
    config.concepts.permutations = 50
    config.concepts.splits = 4
    return config


def assert_same_arrays(ours: dict[Any, Any], theirs: dict[Any, Any]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=str(key))


def smallest_config() -> ConfigDict:
    """As small as a study with two arms can be, every stage of it a few seconds."""
    config = small_config()
    config.domains = ("cybersecurity", "safety", "privacy")
    config.prompts.counts = {"harvest": 4, "retain": 4, "dev": 4, "eval": 4, "concept": 4}
    config.extra_judges = {}
    config.harvest.min_examples = 2
    config.generation.max_new_tokens = 32
    config.unlearn.max_steps = 2
    config.unlearn.eval_every = 2
    config.unlearn.batch_size = 4
    config.unlearn.retain_batch_size = 4
    config.checkpoints.every_steps = 1
    config.concepts.splits = 2
    config.concepts.sweep_prompts = 2
    config.concepts.sweep_layers = 1
    config.concepts.sweep_strengths = (1.0,)
    return config
