"""Every objective of the registry on a tiny model, restated in NumPy float64 from logits."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax
from tiny_models import our_outputs, random_batch

from ema_jax.data.batching import Batch
from ema_jax.data.chat import TokenExample
from ema_jax.data.packing import Item, pack, spread
from ema_jax.models import checkpoint, lora
from ema_jax.models.decoder import LoRAParam, Output
from ema_jax.models.sharding import make_mesh
from ema_jax.unlearning import objectives
from ema_jax.unlearning import train_step as steps
from ema_jax.unlearning.batches import Data
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.objectives import FORGET, RETAIN, LossBatch, LossContext, part_places

CONFIG = UnlearnConfig(
    lora=lora.LoRAConfig(rank=2, alpha=4.0),
    retain_weight=3.0,
    margin=0.3,
    steering=3.0,
    feature_layer=2,
)
NORMED = ("ga", "npo", "dpo")


def batch(rows: int, length: int, start: int) -> Batch:
    tokens, mask = random_batch(rows, length, padding="right")
    return Batch(np.where(mask, tokens, 0), mask, mask & (np.arange(length) >= start))


FORGET_ROWS, PREFERRED, KEPT = batch(4, 12, 3), batch(4, 11, 2), batch(4, 10, 1)
REFERENCE = np.array([-20.0, -31.0, -8.0, -15.0], np.float32)
PREFERRED_REFERENCE = np.array([-25.0, -12.0, -18.0, -9.0], np.float32)


def examples_of(rows: Batch) -> list[TokenExample]:
    """The rows without padding."""
    found = []
    for tokens, mask, response in zip(*rows, strict=True):
        prompt = tokens[mask & ~response].tolist()
        found.append(TokenExample(tuple(prompt), tuple(tokens[response].tolist())))
    return found


def loss_batch(retain: str = "ce", dtype: Any = np.float32) -> LossBatch:
    """The three parts in six rows of two examples each; for `kl_unmasked`, retain rows alone."""
    parts = enumerate(map(examples_of, (FORGET_ROWS, PREFERRED, KEPT)))
    items = [Item(4 * part + i, x) for part, part_rows in parts for i, x in enumerate(part_rows)]
    chosen, length = spread([item.example.size for item in items], 6), 23
    rows = [[items[i] for i in row] for row in chosen]
    if RETAIN[retain].everywhere:
        rows, length = [[item._replace(everywhere=True)] for item in items[8:]], 10
    packed = jax.tree.map(jnp.asarray, pack(rows, length, len(rows) * length))
    totals = part_places(packed.examples, 4).sum(axis=(1, 2)).astype(dtype)
    references = (jnp.asarray(x, dtype) for x in (REFERENCE, PREFERRED_REFERENCE))
    return LossBatch(packed, *references, jnp.maximum(totals, 1))


@pytest.fixture(scope="module")
def models(tiny):
    """A base, and the same with adapters that do something."""
    base = checkpoint.load(tiny("mistral"))
    model = lora.attach(base, CONFIG.lora, jax.random.key(0))
    for i, name in enumerate(lora.TARGETS):
        linear = getattr(model.blocks, name)
        noise = jax.random.normal(jax.random.key(i), linear.lora_b.shape)
        linear.lora_b = LoRAParam(0.1 * noise)
    return model, base


class Formula:
    """A model that NumPy computes, too: its objectives can be compared to the last digit."""

    config = types.SimpleNamespace(vocab_size=97, num_layers=2)

    def __init__(self, seed: int, dtype: type = np.float64, xp: Any = np):
        rng = np.random.default_rng(seed)
        sizes = ((97, 32), (32, 97))
        self.weights = [xp.asarray(0.5 * rng.normal(size=size), dtype) for size in sizes]
        self._xp = xp

    def __call__(self, tokens, mask, *, segments=None, tap=None, remat=False) -> Output:
        seen = np.tri(tokens.shape[1]) > 0
        if segments is not None:
            own = segments[:, :, None]
            seen = seen & ((own == segments[:, None]) | (own == 0))
        x = self._xp.matmul(1.0 * seen, self.weights[0][tokens])
        states = [x, self._xp.sin(x), self._xp.cos(x)]
        taps = None if tap is None else self._xp.stack([tap(state) for state in states])
        return Output(states[-1], taps, None, None)

    def logits(self, hidden):
        return hidden @ self.weights[1]


def formula_outputs(model: Formula, tokens: np.ndarray, mask: np.ndarray) -> tuple:
    """What `our_outputs` gives of a decoder."""
    out = model(tokens, mask, tap=lambda x: x)
    return model.logits(out.hidden), out.hidden, out.taps


class Restated:
    """Log-probabilities and residuals in float64, and the formulas on them."""

    def __init__(self, models, config, outputs=our_outputs):
        self.model, self.base = models
        self.config, self.outputs = config, outputs

    def tokens(self, rows: Batch) -> np.ndarray:
        logits = self.outputs(self.model, rows.tokens, rows.mask)[0].astype(np.float64)
        chosen = np.take_along_axis(
            log_softmax(logits, axis=-1)[:, :-1], rows.tokens[:, 1:, None].astype(int), axis=-1
        )[..., 0]
        return np.where(rows.response[:, 1:], chosen, 0.0)

    def scores(self, rows: Batch, reference: np.ndarray) -> tuple:
        number = rows.response.sum(axis=1) if self.config.forget_norm == "mean" else 1
        return self.tokens(rows).sum(axis=1) / number, reference.astype(np.float64) / number

    def distance(self, rows: Batch, ours: np.ndarray, theirs: np.ndarray) -> float:
        square = np.mean((ours - theirs) ** 2, axis=-1)[:, :-1]
        return float(square[rows.response[:, 1:]].mean())

    def residual(self, model, rows: Batch) -> np.ndarray:
        taps = self.outputs(model, rows.tokens, rows.mask)[2]
        return taps[self.config.feature_layer].astype(np.float64)

    def forget(self) -> float:
        c = self.config
        ours, kept = self.scores(FORGET_ROWS, REFERENCE)
        ratio = ours - kept

        def softplus(x: np.ndarray) -> float:  # −log σ(−x)
            return float(np.mean(np.logaddexp(0.0, x)))

        match c.objective:
            case "ga":
                return float(np.mean(ours))
            case "npo":
                return 2 / c.beta * softplus(c.beta * ratio)
            case "simnpo":
                means = self.tokens(FORGET_ROWS).sum(axis=1) / FORGET_ROWS.response.sum(axis=1)
                return 2 / c.beta * softplus(c.beta * (means + c.margin))
            case "dpo":
                winner, kept_winner = self.scores(PREFERRED, PREFERRED_REFERENCE)
                return 2 / c.beta * softplus(c.beta * (ratio - (winner - kept_winner)))
            case "sft":
                return float(-self.tokens(PREFERRED).sum() / PREFERRED.response.sum())
            case "rmu":
                u = np.asarray(jax.random.uniform(jax.random.key(0), (32,)), np.float64)
                vector = c.steering * u / np.linalg.norm(u)
                return self.distance(FORGET_ROWS, self.residual(self.model, FORGET_ROWS), vector)
        raise AssertionError(c.objective)

    def retain(self) -> float:
        def distribution(model):
            logits = self.outputs(model, KEPT.tokens, KEPT.mask)[0].astype(np.float64)
            return log_softmax(logits, axis=-1)

        match self.config.retain_objective:
            case "ce":
                return float(-self.tokens(KEPT).sum() / KEPT.response.sum())
            case "l2":
                pair = (self.residual(model, KEPT) for model in (self.model, self.base))
                return self.distance(KEPT, *pair)
        ours, kept = distribution(self.model), distribution(self.base)
        divergence = np.sum(np.exp(kept) * (kept - ours), axis=-1)
        if self.config.retain_objective == "kl_unmasked":
            return float(divergence.mean())
        return float(divergence[:, :-1][KEPT.response[:, 1:]].mean())


def context(model, base, dtype=np.float32, **changes) -> LossContext:
    config = dataclasses.replace(CONFIG, **changes)
    return LossContext(model, lambda: base, config, loss_batch(config.retain_objective, dtype))


def retain_loss(name: str, model, base, dtype=np.float32):
    return RETAIN[name].loss(context(model, base, dtype, retain_objective=name))


def every_loss(model, base, dtype=np.float32) -> dict:
    """Objective and norm → loss."""
    forget = {
        (name, norm): FORGET[name].loss(
            context(model, base, dtype, objective=name, forget_norm=norm)
        )[0]
        for name in FORGET
        for norm in ("sum", "mean")
    }
    return forget | {(name, ""): retain_loss(name, model, base, dtype) for name in RETAIN}


def formula_losses(dtype: type) -> tuple:
    """Every loss on models that are formulas, and their slopes along the model's weights."""
    base = Formula(1, dtype, jnp)

    def losses(weights):
        model = Formula(0, dtype, jnp)
        model.weights = weights

        return every_loss(model, base, dtype)

    weights = Formula(0, dtype, jnp).weights
    return jax.jit(lambda w: jax.jvp(losses, [w], [[jnp.sin(x) for x in w]]))(weights)


def formula_restated(name: str, norm: str, step: float = 0.0) -> float:
    models = Formula(0), Formula(1)
    models[0].weights = [w + step * np.sin(w) for w in models[0].weights]
    if norm:
        config = dataclasses.replace(CONFIG, objective=name, forget_norm=norm)
        return Restated(models, config, formula_outputs).forget()
    config = dataclasses.replace(CONFIG, retain_objective=name)
    return Restated(models, config, formula_outputs).retain()


@pytest.mark.parametrize(("dtype", "close"), [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_objectives_and_gradients_to_the_last_digit(dtype, close):
    """In float64, where rounding hides nothing; in float32, as they are used."""
    with jax.enable_x64(dtype is np.float64):
        values, slopes = jax.tree.map(float, formula_losses(dtype))
    assert len(values) == 2 * len(FORGET) + len(RETAIN)
    for name, value in values.items():
        assert value == pytest.approx(formula_restated(*name), rel=close), name
        if dtype is np.float64:
            ahead, behind = (formula_restated(*name, step) for step in (1e-5, -1e-5))
            assert slopes[name] == pytest.approx((ahead - behind) / 2e-5, rel=1e-7), name


@pytest.fixture(scope="module")
def values(models):
    """Every loss under both norms, and those of a model that is its own base: one program."""
    (graph, state), (base_graph, base_state) = map(nnx.split, models)

    @jax.jit
    def losses(state, base_state):
        model, base = nnx.merge(graph, state), nnx.merge(base_graph, base_state)
        same = {name: retain_loss(name, base, base) for name in RETAIN}
        return every_loss(model, base), same

    return jax.tree.map(float, losses(state, base_state))


@pytest.mark.parametrize("norm", ["sum", "mean"])
@pytest.mark.parametrize("name", FORGET)
def test_forget_objectives_equal_their_formulas(models, values, name, norm):
    config = dataclasses.replace(CONFIG, objective=name, forget_norm=norm)
    expected = Restated(models, config).forget()
    assert values[0][name, norm] == pytest.approx(expected, rel=2e-6, abs=1e-6)
    assert (values[0][name, "sum"] != values[0][name, "mean"]) == (name in NORMED)


@pytest.mark.parametrize("name", RETAIN)
def test_retain_objectives_equal_their_formulas(models, values, name):
    expected = Restated(models, dataclasses.replace(CONFIG, retain_objective=name)).retain()
    assert expected > 0.01
    assert values[0][name, ""] == pytest.approx(expected, rel=2e-6, abs=1e-6)
    if name != "ce":
        assert values[1][name] == pytest.approx(0, abs=1e-9), "the base is its own"


PAIRS = [("npo", "kl"), ("rmu", "l2")]


def test_gradients_through_the_adapters_equal_finite_differences(models):
    """Along a random direction of them; the base of kl and l2 takes no gradient."""
    model, base = models
    graph, adapters, rest = nnx.split(model, LoRAParam, ...)

    def losses(adapters):
        model = nnx.merge(graph, adapters, rest)
        parts = [
            objectives.total_loss(
                context(model, base, objective=a, retain_objective=b, beta=0.5, retain_weight=3.0)
            )
            for a, b in PAIRS
        ]
        return jnp.stack([loss for loss, _ in parts])

    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    direction = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    gradients = jax.tree.leaves(jax.jit(jax.jacrev(losses))(adapters))
    slopes = sum(
        np.tensordot(np.asarray(g), np.asarray(d), axes=d.ndim)
        for g, d in zip(gradients, direction, strict=True)
    )
    value, step = jax.jit(losses), 1e-3

    def moved(by: float) -> np.ndarray:
        there = [x + by * d for x, d in zip(leaves, direction, strict=True)]
        return np.asarray(value(jax.tree.unflatten(structure, there)), np.float64)

    np.testing.assert_allclose(slopes, (moved(step) - moved(-step)) / (2 * step), rtol=1e-2)


def test_the_formulas_gradients_in_closed_form():
    ratio = np.array([-30.0, 0.0, 4.0])
    sigmoid = 1 / (1 + np.exp(-0.1 * ratio))
    zeros = jnp.zeros(3)
    got = jax.grad(objectives.dpo_loss, argnums=(0, 1))(zeros, jnp.asarray(ratio), 0.1)
    np.testing.assert_allclose(got[0], -2 * sigmoid / 3, rtol=1e-5)
    np.testing.assert_allclose(got[1], 2 * sigmoid / 3, rtol=1e-5)
    got = jax.grad(objectives.simnpo_loss)(jnp.asarray(ratio), 0.1, 0.0)
    np.testing.assert_allclose(got, 2 * sigmoid / 3, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(objectives.ga_loss)(zeros), np.full(3, 1 / 3), rtol=1e-6)
    assert float(objectives.dpo_loss(zeros, zeros, 0.1)) == pytest.approx(20 * np.log(2))
    assert float(objectives.simnpo_loss(zeros, 2.5, 0.0)) == pytest.approx(0.8 * np.log(2))


# The step around them.


def gradient_of(base, config):
    """Of all examples, packed as training packs them."""
    config = dataclasses.replace(config, batch_size=4, retain_batch_size=4)
    forget, preferred, kept = map(examples_of, (FORGET_ROWS, PREFERRED, KEPT))
    data = Data(forget, REFERENCE, kept, preferred, PREFERRED_REFERENCE)
    setup = steps.prepare(base, config, 0, make_mesh())
    trainable = steps.init_state(setup).trainable
    return jax.jit(steps.loss_and_gradient)(setup, trainable, data.host_batch(config, 5, 0))


@pytest.mark.parametrize(("forget", "retain"), [("npo", "ce"), ("sft", "kl")])
def test_accumulated_gradients_are_those_of_the_whole_batch(models, forget, retain):
    config = dataclasses.replace(CONFIG, objective=forget, retain_objective=retain)
    whole = gradient_of(models[1], config)
    parts = gradient_of(models[1], dataclasses.replace(config, accumulate=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, parts)


def test_dropout_leaves_out_a_share_of_an_adapters_inputs(models):
    model, base = models
    linear = jax.tree.map(lambda x: x[0], nnx.state(model.blocks.q_proj))
    rate, rows = 0.25, np.ones((2000, 32), np.float32)
    dropped = lora.with_dropout(model, lora.LoRAConfig(dropout=rate), jax.random.key(1))
    graph, state = nnx.split(dropped.blocks.q_proj)
    module = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    plain = nnx.merge(nnx.graphdef(model.blocks.q_proj), linear)
    kernel = np.asarray(plain.kernel[...])
    ours, whole = np.asarray(module(rows)) - rows @ kernel, np.asarray(plain(rows)) - rows @ kernel
    np.testing.assert_allclose(ours.mean(axis=0), whole[0], atol=0.1 * np.abs(whole).max())
    each = np.asarray(plain.lora_a[...]) @ np.asarray(plain.lora_b[...]) * plain.lora_scale
    spread = np.sqrt(np.sum(each**2, axis=0) * rate / (1 - rate))
    np.testing.assert_allclose(ours.std(axis=0), spread, rtol=0.1)
    # In training only, drawn again for every step, and the reference of kl never sees it.
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, dropout=rate))
    with_it, without = gradient_of(base, config), gradient_of(base, CONFIG)
    pairs = zip(jax.tree.leaves(with_it[0]), jax.tree.leaves(without[0]), strict=True)
    assert any((a != b).any() for a, b in pairs)
    tokens, mask = FORGET_ROWS.tokens, FORGET_ROWS.mask
    assert (our_outputs(dropped, tokens, mask)[0] != our_outputs(model, tokens, mask)[0]).any()
    off = our_outputs(lora.detach(dropped), tokens, mask)[0]
    np.testing.assert_array_equal(off, our_outputs(base, tokens, mask)[0])


def test_only_the_chosen_layers_and_modules_are_trained(models):
    base = models[1]
    config = dataclasses.replace(CONFIG, layers=(1, 1))
    setup = steps.prepare(base, config, 0, make_mesh())
    trainable = steps.init_state(setup).trainable
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trainable)} == {1}
    moved = jax.tree.map(lambda x: x + 1.0, trainable)
    model = steps.assemble(setup, moved)
    for name in lora.TARGETS:
        a = np.asarray(getattr(model.blocks, name).lora_b[...])
        assert (a[1] == 1).all()
        assert not a[[0, 2]].any()

    full = dataclasses.replace(
        CONFIG, trainable="full", layers=(1, 2), modules=("down_proj",), objective="rmu"
    )
    setup = steps.prepare(base, full, 0, make_mesh())
    assert len(jax.tree.leaves(setup.initial)) == 1
    trainable = steps.init_state(setup).trainable
    same = steps.assemble(setup, trainable)
    np.testing.assert_array_equal(
        same.blocks.down_proj.kernel[...], base.blocks.down_proj.kernel[...]
    )
    changed = steps.assemble(setup, jax.tree.map(lambda x: x + 1.0, trainable))
    difference = np.asarray(
        changed.blocks.down_proj.kernel[...] - base.blocks.down_proj.kernel[...]
    )
    assert not difference[0].any()
    np.testing.assert_allclose(difference[1:], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(
        changed.blocks.up_proj.kernel[...], base.blocks.up_proj.kernel[...]
    )


def test_full_training_of_a_bfloat16_base_is_in_float32(tiny):
    base = checkpoint.load(tiny("mistral"), dtype=jnp.bfloat16)
    config = UnlearnConfig(trainable="full")
    setup = steps.prepare(base, config, 0, make_mesh())
    trainable = steps.init_state(setup).trainable
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float32"}
    model = steps.assemble(setup, trainable)
    assert model.embed[...].dtype == jnp.bfloat16
