"""Files of a study's folder come back as they were written."""

import numpy as np
import pytest

from ema_jax.concepts.vectors import LAYER_CONVENTION, concept_vectors
from ema_jax.config import StudyConfig
from ema_jax.errors import UserError
from ema_jax.runtime.files import read_jsonl, write_tensors
from ema_jax.study.artifacts import BASE, Artifacts, ConceptInputs, ForgetSet, Run, runs_of
from ema_jax.unlearning.harvest import Harvested

ITEMS = [Harvested(str(i), "bias", f"Prompt {i}.", "No.", (3, i)) for i in range(3)]


@pytest.fixture
def artifacts(tmp_path) -> Artifacts:
    return Artifacts(tmp_path)


def test_names_of_runs():
    config = StudyConfig(arms={"npo": {}, "npo_retain": {}}, seeds=(0, 3))
    assert [run.name for run in runs_of(config)] == [
        "npo.seed_0",
        "npo.seed_3",
        "npo_retain.seed_0",
        "npo_retain.seed_3",
    ]
    assert Run("npo", 3).folder == "npo/seed_3"


def test_harvested_sets(artifacts):
    reference = np.array([-1.25, -2.0, -30.1], np.float32)
    path = artifacts.forget_set.write(ForgetSet(ITEMS, reference))
    assert path == artifacts.root / "harvest/forget.jsonl"
    assert read_jsonl(path)[0] == {
        **{"id": "0", "domain": "bias", "prompt": "Prompt 0.", "response": "No."},
        **{"tokens": [3, 0], "reference_log_prob": -1.25},
    }
    items, found = artifacts.forget_set.read()
    assert items == ITEMS
    np.testing.assert_array_equal(found, reference)
    assert found.dtype == np.float32
    for artifact in (artifacts.retain_set, artifacts.benign_answers):
        artifact.write(ITEMS)
        assert artifact.read() == ITEMS


def test_activations_and_concepts(artifacts):
    rng = np.random.default_rng(0)
    pooled = {
        pooling: {d: rng.normal(size=(4, 3, 5)).astype(np.float32) for d in ("bias", "benign")}
        for pooling in ("last_token", "prompt_mean")
    }
    kept = artifacts.root / "kept"
    tensors = {f"{name}/{domain}": x for name, by in pooled.items() for domain, x in by.items()}
    write_tensors(kept, tensors, {"layer_convention": LAYER_CONVENTION})
    path = artifacts.activations.write(kept)
    assert path == artifacts.root / "concepts/base.activations.safetensors"
    assert not kept.exists()
    found = artifacts.activations.read()
    assert {name: set(by) for name, by in found.items()} == {
        name: set(pooled[name]) for name in pooled
    }
    np.testing.assert_array_equal(found["last_token"]["bias"], pooled["last_token"]["bias"])
    about = {"pooling": "prompt_mean", "model_hash": "h", "contrast": "benign"}
    activations = pooled["prompt_mean"]
    path = artifacts.concepts("npo.seed_0", "prompt_mean").write(ConceptInputs(activations, about))
    assert path == artifacts.root / "concepts/npo.seed_0.prompt_mean.safetensors"
    read = artifacts.concepts("npo.seed_0", "prompt_mean").read()
    np.testing.assert_array_equal(read.vectors["bias"], concept_vectors(activations)["bias"])
    assert read.metadata.items() >= about.items()
    assert artifacts.concepts(BASE).path == artifacts.root / "concepts/base.safetensors"


def test_weights_by_kind_and_what_is_missing(artifacts):
    run = Run("npo", 0)
    assert artifacts.weights(run, adapters=True) == artifacts.root / "adapters/npo/seed_0"
    assert artifacts.weights(run, adapters=False) == artifacts.root / "checkpoints/npo/seed_0"
    assert artifacts.training_state(run) == artifacts.root / "checkpoints/npo.seed_0"
    with pytest.raises(UserError, match=r"trajectories/npo\.seed_0\.json: no such file"):
        artifacts.trajectory(run).read()
