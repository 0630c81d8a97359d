"""The TPU's attention kernel, run as XLA's operations on CPUs, against JAX's attention."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ema_jax.compile_check.workload import architecture
from ema_jax.config import ModelConfig
from ema_jax.models import attention, checkpoint, splash
from ema_jax.models.attention import attend, causal_mask, positions_within
from ema_jax.models.sharding import AXES, BATCH, make_mesh

ROWS, HEADS, GROUPS, WIDTH = 4, 4, 2, 16
interpreted = functools.partial(splash.splash_attention, kept="kept", interpret=True)


def segments_of(length: int) -> np.ndarray:
    """A full row, one with padding, one of a single example, and an empty one."""
    rows = [
        [1] * 50 + [2] * 90 + [3] * (length - 140),
        [1] * 100 + [2] * 30 + [0] * (length - 130),
        [1] * 130 + [0] * (length - 130),
        [0] * length,
    ]
    return np.array(rows, np.int32)


def visible(segments: np.ndarray, packed: bool) -> jax.Array:
    positions = positions_within(jnp.asarray(segments))
    keys = jnp.where(segments > 0, positions, -1)
    return causal_mask(positions, keys, None, jnp.asarray(segments) if packed else None)


def outputs_and_slopes(attention_of, arrays, weights):
    """What attention gives, and gradients of a weighted sum of it."""

    def loss(query, key, value):
        mixed = attention_of(query, key, value)
        return jnp.sum(mixed * weights), mixed

    (_, mixed), slopes = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(x) for x in (mixed, *slopes)]


@pytest.mark.parametrize(
    ("length", "block", "packed", "mesh"),
    [
        (200, 512, True, None),  # one block, of 256
        (200, 128, True, (2, 2, 2)),  # several, and gradients in two passes
        pytest.param(200, 512, False, None, marks=pytest.mark.slow),
        pytest.param(200, 128, False, (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_the_same_numbers_as_jax_attention(length, block, packed, mesh, monkeypatch):
    monkeypatch.setattr(splash, "_BLOCK", block)
    rng = np.random.default_rng(0)
    shapes = [(ROWS, length, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    if not packed:  # one example in each row
        segments = np.array([[1] * n + [0] * (length - n) for n in (200, 130, 1, 199)], np.int32)
    else:
        segments = segments_of(length)
    # Packed rows of one example are read at padding too.
    read = segments > 0
    read[2] |= packed
    weights = rng.normal(size=shapes[0]).astype(np.float32) * read[:, :, None, None]
    mask = visible(segments, packed)
    jaxs = functools.partial(jax.nn.dot_product_attention, mask=mask)
    expected = outputs_and_slopes(jaxs, arrays, weights)
    ids = jnp.asarray(segments) if packed else None
    if mesh is not None:
        on = NamedSharding(make_mesh(mesh), P(*BATCH, None, "tensor"))
        arrays = [jax.device_put(x, on) for x in arrays]
    found = outputs_and_slopes(lambda *x: interpreted(*x, segments=ids), arrays, weights)
    np.testing.assert_allclose(found[0][read], expected[0][read], atol=1e-5)
    for ours, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5)
    assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, (128, 128)), (200, (256, 256)), (512, (512, 512)), (528, (384, 768)), (4096, (512, 4096))],
)
def test_rows_are_whole_blocks(length, expected):
    assert splash._blocks(length) == expected


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "length", "taken"),
    [
        ("tpu", jnp.bfloat16, 128, 1024, True),
        ("tpu", jnp.bfloat16, 128, 1008, False),
        ("tpu", jnp.float32, 128, 4096, False),
        ("tpu", jnp.bfloat16, 64, 4096, False),
        ("gpu", jnp.bfloat16, 128, 4096, False),
        ("cpu", jnp.bfloat16, 128, 4096, False),
    ],
)
def test_where_it_is_taken(platform, dtype, head_dim, length, taken):
    assert splash.faster_by_splash(platform, jnp.dtype(dtype), head_dim, length) == taken


def of_sixteen(platform: str) -> NamedSharding:
    """Rows over sixteen devices that are not there."""
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform=platform)
    mesh = AbstractMesh((1, 16, 1), AXES, (AxisType.Auto,) * 3, abstract_device=device)
    return NamedSharding(mesh, P(*BATCH))


@pytest.mark.parametrize(
    ("kind", "rows", "taken"),
    [
        ({"causal": True}, 32, True),
        ({"packed": True, "segments": True}, 32, True),
        ({"packed": True}, 32, False),  # rows that continue others
        ({}, 32, False),
        ({"causal": True}, 8, False),  # which sixteen devices cannot share
    ],
)
def test_a_slice_is_known_by_the_mesh(kind, rows, taken, monkeypatch):
    """On a machine without a TPU, as the check by compilation has it."""
    asked = []
    monkeypatch.setattr(
        attention, "splash_attention", lambda q, k, v, ids, kept: asked.append(ids) or q
    )
    on = of_sixteen("tpu")
    x = jax.ShapeDtypeStruct((rows, 1024, 4, 128), jnp.bfloat16, sharding=on)
    mask = jax.ShapeDtypeStruct((rows, 1, 1024, 1024), jnp.bool, sharding=on)
    ids = jax.ShapeDtypeStruct((rows, 1024), jnp.int32, sharding=on)

    def mixed(x, mask, ids):
        own = {name: ids if name == "segments" else value for name, value in kind.items()}
        return attend(x, x, x, mask, **own)

    jax.eval_shape(mixed, x, mask, ids)
    assert bool(asked) == taken


@pytest.mark.parametrize(("platform", "taken"), [("tpu", "xla"), ("gpu", "blocks")])
def test_short_rows_are_left_to_xla_on_a_tpu_alone(platform, taken, monkeypatch):
    asked = []

    def jaxs(query, key, value, *, mask, implementation):
        asked.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", jaxs)
    monkeypatch.setattr(attention, "blocked_attention", lambda q, *_: asked.append("blocks") or q)
    on = of_sixteen(platform)
    x = jax.ShapeDtypeStruct((32, 256, 4, 128), jnp.bfloat16, sharding=on)
    mask = jax.ShapeDtypeStruct((32, 1, 256, 256), jnp.bool, sharding=on)
    jaxpr = jax.make_jaxpr(lambda x, mask: attend(x, x, x, mask, packed=True))(x, mask)
    assert asked == [taken]
    names = [e.params["name"] for e in jaxpr.eqns if e.primitive.name == "name"]
    assert names == [attention.KEPT] * (taken == "xla")  # the blocks name their own


def kernels(jaxpr) -> Iterator[str]:
    """Names of the kernels whose results something uses; XLA drops the others."""
    for equation in jaxpr.eqns:
        if all(str(variable) == "_" for variable in equation.outvars):
            continue
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"]
            continue
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from kernels(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(("remat", "forward"), [("projections", 1), (True, 2)])
def test_the_backward_pass_keeps_what_the_kernel_gave(remat, forward, monkeypatch):
    monkeypatch.setattr(attention, "faster_by_splash", lambda *about: True)
    config = architecture(ModelConfig(source="Qwen/Qwen2.5-7B-Instruct"))
    graph, state = nnx.split(checkpoint.abstract_decoder(config))

    def loss(state, tokens):
        out = nnx.merge(graph, state)(tokens, tokens > 0, segments=tokens, remat=remat)
        return jnp.sum(out.hidden)

    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    found = list(kernels(jax.make_jaxpr(jax.grad(loss))(state, tokens)))
    assert sum("fwd" in name for name in found) == forward
    assert sum("dkv" in name for name in found) == 1
