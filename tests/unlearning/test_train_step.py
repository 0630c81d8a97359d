"""The compiled train step: the same on every mesh, no wasteful collectives, memory that scales."""

import contextlib
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from training_worker import random_examples

from ema_jax.data.chat import TokenExample
from ema_jax.errors import UserError
from ema_jax.models import checkpoint, lora
from ema_jax.models.sharding import batch_multiple, make_mesh, validate
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.unlearning import batches, log_probs, trainer
from ema_jax.unlearning import train_step as steps
from ema_jax.unlearning.batches import Data
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.optimizers import optimizer, schedule
from ema_jax.unlearning.reference import reference_log_probs
from ema_jax.unlearning.throughput import flops_per_token

CONFIG = UnlearnConfig(
    lora=lora.LoRAConfig(rank=2, alpha=4.0),
    retain_objective="kl",
    retain_weight=3.0,
    batch_size=8,
    retain_batch_size=8,
    remat="full",
)
FORGET, RETAIN = random_examples(9, 1), random_examples(11, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose sizes every axis divides, vocabulary included, and whose heads are not tied."""
    folder = tmp_path_factory.mktemp("even")
    config = transformers.AutoConfig.for_model(
        "mistral",
        vocab_size=104,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.18,
        sliding_window=None,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def compiled(folder, shape):
    """The step on a mesh, and what it takes. Under SGD of rate 1 it moves by the gradient."""
    mesh = make_mesh(shape)
    arm = dataclasses.replace(CONFIG, optimizer="sgd", learning_rate=1.0, clip_norm=1e9)
    base = checkpoint.load(folder, mesh=mesh)
    data = Data(FORGET, np.full(len(FORGET), -9.0, np.float32), RETAIN)
    setup = steps.prepare(base, arm, 0, mesh)
    # Away from the start, where half of the gradients are zero.
    moved = jax.tree.map(
        lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), setup.initial
    )
    state = steps.init_state(dataclasses.replace(setup, initial=moved))
    batch = data.host_batch(arm, 0, 0, batch_multiple(mesh))
    takes = (setup, state, batch.placed(mesh))
    return steps.train_step.lower(*takes).compile(), takes


def moved_by(program, takes) -> tuple:
    before = jax.tree.map(np.asarray, takes[1].trainable)
    state, metrics = program(*takes)
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, state.trainable), metrics


@pytest.fixture(scope="module")
def alone(folder):
    """Gradient and figures on one device."""
    return moved_by(*compiled(folder, (1, 1, 1)))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_the_step_on_a_mesh(folder, alone, shape, capfd):
    """The same loss and gradient, and no array with all rows of a batch on one device."""
    program, takes = compiled(folder, shape)
    assert "nvoluntary full remat" not in capfd.readouterr().err
    rows, length = takes[2].rows.tokens.shape[1:]
    for sizes in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", program.as_text()):
        numbers = [int(n) for n in sizes.split(",") if n]
        if math.prod(numbers) <= rows * length:  # a norm's figure for each token
            continue
        assert not {rows * length, rows * (length - 1)} & set(numbers), sizes
        assert numbers[:2] not in ([rows, length], [rows, length - 1]), sizes
    for ours, theirs in zip(*map(jax.tree.leaves, (moved_by(program, takes), alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def compilations():
    """The names of the programs compiled meanwhile.

    (A jitted function's own count is of calls that looked different, compiled again or not.)
    """
    names: list[str] = []

    def count(event: str, seconds: float, **about) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_a_program_for_each_length(folder, shape, monkeypatch):
    """In the loop itself: what a step returns lies as what it took, so it is not compiled again.

    Nor is it for an arm with other numbers, which has the loss that NumPy gives for its own.
    """
    mesh = make_mesh(shape)
    base = checkpoint.load(folder, mesh=mesh)
    few = lora.LoRAConfig(rank=2, targets=("q_proj", "o_proj"))
    arm = dataclasses.replace(CONFIG, lora=few, retain_objective="ce", remat="none", max_steps=6)
    traced = {"beta": 0.5, "forget_weight": 2.0, "retain_weight": 7.0, "learning_rate": 1e-3}
    loop = {"max_steps": 5, "eval_every": 3, "stop_at": 0.3, "retain_counts": {"bias": 4}}
    forget = [*random_examples(16, 1), TokenExample((1,) * 60, (2,) * 10)]
    reference = np.linspace(-40.0, -9.0, len(forget), dtype=np.float32)
    shapes, kept = [], []

    def watched(setup, state, batch):
        out = steps.train_step(setup, state, batch)
        shapes.append((batch.rows.tokens.shape, batch.rows.places.shape))
        kept.extend(x.shape for x in jax.tree.leaves(state) if not x.is_deleted())
        assert not any(x.is_deleted() for x in jax.tree.leaves(setup) if isinstance(x, jax.Array))
        return out

    monkeypatch.setattr(trainer, "train_step", watched)
    arms = (arm, dataclasses.replace(arm, **traced, **loop))
    rows: list[list] = [[], []]
    with compilations() as compiled:
        for config, log in zip(arms, rows, strict=True):
            trainer.unlearn(
                base,
                forget,
                RETAIN,
                reference,
                config,
                seed=0,
                target="t",
                evaluate=lambda model: Evaluation({"t": 1.0}, 0.0),
                mesh=mesh,
                log=log.append,
            )
    assert len(shapes) == 11
    assert compiled.count("jit(train_step)") == len(set(shapes)) <= 5, compiled
    assert not kept, "donated"

    chosen, retained = Data(forget, reference, RETAIN).indices(arm, 0, 0)
    ratio = reference_log_probs(base, forget, 8, mesh).astype(np.float64) - reference
    number = sum(len(RETAIN[i].response) for i in retained)
    entropy = -reference_log_probs(base, RETAIN, 8, mesh)[retained].sum() / number
    for config, log in zip(arms, rows, strict=True):
        npo = 2 / config.beta * np.logaddexp(0, config.beta * ratio[chosen]).mean()
        loss = config.forget_weight * npo + config.retain_weight * entropy
        assert log[0]["forget_loss"] == pytest.approx(npo, rel=1e-5)
        assert log[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("tensor", "batch", "message"),
    [
        (8, 8, "tensor = 8 does not divide 4 heads and 2 key-value heads; use one of 1, 2"),
        (1, 6, r"batch_size = 6 does not divide .*data · fsdp = 8.*use 8"),
    ],
)
def test_what_does_not_divide_is_refused_with_a_fix(folder, tensor, batch, message):
    base = checkpoint.load(folder)
    mesh = make_mesh((8 // tensor, 1, tensor))
    with pytest.raises(UserError, match=message):
        validate(base.config, mesh.shape, {"unlearn.batch_size": batch})
    validate(base.config, make_mesh((4, 1, 2)).shape, {"unlearn.batch_size": 8}, parts=2)


# Memory.


def loss_memory(monkeypatch, limit: int, rows: int, length: int) -> int:
    """Bytes of temporaries of the loss's value and gradient at Qwen2.5's vocabulary."""
    monkeypatch.setattr(log_probs, "_logits_at_once", lambda mesh, words: limit)
    vocabulary, width = 152_064, 64

    class Head:
        config = type("Config", (), {"vocab_size": vocabulary})()

        def __init__(self, weights):
            self.weights = weights

        def logits(self, hidden):
            return jnp.matmul(hidden, self.weights, preferred_element_type=jnp.float32)

    def loss(hidden, weights, targets):
        return jnp.sum(log_probs.target_log_probs(Head(weights), hidden, targets))

    shapes = (
        jax.ShapeDtypeStruct((rows, length, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
    )
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_loss_needs_a_quarter_of_the_unchunked_memory(monkeypatch):
    limit = log_probs._LOGITS  # of an accelerator with little memory
    chunked = loss_memory(monkeypatch, limit, 16, 128)
    whole = loss_memory(monkeypatch, 1 << 40, 16, 128)
    assert whole > 16 * 128 * 152_064 * 4
    assert chunked <= whole / 4


# Batches.


def drawn_examples(number: int, seed: int) -> list[TokenExample]:
    """Examples of realistic lengths: the median response is a fifth of the longest example."""
    rng = np.random.default_rng(seed)
    responses = np.clip(rng.lognormal(np.log(50), 0.8, number), 5, 190).astype(int)
    return [
        TokenExample((1,) * int(prompt), (2,) * int(response))
        for prompt, response in zip(rng.integers(20, 60, number), responses, strict=True)
    ]


@pytest.mark.parametrize(("accumulate", "groups"), [(1, 1), (2, 4)])
def test_batches_hold_each_example_once_in_nearly_full_rows(accumulate, groups):
    forget, retain = drawn_examples(64, 0), drawn_examples(200, 1)
    data = Data(forget, np.arange(64, dtype=np.float32), retain)
    config = UnlearnConfig(retain_weight=1.0, accumulate=accumulate)
    shapes, real, padded = set(), 0, 0
    for step in range(20):
        batch = data.host_batch(config, 3, step, groups)
        again = data.host_batch(config, 3, step, groups)
        jax.tree.map(np.testing.assert_array_equal, batch, again)
        places = batch.rows.examples[batch.rows.examples >= 0]
        chosen, kept = data.indices(config, 3, step)
        scored = sum(len(forget[i].response) for i in chosen)
        scored += sum(len(retain[i].response) for i in kept)
        assert len(places) == scored, "every token of every response, once"
        np.testing.assert_array_equal(np.sort(batch.reference.ravel()), np.sort(chosen))
        shapes.add((batch.rows.tokens.shape, batch.rows.places.shape))
        real += np.count_nonzero(batch.rows.segments)
        padded += batch.rows.tokens.size
    assert real / padded >= (0.9 if groups == 1 else 0.8)
    if groups == 1:
        assert len(shapes) <= 6


@pytest.mark.parametrize(
    ("needed", "steps", "lengths"),
    [
        ([160] * 127 + [176], 60, (176,)),
        ([160] * 127 + [176], 200, (160, 176)),
        ([100] * 64 + [150] * 32 + [200] * 32, 200, (100, 150, 200)),
        ([100] * 64 + [150] * 32 + [200] * 32, 80, (100, 200)),
        ([64], 1000, (64,)),
    ],
)
def test_a_length_is_worth_its_program(needed, steps, lengths):
    assert batches._few_lengths(needed, steps) == lengths


def test_examples_of_one_length_keep_a_row_each():
    examples = [TokenExample((1,) * 20, (2,) * 40)] * 8
    data = Data(examples, np.zeros(8, np.float32), examples)
    config = UnlearnConfig(retain_weight=1.0, batch_size=4, retain_batch_size=4)
    rows = data.host_batch(config, 0, 0).rows
    assert rows.tokens.shape == (1, 8, 64)
    assert rows.places.shape == (1, 1, 8 * 64 * 5 // 8)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("retained", [(20, 40), (3, 9)])
def test_of_examples_that_are_alike_one_batch_tells_the_layout(monkeypatch, groups, retained):
    """And is that of a sample of batches."""
    forget, retain = (
        [TokenExample((1,) * prompt, (2,) * response)] * 9
        for prompt, response in ((20, 40), retained)
    )
    config = UnlearnConfig(retain_weight=1.0, batch_size=8, retain_batch_size=8, accumulate=2)

    def layout(alike: bool):
        data = Data(forget, np.zeros(9, np.float32), retain)
        assert data._alike
        if not alike:
            monkeypatch.setattr(Data, "_alike", False)
        return data._layout(config, groups)

    assert layout(alike=True) == layout(alike=False)
    mixed = [*retain, TokenExample((1,), (2,))]
    monkeypatch.undo()
    assert not Data(forget, np.zeros(9, np.float32), mixed)._alike


def test_schedules():
    rate = {"learning_rate": 2.0, "max_steps": 10}
    cosine = schedule(UnlearnConfig(schedule="cosine", warmup_steps=4, **rate))
    assert [float(cosine(i)) for i in (0, 2, 4, 7, 10)] == pytest.approx([0, 1, 2, 1, 0])
    linear = schedule(UnlearnConfig(schedule="linear", **rate))
    assert [float(linear(i)) for i in (0, 5, 10)] == pytest.approx([2, 1, 0])
    constant = schedule(UnlearnConfig(warmup_steps=2, **rate))
    assert [float(constant(i)) for i in (0, 1, 2, 9)] == pytest.approx([0, 1, 2, 2])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_every_optimizer_goes_down(name):
    config = UnlearnConfig(optimizer=name, learning_rate=0.01, weight_decay=0.1)
    rule, x = optimizer(config), {"x": jnp.full((4, 4), 3.0)}
    state = rule.init(x)
    for _ in range(3):
        updates, state = rule.update(jax.grad(lambda x: jnp.sum(x["x"] ** 2))(x), state, x)
        x = jax.tree.map(jnp.add, x, updates)
    assert (x["x"] < 3).all()


# Speed.


def test_analytic_flops_against_xlas_count_of_a_forward_pass(folder):
    """XLA counts a scan's body once: compare on a model of one layer."""
    base = checkpoint.load(folder)
    graph, state = nnx.split(base)
    state["blocks"] = jax.tree.map(lambda x: x[:1], state["blocks"])
    config = dataclasses.replace(base.config, num_layers=1, windows=base.config.windows[:1])
    rows, length = 4, 16
    batch = (jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), bool))

    def forward(state, tokens, mask):
        model = nnx.merge(graph, state)
        model.config = config
        return model.logits(model(tokens, mask).hidden)

    cost = jax.jit(forward).lower(state, *batch).compile().cost_analysis()
    ours = flops_per_token(config, UnlearnConfig(trainable="full"), length) * rows * length / 3
    assert ours == pytest.approx(cost["flops"], rel=0.25)
    adapted = flops_per_token(config, CONFIG, length)
    assert adapted < flops_per_token(config, UnlearnConfig(trainable="full"), length)
