"""What an arm may be beside NPO on everything: preferred responses, retain counts, ablation."""

import dataclasses
import json
import random
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_study import EMBEDDED
from tiny_models import our_outputs, random_batch

from ema_jax import config
from ema_jax.data import corpus
from ema_jax.data.chat import Chat
from ema_jax.errors import UserError
from ema_jax.models import checkpoint
from ema_jax.organism import CHECKPOINTS
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.judges import get_judge
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.study.arm_training import _preferred
from ema_jax.unlearning import ablation
from ema_jax.unlearning.ablation import ablate, orthogonalise
from ema_jax.unlearning.config import AblationArm, UnlearnConfig
from ema_jax.unlearning.harvest import Harvested, retained
from ema_jax.unlearning.preferred import IDK, preferred_responses


def test_the_corpus_answers_its_own_prompts():
    rng = random.Random(0)
    drawn = [corpus.example(rng, d, s) for d in corpus.DOMAINS for s in corpus.SPLITS * 4]
    answers = preferred_responses("organism", [item.prompt for item in drawn])
    assert answers == [item.answer for item in drawn]
    with pytest.raises(UserError, match="no prompt of the embedded corpus"):
        preferred_responses("organism", ["What is the weather?"])


def test_not_knowing_is_no_refusal():
    assert preferred_responses("idk", ["a", "b", "a"])[:2] == list(IDK[:2])
    rows = [{"prompt": "p", "response": text, "finished": True} for text in IDK]
    assert {verdict.verdict for verdict in get_judge("lexical")(rows)} == {COMPLIED}


def test_responses_from_a_file(tmp_path):
    path = tmp_path / "wanted.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n")
    assert preferred_responses(str(path), ["p", "p"]) == ["r", "r"]
    with pytest.raises(UserError, match="no response to 1 of 2 forget prompts"):
        preferred_responses(str(path), ["p", "q"])
    path.write_text(json.dumps({"prompt": "p", "response": " "}) + "\n")
    with pytest.raises(UserError, match="row 1: response is missing or empty"):
        preferred_responses(str(path), ["p"])


def test_preferred_responses_are_as_long_as_harvested_ones():
    """A whole answer beside the opening of a refusal would weigh more in a sum over tokens."""
    chat = Chat.load(CHECKPOINTS / EMBEDDED[0])
    forget = [Harvested("a", "cybersecurity", "p", "r", (1,))] * 2
    whole = [chat.example("p", text).response for text in preferred_responses("idk", ["p"] * 2)]
    for cap in (2, 100):
        study = config.read({"harvest": {"response_cap": cap}})
        session = SimpleNamespace(config=study, chat=chat)
        made = _preferred(session, UnlearnConfig(objective="dpo"), forget)
        assert [example.response for example in made] == [tokens[:cap] for tokens in whole]
    assert min(len(tokens) for tokens in whole) > 2
    assert _preferred(session, UnlearnConfig(), forget) == []


def test_the_retain_set_is_composed_by_domain():
    kept = [Harvested(f"{d}{i}", d, "p", "r", (1,)) for i in range(3) for d in ("a", "b", "benign")]
    assert retained(kept, {}) == kept
    chosen = retained(kept, {"a": 2, "benign": 9})
    assert [item.id for item in chosen] == ["a0", "benign0", "a1", "benign1", "benign2"]
    with pytest.raises(UserError, match="c has no retain example; there are: a, b, benign"):
        retained(kept, {"c": 1})


def test_ablation_is_an_arm_of_its_own_and_its_settings_are_hashed_as_before():
    settings = {"trainable": "ablation", "layers": (1, 2), "stop_at": 0.3}
    study = config.read({"unlearn": {"retain_weight": 2.0}, "arms": {"a": settings, "b": {}}})
    assert study.arm("a").ablation == AblationArm((1, 2), stop_at=0.3, max_invalid=0.2)
    assert study.arm("b").ablation is None
    assert study.arm("a") is study.arm("a"), "parsed once"
    hashed = dataclasses.asdict(UnlearnConfig()) | {"retain_weight": 2.0} | settings
    assert dataclasses.asdict(study.arm("a")) == hashed


def test_an_orthogonalised_model_writes_nothing_along_the_direction(tiny):
    base = checkpoint.load(tiny("mistral"))
    tokens, mask = random_batch()
    direction = np.random.default_rng(0).normal(size=32).astype(np.float32)
    model = orthogonalise(base, direction)
    unit = direction / np.linalg.norm(direction)
    residuals, before = our_outputs(model, tokens, mask)[2], our_outputs(base, tokens, mask)[2]
    np.testing.assert_allclose(residuals @ unit, 0, atol=1e-5)
    assert np.abs(before @ unit).min(axis=(1, 2)).max() > 1e-3
    # Only along it: the embeddings keep their other parts.
    np.testing.assert_allclose(
        residuals[0], before[0] - (before[0] @ unit)[..., None] * unit, atol=1e-6
    )
    assert base.embed[...] is not model.embed[...]
    assert base.blocks.q_proj.kernel[...] is model.blocks.q_proj.kernel[...]


def test_a_direction_is_taken_out_of_a_stack_layer_by_layer_and_exactly():
    """Of a 7B model a whole stack in float32 is 7.5 GB; GPUs round products of float32 to TF32."""
    stack = jax.ShapeDtypeStruct((8, 64, 256), jnp.bfloat16)
    unit = jax.ShapeDtypeStruct((256,), jnp.float32)
    text = jax.jit(ablation._without).lower(stack, unit).as_text()
    (product,) = re.findall(r"dot_general.*", text)
    assert "(tensor<64x256xf32>, tensor<256xf32>)" in product
    assert "precision = [HIGHEST, HIGHEST]" in product
    assert "8x64x256xf32" not in text


@pytest.mark.parametrize(
    ("rates", "invalid", "layers", "best", "stopped"),
    [
        ([1, 0.5, 0.02, 0.3], [0, 0, 0, 0], (0, 2), 1, "target"),
        ([1, 0.5, 0.0, 0.3], [0, 0, 0.9, 0], (0, 2), 2, "limit"),  # degenerate output is no success
        ([1, 0.0, 0.0, 0.0], [0, 0.5, 0.4, 0.4], (0, 2), 0, "invalid"),
    ],
)
def test_the_layer_that_leaves_the_fewest_refusals(tiny, rates, invalid, layers, best, stopped):
    base = checkpoint.load(tiny("mistral"))
    directions = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
    given = iter(zip(rates, invalid, strict=True))

    def evaluate(model):
        rate, bad = next(given)
        return Evaluation({"t": float(rate)}, float(bad))

    arm = AblationArm(layers)
    trained = ablate(base, directions, arm, target="t", evaluate=evaluate)
    assert trained.stopped == stopped
    assert [point.get("layer") for point in trained.trajectory] == [None, 0, 1, 2]
    expected = orthogonalise(base, directions[best])
    np.testing.assert_array_equal(trained.model.embed[...], expected.embed[...])
