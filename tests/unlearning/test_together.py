"""Runs of one arm at once end as each of them would alone."""

import dataclasses

import numpy as np
import pytest
from training_worker import CONFIG, arrays, random_examples

from ema_jax.errors import UserError
from ema_jax.models import checkpoint
from ema_jax.models.sharding import make_mesh
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.unlearning.batches import Data
from ema_jax.unlearning.reference import reference_log_probs
from ema_jax.unlearning.together import Member, unlearn_together
from ema_jax.unlearning.trainer import unlearn

FORGET, RETAIN = random_examples(9, 1), random_examples(11, 2)
ARM = dataclasses.replace(CONFIG, max_steps=6, eval_every=2, learning_rate=1e-3)
MEMBERS = [Member(0), Member(1, learning_rate=3e-3, retain_weight=5.0)]


@pytest.fixture(scope="module")
def base(tiny):
    return checkpoint.load(tiny("qwen2"))


def falling(model) -> Evaluation:
    """A rate that falls as adapters grow, so that each run stops at a step of its own."""
    size = (
        float(np.abs(np.asarray(model.blocks.q_proj.lora_b[...])).mean()) if _adapted(model) else 0
    )
    return Evaluation({"t": 1.0 if size < 0.003 else 0.0, "other": 1.0}, 0.0)


def _adapted(model) -> bool:
    return model.blocks.q_proj.lora_b is not None


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_each_run_ends_as_it_would_alone(tiny, base, shape):
    reference = reference_log_probs(base, FORGET, 4)
    mesh = make_mesh(shape)
    spread = base if shape == (1, 1, 1) else checkpoint.load(tiny("qwen2"), mesh=mesh)
    logged: list = []
    got = unlearn_together(
        spread,
        Data(FORGET, reference, RETAIN),
        ARM,
        MEMBERS,
        target="t",
        evaluate=falling,
        mesh=mesh,
        log=lambda i, row: logged.append((i, row["step"])),
    )
    for i, (member, ours) in enumerate(zip(MEMBERS, got, strict=True)):
        config = dataclasses.replace(
            ARM,
            learning_rate=member.learning_rate or ARM.learning_rate,
            retain_weight=member.retain_weight or ARM.retain_weight,
        )
        alone = unlearn(
            base,
            FORGET,
            RETAIN,
            reference,
            config,
            seed=member.seed,
            target="t",
            evaluate=falling,
        )
        assert (ours.steps, ours.stopped) == (alone.steps, alone.stopped)
        assert [n for j, n in logged if j == i] == list(range(1, alone.steps + 1))
        assert ours.first_loss == pytest.approx(alone.first_loss, rel=1e-5)
        theirs = arrays(alone.model)
        for name, value in arrays(ours.model).items():
            np.testing.assert_allclose(value, theirs[name], atol=2e-4, err_msg=name)
    assert len({trained.steps for trained in got}) > 1, "each stops by its own rates"


def test_parameters_are_not_trained_together(base):
    data = Data(FORGET, np.zeros(9, np.float32), RETAIN)
    with pytest.raises(UserError, match="only adapters are trained together"):
        unlearn_together(
            base,
            data,
            dataclasses.replace(ARM, trainable="full"),
            MEMBERS,
            target="t",
            evaluate=falling,
        )
