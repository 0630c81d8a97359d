"""Parameters that a device puts together itself are what the host would make, bit by bit."""

import shutil
import tracemalloc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import Q, write_gguf
from safetensors.numpy import load_file, save_file
from tiny_models import write_random

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, gguf_folder, streaming
from ema_jax.models.parts import DevicePart, HostPart, Parameter, _write
from ema_jax.models.safetensors_files import StoredTensor
from ema_jax.models.sharding import make_mesh
from ema_jax.organism import CHECKPOINTS


def on_device(folder, model, device_block):
    """A model's parameters as an accelerator would load them."""
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf[...].sharding)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    return checkpoint._read_hf(folder, checkpoint.check(folder), targets, device_block)


def assert_same(arrays, model):
    parameters = dict(nnx.to_flat_state(nnx.state(model)))
    assert arrays.keys() == parameters.keys()
    for path, leaf in parameters.items():
        ours, theirs = arrays[path], leaf[...]
        assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)
        np.testing.assert_array_equal(bits(ours), bits(theirs), err_msg=str(path))


def bits(array):
    values = np.asarray(array)
    return values.view(f"u{values.dtype.itemsize}")


@pytest.mark.parametrize(
    ("family", "dtype", "shape"),
    [
        ("qwen2", "bfloat16", (1, 1, 1)),
        ("mistral", "float32", (1, 1, 1)),
        ("qwen2", "float32", (2, 1, 2)),
        pytest.param("qwen2", "bfloat16", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("mistral", "bfloat16", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("mistral", "float32", (1, 1, 8), marks=pytest.mark.slow),
    ],
)
def test_embedded_models(monkeypatch, family, dtype, shape):
    """Every byte is read once, also where devices hold the same part or parts of its columns."""
    folder, sizes, read = CHECKPOINTS / family, [], StoredTensor.read

    def counted(self, *where):
        block = read(self, *where)
        sizes.append(block.nbytes)
        return block

    model = checkpoint.load(folder, mesh=make_mesh(shape), dtype=dtype)
    tensors = checkpoint._stored_weights(folder).tensors().values()
    monkeypatch.setattr(StoredTensor, "read", counted)
    assert_same(on_device(folder, model, 20_000), model)
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors)


def test_gguf(tiny, tmp_path, monkeypatch):
    """Dequantised in blocks, with the rows of a head in another order."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = gguf_folder.folder_of(write_gguf(tmp_path / "x.gguf", tiny("llama"), Q.Q8_0))
    model = checkpoint.load(folder, dtype="bfloat16")
    assert_same(on_device(folder, model, 2000), model)


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (np.float32, jnp.bfloat16),
        (np.float32, np.float16),
        (np.float16, jnp.bfloat16),
        (jnp.bfloat16, np.float32),
        (np.float64, jnp.bfloat16),
    ],
)
def test_casts(stored, held):
    """Of numbers of every size, the smallest ones too; JAX alone would round float64 twice."""
    stored, held = np.dtype(stored), np.dtype(held)
    drawn = np.random.default_rng(0).bytes(stored.itemsize * 64 * 48)
    block = np.frombuffer(drawn, stored).reshape(64, 48)
    most = min(float(jnp.finfo(held).max), float(jnp.finfo(stored).max)) / 2
    with np.errstate(invalid="ignore"):
        fits = np.abs(block.astype(np.float64)) <= most
    block = np.where(fits, block, np.ones((), stored))
    block[0, 0] = np.float64(1 + 2**-8 + 2**-40).astype(stored)
    target = jax.ShapeDtypeStruct((2, 48, 64), held)
    parameter, made = Parameter((), target, True, True), []
    for kind in (HostPart, DevicePart):
        part = kind(parameter, tuple(map(range, target.shape)), jax.devices()[:1])
        for layer in range(2):
            part.place(block[:30], (range(30), range(48)), layer)
            part.place(block[30:], (range(30, 64), range(48)), layer)
        made.append(part.arrays()[0])
    np.testing.assert_array_equal(*map(bits, made))
    assert made[0].dtype == held


def test_damage_is_found(tiny, tmp_path):
    """As on the host, whichever thread meets it."""
    model, name = checkpoint.load(tiny("qwen2")), "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(tiny("qwen2"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].copy()
    tensors[name][-1, -1] = np.inf
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"{name} holds NaN or infinity"):
        on_device(tmp_path / "m", model, 2000)


def test_the_host_holds_only_blocks(tmp_path, monkeypatch):
    """No parameter, and no tensor of one: the second load, as the first one compiles."""
    block_bytes = 1 << 18
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(streaming, "WORKERS", 3)
    sizes = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 2048}
    write_random(tmp_path, num_hidden_layers=2, **sizes)
    model = checkpoint.load(tmp_path, dtype="float32")
    # Blocks of this size are copied by another thread, after the call that sends them.
    assert_same(on_device(tmp_path, model, block_bytes), model)
    tracemalloc.start()
    on_device(tmp_path, model, block_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 512 * 2048 * 2  # a stored tensor; the blocks are 3 / 8 of that


def test_a_device_needs_a_block_more_than_the_part():
    """It is filled in place, on CPUs where no bfloat16 has to be widened for it."""
    part, block = jnp.zeros((4, 256, 512)), jnp.zeros((64, 256))
    lowered = _write.lower(part, block, jnp.zeros(3, jnp.int32), transpose=True)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == part.nbytes
    assert memory.temp_size_in_bytes <= block.nbytes


@pytest.mark.parametrize(
    ("platform", "rows", "kind"),
    [("cpu", 4096, HostPart), ("gpu", 4096, DevicePart), ("gpu", 16, HostPart)],
)
def test_what_a_platform_does_by_itself(platform, rows, kind):
    device, shape = type("Device", (), {"platform": platform})(), (4, 512, rows)
    sharding = SimpleNamespace(
        device_set={device},
        addressable_devices_indices_map=lambda shape: {device: (slice(None),) * len(shape)},
    )
    target = SimpleNamespace(shape=shape, dtype=np.dtype(np.float32), sharding=sharding)
    (part,), block_bytes = streaming._parts(Parameter((), target, True, True), None)
    assert type(part) is kind
    assert (part.layers, part.box) == (range(4), (range(rows), range(512)))
    assert block_bytes == (8 << 20 if kind is DevicePart else 4 << 20)


@pytest.mark.parametrize(
    ("length", "most", "sizes"),
    [
        (14336, 1024, [1024] * 14),
        (18944, 1170, [592] * 32),
        (4096, 292, [256] * 16),
        (7, 3, [3, 3, 1]),
        (5, 9, [5]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_blocks_of_one_size(length, most, sizes):
    found = list(streaming._equal(range(10, 10 + length), most))
    assert [len(rows) for rows in found] == sizes
    assert [i for rows in found for i in rows] == list(range(10, 10 + length))
