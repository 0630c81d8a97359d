"""Training: what is trained, on which loss, when it stops, and that it is the same every time."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from small_study import assert_same_arrays

from ema_jax.data import corpus
from ema_jax.data.chat import Chat, TokenExample
from ema_jax.errors import RunStoppedError
from ema_jax.models import checkpoint, lora
from ema_jax.models.sharding import make_mesh
from ema_jax.organism import CHECKPOINTS
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.runtime.files import read_jsonl
from ema_jax.unlearning import trainer
from ema_jax.unlearning.batches import batch_indices
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.metrics import MetricsWriter
from ema_jax.unlearning.reference import reference_log_probs
from ema_jax.unlearning.trainer import unlearn

LORA = lora.LoRAConfig(rank=2, alpha=4.0)
# Shared by as many tests as can: each other config compiles a step of its own.
SMALL = UnlearnConfig(
    lora=LORA, learning_rate=1e-2, batch_size=8, retain_batch_size=8, max_steps=20, eval_every=20
)


def random_examples(number: int, seed: int) -> list[TokenExample]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(97, size=rng.integers(low, high)).tolist())

    return [TokenExample(ids(3, 7), ids(2, 6)) for _ in range(number)]


FORGET, RETAIN = random_examples(9, 1), random_examples(11, 2)


def arrays(model) -> dict:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def base(tiny):
    return checkpoint.load(tiny("qwen2"))


@pytest.fixture(scope="module")
def reference(base):
    return reference_log_probs(base, FORGET, 4)


def never(model) -> Evaluation:
    """A target that keeps refusing."""
    return Evaluation({"t": 1.0, "other": 1.0}, 0.0)


def run(base, reference, config=SMALL, *, seed=0, evaluate=never, **more):
    return unlearn(
        base, FORGET, RETAIN, reference, config, seed=seed, target="t", evaluate=evaluate, **more
    )


def test_in_float32_only_the_model_that_is_evaluated_is_merged(base, reference):
    """A merged copy of a 7B model is 26 GB."""
    held = []

    def merged(model=None) -> Evaluation:
        held.append(sum(x.shape == base.blocks.down_proj.kernel.shape for x in jax.live_arrays()))
        return never(model)

    merged()
    run(base, reference, evaluate=merged)
    assert held == [held[0], held[0] + 1, held[0] + 1]


# Batches.


@pytest.mark.parametrize(("size", "rows"), [(9, 4), (4, 9), (7, 7), (1, 3)])
def test_batches_cover_every_example_once_an_epoch(size, rows):
    steps = range(3 * size)
    flat = np.concatenate([batch_indices(size, rows, 5, step) for step in steps])
    for start in range(0, len(flat) - size, size):
        assert sorted(flat[start : start + size]) == list(range(size))
    backwards = {step: batch_indices(size, rows, 5, step) for step in reversed(steps)}
    np.testing.assert_array_equal(np.concatenate([backwards[step] for step in steps]), flat)


def test_batches_follow_the_seed_and_change_with_the_epoch():
    first = batch_indices(50, 50, 0, 0)
    assert (first != batch_indices(50, 50, 1, 0)).any()
    assert (first != batch_indices(50, 50, 0, 1)).any()


# The reference model as numbers, on the embedded model.


@functools.cache
def embedded() -> tuple:
    folder = CHECKPOINTS / "qwen2"
    chat = Chat.load(folder)
    drawn = [item for item in corpus.training_examples(9, 30) if item.refusal][:10]
    examples = [chat.example(item.prompt, item.refusal) for item in drawn]
    return checkpoint.load(folder), examples


def test_reference_log_probs_equal_torch():
    model, examples = embedded()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "qwen2").eval()
    expected = []
    for item in examples:
        ids, start = torch.tensor([item.prompt + item.response]), len(item.prompt)
        with torch.no_grad():
            log_probs = torch.log_softmax(theirs(ids).logits[0, :-1].double(), dim=-1)
        expected.append(log_probs.gather(-1, ids[0, 1:, None])[start - 1 :, 0].sum().item())
    for batch_size in (3, 64):
        ours = reference_log_probs(model, examples, batch_size)
        assert ours.shape == (len(examples),)
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    # Adapters off: the reference is the base whatever is attached.
    adapted = lora.attach(model, LORA, jax.random.key(0))
    adapted.blocks.q_proj.lora_b[...] += 1.0
    np.testing.assert_array_equal(reference_log_probs(adapted, examples, 64), ours)


def test_first_npo_loss_is_that_of_equal_policies():
    beta = 0.1
    model, examples = embedded()
    config = UnlearnConfig(lora=LORA, beta=beta, batch_size=8, max_steps=1)
    trained = unlearn(
        model,
        examples,
        [],
        reference_log_probs(model, examples, 3),
        config,
        seed=0,
        target="t",
        evaluate=never,
    )
    assert trained.first_loss == pytest.approx(2 / beta * math.log(2), abs=1e-5)
    assert trained.trajectory[-1]["log_ratio"] == pytest.approx(0, abs=1e-5)


# What is trained.


def test_adapters_are_all_that_changes(base, reference):
    before = arrays(base)
    trained = run(base, reference).model
    assert_same_arrays(arrays(base), before)
    after = arrays(trained)
    assert_same_arrays(arrays(lora.detach(trained)), before)
    fresh = arrays(lora.attach(base, LORA, jax.random.key(0)))
    assert {path[-1] for path in after.keys() - before.keys()} == {"lora_a", "lora_b"}
    for path in after.keys() - before.keys():
        assert (after[path] != fresh[path]).any(), path


def test_full_fine_tuning_changes_its_own_copy(base, reference):
    before = arrays(base)
    config = UnlearnConfig(trainable="full", learning_rate=1e-3, batch_size=8, max_steps=2)
    for _ in range(2):  # the base is not donated: it serves again
        after = arrays(run(base, reference, config).model)
        assert_same_arrays(arrays(base), before)
        assert after.keys() == before.keys()
        for path, value in after.items():
            assert (value != before[path]).any(), path


def test_same_seed_same_adapters_bit_for_bit(base, reference):
    first, again = (run(base, reference, seed=3) for _ in range(2))
    assert_same_arrays(arrays(first.model), arrays(again.model))
    assert first.trajectory == again.trajectory
    other = arrays(run(base, reference, seed=4).model)
    assert any((value != other[path]).any() for path, value in arrays(first.model).items())


def response_log_probs(model, examples: Sequence[TokenExample]) -> float:
    return float(np.mean(reference_log_probs(lora.merge(model), examples, 16)))


def test_forget_falls_and_retain_is_kept(base, reference):
    plain = run(base, reference).model
    retained = run(base, reference, dataclasses.replace(SMALL, retain_weight=5.0)).model
    for model in (plain, retained):
        assert response_log_probs(model, FORGET) < response_log_probs(base, FORGET) - 1
    assert response_log_probs(retained, RETAIN) > response_log_probs(plain, RETAIN) + 1


# The loss, by its gradient: under SGD with rate 1 a step is the gradient.


PLAIN = {"optimizer": "sgd", "learning_rate": 1.0, "clip_norm": 1e9}


def gradient(base, reference, mesh=None, **weights) -> tuple[dict, dict]:
    rows = {"batch_size": 8, "retain_batch_size": 8}
    config = UnlearnConfig(lora=LORA, max_steps=1, **rows, **PLAIN, **weights)
    logged: list = []
    model = run(base, reference, config, log=logged.append, mesh=mesh).model
    fresh = arrays(lora.attach(base, LORA, jax.random.key(0)))
    after = arrays(model)
    moved = {p: fresh[p] - after[p] for p in after if p[-1].startswith("lora")}
    return moved, logged[0]


def test_the_loss_is_the_weighted_sum(base, reference):
    forget, _ = gradient(base, reference, forget_weight=1.0, retain_weight=0.0)
    retain, _ = gradient(base, reference, forget_weight=0.0, retain_weight=1.0)
    both, row = gradient(base, reference, forget_weight=2.0, retain_weight=3.0)
    for path, value in both.items():
        np.testing.assert_allclose(value, 2 * forget[path] + 3 * retain[path], atol=1e-5)
    assert row["loss"] == pytest.approx(2 * row["forget_loss"] + 3 * row["retain_loss"], rel=1e-5)
    norm = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in both.values()))
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_step_is_the_same_on_a_mesh(tiny, base, reference):
    weights = {"forget_weight": 2.0, "retain_weight": 3.0}
    ours, row = gradient(base, reference, **weights)
    mesh = make_mesh((2, 2, 2))
    spread = checkpoint.load(tiny("qwen2"), mesh=mesh)
    numbers = reference_log_probs(spread, FORGET, 4, mesh)
    np.testing.assert_allclose(numbers, reference, atol=1e-5)
    theirs, other = gradient(spread, numbers, mesh=mesh, **weights)
    for name in row.keys() - {"tokens_per_second"}:
        value = row[name]
        assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    for path, value in ours.items():
        np.testing.assert_allclose(theirs[path], value, atol=1e-5, err_msg=str(path))


def test_recomputing_blocks_changes_nothing(base, reference):
    losses = []
    for remat in ("none", "projections", "full"):
        config = dataclasses.replace(SMALL, remat=remat)
        run(base, reference, config, log=losses.append)
    for key in losses[1].keys() - {"tokens_per_second"}:  # of the second step
        value = losses[1][key]
        for other in (SMALL.max_steps + 1, 2 * SMALL.max_steps + 1):
            assert losses[other][key] == pytest.approx(value, rel=1e-4), key


# When it stops, with a step that does nothing.


@pytest.fixture
def idle_step(monkeypatch):
    """Replaces the train step; set `.loss` to what it should report."""
    step = type("Step", (), {"loss": 1.0})()

    def do(setup, state, batch):
        kept = np.asarray(batch.rows.examples) >= 2 * batch.reference.shape[1]
        assert kept.any() == (setup.traced_settings["retain_weight"] > 0)
        loss = jnp.float32(step.loss)
        return state, {"loss": loss, "forget_loss": loss}

    monkeypatch.setattr(trainer, "train_step", do)
    return step


def falling(rates: Sequence[float], invalid: Sequence[float] = ()):
    """Dev rates of the target, one an evaluation, the first before any step."""
    targets, invalids = iter(rates), iter([*invalid, *[0.0] * len(rates)])
    return lambda model: Evaluation({"t": next(targets), "other": 0.0}, next(invalids))


def settings(**changes) -> UnlearnConfig:
    return UnlearnConfig(**({"lora": LORA, "max_steps": 10, "eval_every": 3} | changes))


STOPS = [
    # settings, rates of the target, rates of invalid → steps that the model given back had, why
    # the run stopped, where it was evaluated
    (settings(), [1, 0.5, 0.1], [], 6, "target", [0, 3, 6]),
    (settings(stop_at=0.5), [1, 0.5], [], 3, "target", [0, 3]),
    (settings(stop_at=0.0), [1, 0.1, 0.0], [], 6, "target", [0, 3, 6]),
    (settings(min_steps=6), [1, 0, 0], [], 6, "target", [0, 3, 6]),
    (settings(min_steps=7), [1, 0, 0, 0], [], 9, "target", [0, 3, 6, 9]),
    (settings(), [1, 1, 1, 1, 1], [], 10, "limit", [0, 3, 6, 9, 10]),
    (settings(), [1, 1, 1, 1, 0], [], 10, "target", [0, 3, 6, 9, 10]),
    (settings(), [0, 1, 0], [], 6, "target", [0, 3, 6]),
    (settings(), [1, 1, 1], [0, 0.2, 0.21], 3, "invalid", [0, 3, 6]),
    (settings(max_invalid=0.5), [1, 1, 0.1], [0, 0.5, 0.5], 6, "target", [0, 3, 6]),
    (settings(), [1, 0], [0, 0.9], 0, "invalid", [0, 3]),
    (settings(min_steps=9), [1, 1, 1, 0], [0, 0, 0.3, 0.9], 3, "invalid", [0, 3, 6, 9]),
    # The retain set repairs in its first steps what the others broke.
    (settings(min_steps=6), [1, 0.5, 0], [0, 0.9, 0], 6, "target", [0, 3, 6]),
    (settings(retain_weight=1.0), [1, 0, 0], [0, 0.21, 0.2], 6, "target", [0, 3, 6]),
    (settings(min_steps=6), [1, 0.5, 0], [0, 0, 0.9], 3, "invalid", [0, 3, 6]),
    (settings(), [1, math.nan, 0], [0, 0.2, 0], 6, "target", [0, 3, 6]),
    (settings(retain_weight=1.0, eval_every=4), [1, 1, 0], [], 8, "target", [0, 4, 8]),
]


@pytest.mark.parametrize(("config", "rates", "invalid", "steps", "why", "seen"), STOPS)
def test_when_it_stops(base, reference, idle_step, config, rates, invalid, steps, why, seen):
    del idle_step
    trained = run(base, reference, config, evaluate=falling(rates, invalid))
    assert (trained.steps, trained.stopped) == (steps, why)
    assert (trained.last_step, [point["step"] for point in trained.trajectory]) == (seen[-1], seen)
    known = [None if math.isnan(rate) else rate for rate in rates]
    assert [point["refusal"]["t"] for point in trained.trajectory] == known
    assert [point["invalid_rate"] for point in trained.trajectory][: len(invalid)] == invalid


def test_it_evaluates_the_model_being_trained(base, reference):
    seen = []

    def evaluate(model):
        seen.append(np.asarray(model.blocks.q_proj.kernel[...]))  # adapters are merged to be read
        return never(model)

    trained = run(base, reference, evaluate=evaluate)
    np.testing.assert_array_equal(seen[0], base.blocks.q_proj.kernel[...])
    assert not np.array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[1], lora.merge(trained.model).blocks.q_proj.kernel[...])


@pytest.mark.parametrize(
    ("restored", "devices"), [(True, (1, 1, 1)), (False, (1, 1, 1)), (True, (2, 2, 1))]
)
def test_a_damaged_run_gives_back_its_last_undamaged_model(tiny, reference, restored, devices):
    seen = []

    def evaluate(model):
        seen.append(np.asarray(model.blocks.q_proj.kernel[...]))
        return Evaluation({"t": 1.0}, 0.9 if len(seen) > 2 else 0.0)

    config = dataclasses.replace(SMALL, max_steps=3, eval_every=1)
    mesh = make_mesh(devices)
    base = checkpoint.load(tiny("qwen2"), mesh=mesh)
    more = {"restore_valid": restored, "mesh": mesh}
    trained = run(base, reference, config, evaluate=evaluate, **more)
    assert (trained.stopped, trained.last_step) == ("invalid", 2)
    assert trained.steps == (1 if restored else 2)
    given = lora.merge(trained.model).blocks.q_proj.kernel[...]
    np.testing.assert_array_equal(given, seen[trained.steps])
    assert not np.array_equal(seen[1], seen[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(base, reference, idle_step, tmp_path, bad):
    idle_step.loss = bad
    with (
        pytest.raises(RunStoppedError, match=r"loss is (nan|inf) at step 1; lower .*learning_rate"),
        MetricsWriter(tmp_path, "npo", 0) as log,
    ):
        run(base, reference, settings(), log=log)
    (row,) = read_jsonl(tmp_path / "metrics/npo.seed_0.jsonl")
    assert row.pop("tokens_per_second") > 0
    assert row == {"arm": "npo", "seed": 0, "step": 1, "loss": None, "forget_loss": None}


def test_the_real_step_reports_what_is_not_finite(base, reference):
    with pytest.raises(RunStoppedError, match="is nan at step 1"):
        run(base, reference * math.nan)


def test_a_step_is_dispatched_before_the_figures_of_the_last_one_are_read(
    base, reference, idle_step, monkeypatch
):
    del idle_step
    events: list[str] = []
    step, read = trainer.train_step, trainer.host_array

    def dispatched(setup, state, batch):
        events.append(f"dispatch {batch.draw[1] + 1}")
        return step(setup, state, batch)

    def figure(x):
        events.append("read")
        return read(x)

    monkeypatch.setattr(trainer, "train_step", dispatched)
    monkeypatch.setattr(trainer, "host_array", figure)

    def log(row):
        events.append(f"row {row['step']}")

    def evaluate(model):
        events.append("evaluate")
        return never(model)

    run(base, reference, settings(max_steps=5), evaluate=evaluate, log=log)
    rows = [["read", "read", f"row {i}"] for i in range(6)]
    assert events == [
        *["evaluate", "dispatch 1", "dispatch 2", *rows[1], "dispatch 3", *rows[2]],
        *[*rows[3], "evaluate"],  # which decides whether there is another step
        *["dispatch 4", "dispatch 5", *rows[4], *rows[5], "evaluate"],
    ]


def test_one_row_of_metrics_a_step(base, reference, idle_step):
    idle_step.loss = 2.5
    rows: list = []
    trained = run(base, reference, settings(max_steps=4), log=rows.append)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert trained.first_loss == 2.5
    assert all(row["loss"] == 2.5 for row in rows)
