"""What is kept and how much runs at once, by the memory of devices that are not there."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ema_jax.compile_check.workload import architecture
from ema_jax.config import ModelConfig
from ema_jax.models.attention import attend, compute_capability, faster_by_cudnn
from ema_jax.models.cache import rows_that_fit
from ema_jax.models.sharding import make_mesh
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.remat import choose_remat, saved_values

QWEN = architecture(ModelConfig(source="Qwen/Qwen2.5-7B-Instruct"))
H100, A100, CPU = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "cpu"


def mesh(kind: str, fsdp: int = 1):
    device = types.SimpleNamespace(device_kind=kind, platform="cpu" if kind == CPU else "gpu")
    shape = {"data": 1, "fsdp": fsdp, "tensor": 1}
    return types.SimpleNamespace(devices=np.array([device] * fsdp), shape=shape, size=fsdp)


@pytest.mark.parametrize(
    ("kind", "fsdp", "tokens", "trainable", "name"),
    [
        (H100, 1, 12_288, "lora", "projections"),
        (H100, 1, 24_576, "lora", "full"),
        (H100, 2, 24_576, "lora", "projections"),
        (A100, 1, 12_288, "lora", "full"),
        (A100, 1, 2_048, "lora", "projections"),
        (H100, 1, 1_024, "full", "full"),  # 15 GB of weights with optimizer state do not fit at all
    ],
)
def test_projections_are_kept_where_the_memory_has_room(kind, fsdp, tokens, trainable, name):
    arm = UnlearnConfig(trainable=trainable)
    found = choose_remat(QWEN, arm, tokens, 2, mesh(kind, fsdp))
    assert found.name == name
    assert found.why.startswith(f"remat: {name}, by an estimate: ")
    assert "\n" not in found.why


def test_a_choice_of_ones_own_is_kept():
    found = choose_remat(QWEN, UnlearnConfig(remat="none"), 1 << 20, 2, mesh(A100))
    assert found == ("none", "remat: none, as unlearn.remat says")


def test_the_estimate_is_that_of_the_compiler():
    """Bytes per token and layer in bfloat16, and GiB of 8,192 tokens, as XLA gave them."""
    assert 2 * saved_values(QWEN, "none") == pytest.approx(355e3, rel=0.02)
    kept = 2 * saved_values(QWEN, "projections") * QWEN.num_layers * 8192 / 2**30
    assert kept == pytest.approx(23, rel=0.06)
    mistral = architecture(ModelConfig(source="mistralai/Mistral-7B-Instruct-v0.3"))
    assert 2 * saved_values(mistral, "none") == pytest.approx(320e3, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "least", "most"), [(H100, 256, 256), (A100, 96, 240), (CPU, 64, 64)]
)
def test_rows_that_decode_at_once(kind, least, most):
    rows = rows_that_fit(QWEN, 256, jnp.bfloat16, mesh(kind))
    assert least <= rows <= most
    assert rows_that_fit(QWEN, 1 << 20, jnp.bfloat16, mesh(A100)) == 16


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "length", "causal", "masked"),
    [
        ((9, 0), jnp.bfloat16, 128, 256, True, True),
        ((10, 0), jnp.bfloat16, 128, 256, True, True),
        ((8, 0), jnp.float16, 128, 256, True, False),  # an A100, where no mask was tried
        ((7, 5), jnp.bfloat16, 128, 256, False, False),  # a T4, for which cuDNN has none
        ((9, 0), jnp.bfloat16, 128, 128, False, False),
        ((9, 0), jnp.float32, 128, 256, False, False),
        ((9, 0), jnp.bfloat16, 100, 256, False, False),
        ((9, 0), jnp.bfloat16, 256, 256, False, False),
        ((0, 0), jnp.bfloat16, 128, 4096, False, False),  # a CPU, a TPU, an AMD GPU
    ],
)
def test_attention_is_cudnns_where_it_was_faster(
    capability, dtype, head_dim, length, causal, masked
):
    about = (capability, jnp.dtype(dtype), head_dim, length)
    assert faster_by_cudnn(*about) == causal
    assert faster_by_cudnn(*about, masked=True) == masked


@pytest.mark.parametrize(
    ("named", "found"),
    [("9.0", (9, 0)), ("12.0", (12, 0)), ("gfx942", (0, 0)), (None, (0, 0))],
)
def test_only_nvidias_cards_have_a_compute_capability(named, found, monkeypatch):
    about = {} if named is None else {"compute_capability": named}
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(**about)])
    assert compute_capability() == found


@pytest.mark.parametrize(
    ("kind", "card", "devices", "asked"),
    [
        ({"causal": True}, "9.0", 1, ("cudnn", "is_causal")),
        ({"causal": True}, "9.0", 8, ("ours", "mask")),
        ({"causal": True}, "7.5", 1, ("ours", "mask")),
        ({"packed": True}, "9.0", 1, ("cudnn", "mask")),
        ({"packed": True}, "9.0", 8, ("ours", "mask")),
        ({"packed": True}, "8.0", 1, ("ours", "mask")),
        ({}, "9.0", 1, ("ours", "mask")),
    ],
)
def test_what_attention_asks_for_on_a_gpu(kind, card, devices, asked, monkeypatch):
    given = []

    def attention(query, key, value, *, implementation, **seen):
        given.append((implementation, *seen))
        return query

    on = NamedSharding(make_mesh((1, devices, 1)), P("fsdp"))
    x = jax.device_put(jnp.zeros((8, 256, 4, 128), jnp.bfloat16), on)
    mask = jnp.ones((8, 1, 256, 256), bool)
    device = types.SimpleNamespace(compute_capability=card)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    monkeypatch.setattr(
        "ema_jax.models.attention.blocked_attention",
        lambda *own: attention(*own[:3], implementation="ours", mask=own[3]),
    )
    jax.jit(lambda x: attend(x, x, x, mask, **kind)).trace(x)
    assert given == [asked]
