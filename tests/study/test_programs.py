"""The programs that a study's first run compiles, as counted from its config."""

import pytest

from ema_jax.study import config_file
from ema_jax.study.programs import programs


def test_a_first_study_of_7b_has_few_programs():
    found = programs(config_file.load("qwen_cyber"), folded=False)
    assert sum(found.values()) == 11
    assert found["train step"] == found["prompt pass"] == found["decoding"] == 2


@pytest.mark.parametrize(
    ("changes", "folded", "number"),
    [
        ({}, True, 11),
        ({"harvest.samples": 4}, True, 12),
        ({"concepts.sweep_prompts": 0}, False, 7),
        ({"arms.npo.lora.rank": 8}, False, 17),
        ({"arms.npo.lora.rank": 8}, True, 11),
        ({"sensitivity.long_tokens": 512}, False, 13),
    ],
)
def test_programs_are_counted_as_the_config_says(changes, folded, number):
    config = config_file.load("qwen_cyber", [(k, str(v)) for k, v in changes.items()])
    assert sum(programs(config, folded=folded).values()) == number
