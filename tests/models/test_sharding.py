"""The same numbers on every mesh, with every parameter where its spec says."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_models import _forward, random_batch

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, lora
from ema_jax.models.sharding import (
    batch_multiple,
    batch_rows,
    batch_sharding,
    make_mesh,
    parameter_spec,
    product,
    vocabulary_product,
)

MESHES = [(1, 1, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)]


def arrays(model) -> dict:
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("variant", ["qwen2", "qwen3_window"])
def test_parameters_are_the_same_on_every_mesh(tiny, variant, shape):
    expected = arrays(checkpoint.load(tiny(variant)))
    mesh = make_mesh(shape)
    for path, value in arrays(checkpoint.load(tiny(variant), mesh=mesh)).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=str(path))
        spec = parameter_spec(path, value.shape, mesh)
        assert value.sharding == NamedSharding(mesh, spec), path
        assert len(value.sharding.device_set) == np.prod(shape)


def test_the_specs_split_what_is_large(tiny):
    mesh = make_mesh((2, 2, 2))
    model = checkpoint.load(tiny("mistral"), mesh=mesh)
    specs = {path: value.sharding.spec for path, value in arrays(model).items()}
    assert specs["blocks", "q_proj", "kernel"] == P(None, "fsdp", "tensor")
    assert specs["blocks", "gate_proj", "kernel"] == P(None, "fsdp", "tensor")
    assert specs["blocks", "o_proj", "kernel"] == P(None, "tensor", "fsdp")
    assert specs["blocks", "down_proj", "kernel"] == P(None, "tensor", "fsdp")
    assert specs["blocks", "input_norm", "scale"] == P(None, None)
    # 97 tokens: no axis divides the vocabulary, so it stays whole.
    assert specs[("embed",)] == P(None, None)
    assert specs[("head",)] == P(None, None)
    assert parameter_spec(("embed",), (96, 32), mesh) == P(("tensor", "fsdp"), None)
    assert parameter_spec(("head",), (32, 96), mesh) == P(None, ("tensor", "fsdp"))
    held = model.blocks.q_proj.kernel[...].addressable_shards[0].data.shape
    assert held == (3, 16, 32)


def test_loss_and_gradient_are_the_same_on_a_mesh(tiny):
    tokens, mask = random_batch(rows=8, length=5)

    @functools.partial(jax.jit, static_argnames="graph")
    def loss_and_gradient(graph, state, tokens, mask):
        def loss(state):
            model = nnx.merge(graph, state)
            return jnp.mean(jax.nn.logsumexp(model.logits(model(tokens, mask).hidden), axis=-1))

        return jax.value_and_grad(loss)(state)

    results = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(shape)
        model = lora.attach(
            checkpoint.load(tiny("qwen2"), mesh=mesh), lora.LoRAConfig(rank=2), jax.random.key(0)
        )
        placed = jax.device_put((tokens, mask), batch_sharding(mesh))
        results.append(loss_and_gradient(*nnx.split(model), *placed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_no_program_gathers_the_global_batch(tiny):
    """A bad spec of the embedding table makes XLA gather all rows' activations on every device."""
    rows, length = 8, 5
    mesh = make_mesh((2, 2, 2))
    model = checkpoint.load(tiny("mistral"), mesh=mesh)
    placed = jax.device_put(random_batch(rows, length), batch_sharding(mesh))
    program = _forward.lower(*nnx.split(model), *placed).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", program)
    assert gathered, "the parameters are gathered"
    # Products are of rows and tokens together.
    whole = (f"{rows},{length},", f"{rows * length},")
    assert not [shape for shape in gathered if shape.startswith(whole)]


@pytest.mark.parametrize(("rows", "kernel_is_gathered"), [(64, True), (8, False)])
def test_a_product_sends_the_smaller_side(rows, kernel_is_gathered):
    """And gives what NumPy gives, either way."""
    mesh = make_mesh((1, 8, 1))
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(rows, 64)), rng.normal(size=(64, 128))
    placed = (
        jax.device_put(x.astype(np.float32), batch_sharding(mesh)),
        jax.device_put(kernel.astype(np.float32), NamedSharding(mesh, P("fsdp"))),
    )
    program = jax.jit(product).lower(*placed).compile()
    np.testing.assert_allclose(program(*placed), x @ kernel, rtol=1e-4, atol=1e-4)
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", program.as_text())
    assert ("64,128" in gathered) == kernel_is_gathered, gathered


def test_a_product_of_few_rows_never_gathers_its_kernel():
    """Nor for the sake of a sum with rows that are split, as in every block of a decode step."""
    mesh = make_mesh((1, 8, 1))
    rng = np.random.default_rng(0)
    x, kernel, stream = (rng.normal(size=size) for size in ((8, 64), (64, 128), (8, 128)))
    placed = (
        jax.device_put(x.astype(np.float32), batch_sharding(mesh)),
        jax.device_put(kernel.astype(np.float32), NamedSharding(mesh, P(None, "fsdp"))),
        jax.device_put(stream.astype(np.float32), batch_sharding(mesh)),
    )
    program = jax.jit(lambda x, k, y: y + product(x, k), out_shardings=batch_sharding(mesh))
    program = program.lower(*placed).compile()
    np.testing.assert_allclose(program(*placed), stream + x @ kernel, rtol=1e-4, atol=1e-4)
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", program.as_text())
    assert "64,128" not in gathered, gathered


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_logits_are_split_by_words_and_never_sent(shape, dtype):
    mesh = make_mesh(shape)
    rng = np.random.default_rng(0)
    rows, words = 16, 512
    x, head = (jnp.asarray(rng.normal(size=size), dtype) for size in ((rows, 64), (64, words)))

    def loss(x, head):
        logits = vocabulary_product(x, head)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[:, 3])

    expected = jax.value_and_grad(loss, argnums=(0, 1))(x, head)
    placed = (
        jax.device_put(x, batch_sharding(mesh)),
        jax.device_put(head, NamedSharding(mesh, parameter_spec(("head",), head.shape, mesh))),
    )
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*placed).compile()
    rounding = 1e-5 if dtype == jnp.float32 else 1e-2  # of values below one
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(*map(np.float32, (a, b)), atol=rounding),
        program(*placed),
        expected,
    )
    text = program.as_text()
    sent = re.findall(r"= \(?(?:b?f\d+)\[([\d,]*)\]\S* all-(?:gather|reduce)", text)
    assert sent
    assert not [size for size in sent if size.endswith(f",{words}") or size.startswith("64,")], sent


def head_loss(multiply, x, head):
    """Cross-entropy of some targets, with logits as `multiply` makes them."""
    logits = multiply(x, head)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])


def plain_product(x, head):
    return jnp.matmul(x, head, preferred_element_type=jnp.float32)


def random_head(dtype, shape=(2, 16, 64), words=256):
    rng = np.random.default_rng(1)
    sizes = (shape, (shape[-1], words))
    return tuple(jnp.asarray(0.3 * rng.normal(size=size), dtype) for size in sizes)


def test_gradients_of_a_float32_head_are_those_of_jax_bit_by_bit():
    x, head = random_head(jnp.float32)
    for multiply in (plain_product, vocabulary_product):
        assert multiply(x, head).dtype == jnp.float32
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(head_loss, multiply), argnums=(0, 1)))(x, head)
        for multiply in (vocabulary_product, plain_product)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("words", [64, 256, 4096])  # `product` and the head's own
def test_gradients_of_a_bfloat16_head_are_the_float32_ones_up_to_rounding(words):
    x, head = random_head(jnp.bfloat16, words=words)
    wide = x.astype(jnp.float32), head.astype(jnp.float32)
    loss, found = jax.value_and_grad(functools.partial(head_loss, vocabulary_product), (0, 1))(
        x, head
    )
    expected_loss, expected = jax.value_and_grad(
        functools.partial(head_loss, plain_product), argnums=(0, 1)
    )(*wide)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        # Half a unit in the last place (2⁻⁹) of the slopes, and again of the result.
        error = np.abs(np.float32(ours) - exact)
        assert np.all(error <= 2**-8 * np.abs(exact) + 2**-9 * np.max(np.abs(exact)))


def test_products_of_a_bfloat16_head_have_bfloat16_factors_forwards_and_backwards():
    def factors(multiply) -> set[str]:
        gradient = jax.grad(functools.partial(head_loss, multiply), argnums=(0, 1))
        text = jax.jit(gradient).lower(*random_head(jnp.bfloat16)).as_text()
        products = re.findall(r"dot_general.*: \((.*)\) -> tensor<([^>]*)>", text)
        assert len(products) == 3, "logits, and the gradients of both factors"
        assert all(result.endswith("xf32") for _, result in products), "sums are in float32"
        return set(re.findall(r"x(b?f\d+)>", " ".join(both for both, _ in products)))

    assert factors(vocabulary_product) == {"bf16"}
    assert "f32" in factors(plain_product), "as JAX would have it"


@pytest.mark.parametrize(
    ("backend", "dtype", "own", "precision"),
    [
        ("gpu", "float32", None, "HIGHEST"),
        ("gpu", "float32", "tensorfloat32", "HIGH"),
        ("gpu", "bfloat16", None, None),
        ("cpu", "float32", None, None),
    ],
)
def test_products_of_a_float32_model_are_exact(tiny, monkeypatch, backend, dtype, own, precision):
    """Forwards and backwards, with adapters; GPUs and TPUs would round their factors."""
    base = checkpoint.load(tiny("qwen2"), dtype=dtype)
    graph, state = nnx.split(lora.attach(base, lora.LoRAConfig(rank=2), jax.random.key(0)))
    tokens, mask = random_batch()

    def loss(state):
        model = nnx.merge(graph, state)
        run = model.run_blocks(model.embed[...][tokens], mask, 0, 1)
        return jnp.sum(model.logits(model(tokens, mask).hidden)) + jnp.sum(run).astype(jnp.float32)

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.default_matmul_precision(own):
        text = str(jax.make_jaxpr(jax.value_and_grad(loss))(state))
    found = re.findall(r" precision=\(Precision\.(\w+), Precision\.(\w+)\)", text)
    products = text.count("dot_general[")
    assert products > 40
    assert found == [(precision, precision)] * (products if precision else 0)


def test_meshes(monkeypatch):
    assert make_mesh((2, -1, 2)).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh().size == 1
    with monkeypatch.context() as several:  # which have to share every mesh
        several.setattr(jax, "process_count", lambda: 2)
        assert make_mesh().shape == {"data": 1, "fsdp": 8, "tensor": 1}
    assert batch_multiple(make_mesh((2, 2, 2))) == 4
    assert [batch_rows(rows, make_mesh((2, 2, 2))) for rows in (0, 1, 4, 5)] == [4, 4, 4, 8]
    assert batch_rows(7, make_mesh()) == 7
    with pytest.raises(UserError, match="needs 16 devices and there are 8"):
        make_mesh((4, 2, 2))
    for wrong in ((2, 2), (0, 1, 1), (-1, -1, 1), (-2, 1, 1)):
        with pytest.raises(UserError, match="expected three positive sizes"):
            make_mesh(wrong)
