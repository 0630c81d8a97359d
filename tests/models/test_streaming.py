"""Loading as a stream: which bytes are read, by whom, and in how much memory."""

import os
import re
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from jax import numpy as jnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import write_random

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, streaming
from ema_jax.models.safetensors_files import StoredTensor, WeightFiles, write_weights
from ema_jax.models.sharding import make_mesh
from ema_jax.runtime.files import TensorSpec, read_tensors, write_tensors

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def stored(folder) -> dict[str, StoredTensor]:
    return WeightFiles.find(folder).tensors()


def test_any_block_equals_what_safetensors_reads(tiny):
    found = stored(tiny("qwen2_window"))
    with safe_open(tiny("qwen2_window") / "model.safetensors", framework="np") as file:
        for name, tensor in found.items():
            whole = file.get_tensor(name)
            np.testing.assert_array_equal(tensor.read(range(len(whole))), whole, err_msg=name)
            assert tensor.nbytes == whole.nbytes
        whole = file.get_tensor(Q_PROJ)
    for rows, columns in ((range(3, 7), range(5, 30)), (range(1), range(32)), (range(2, 2), None)):
        block = found[Q_PROJ].read(rows, columns)
        stop = None if columns is None else columns.stop
        start = None if columns is None else columns.start
        np.testing.assert_array_equal(block, whole[rows.start : rows.stop, start:stop])


def test_a_file_that_shrinks_after_its_check(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((tiny("llama") / "model.safetensors").read_bytes())
    last = max(stored(tmp_path).values(), key=lambda tensor: tensor.offset)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"ends inside of {re.escape(last.name)}; download it"):
        last.read(range(last.shape[0]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_every_byte_is_read_once_in_small_blocks(tiny, monkeypatch, shape):
    """Also where devices hold the same part, and where a block spans parts of several."""
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", 1000)
    sizes, read = [], StoredTensor.read

    def counted(self, *where):
        block = read(self, *where)
        sizes.append(block.nbytes)
        return block

    folder = tiny("qwen3_window")
    expected = checkpoint.load(folder)
    monkeypatch.setattr(StoredTensor, "read", counted)
    model = checkpoint.load(folder, mesh=make_mesh(shape))
    monkeypatch.setattr(StoredTensor, "read", read)
    for ours, theirs in zip(checkpoint.hf_tensors(model), checkpoint.hf_tensors(expected)):  # noqa: B905
        np.testing.assert_array_equal(ours, theirs)
    assert sum(sizes) == sum(tensor.nbytes for tensor in stored(folder).values())
    assert max(sizes) <= 1000


def test_the_end_of_a_load_is_logged(tiny, caplog):
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        checkpoint.load(tiny("llama"))
    size = sum(tensor.nbytes for tensor in stored(tiny("llama")).values()) / 1e9
    assert f"{size:.3f} GB of {size:.3f} GB read in" in caplog.text
    assert re.search(r"\(\d+\.\d\d GB/s\), peak memory \d+\.\d\d GB", caplog.text)


WORKER = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from ema_jax.runtime import distributed
distributed.initialise(heartbeat_seconds=30)
import numpy as np
from flax import nnx
from ema_jax.models import checkpoint, lora, safetensors_files, sharding
read, sizes = safetensors_files.StoredTensor.read, []
def counted(self, *where):
    block = read(self, *where)
    sizes.append(block.nbytes)
    return block
safetensors_files.StoredTensor.read = counted
options = {"dtype": "bfloat16"}  # as stored: bytes in memory are bytes in the file
source, out = Path(sys.argv[1]), Path(sys.argv[2])
mesh = sharding.make_mesh((1, 2, 2))
model = checkpoint.load(source, mesh=mesh, **options)
mine = jax.sharding.Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1), sharding.AXES)
needed, got = 0, sum(sizes)
alone = checkpoint.load(source, mesh=mine, **options)
whole = dict(nnx.to_flat_state(nnx.state(alone)))
for path, leaf in nnx.to_flat_state(nnx.state(model)):
    distinct = {}
    for shard in leaf[...].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[path][...][shard.index])
        distinct[str(shard.index)] = shard.data.nbytes
    needed += sum(distinct.values())
print("BYTES", got, needed, sum(leaf[...].nbytes for leaf in whole.values()))
sizes.clear()
targets = {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf[...].sharding)
    for path, leaf in nnx.to_flat_state(nnx.state(model))
}
arrays = checkpoint._read_hf(source, checkpoint.check(source), targets, 5000)
assert sum(sizes) == got, "put together by devices"
for path, leaf in nnx.to_flat_state(nnx.state(model)):
    for mine, theirs in zip(arrays[path].addressable_shards, leaf[...].addressable_shards):
        np.testing.assert_array_equal(mine.data, theirs.data)
checkpoint.export(model, out / "hf")
assert (out / "hf" / "config.json").exists(), "nobody goes on before it is there"
try:
    checkpoint.export(model, out / "hf")
except Exception as error:
    print("REFUSED", error)
config = lora.LoRAConfig(rank=2)
adapted = nnx.state(lora.attach(alone, config, jax.random.key(0)), lora.LoRAParam)
shardings = sharding.parameter_shardings(adapted, mesh)
model = lora.attach(model, config, jax.random.key(0))
placed = jax.tree.map(lambda x, on: jax.device_put(np.asarray(x), on), adapted, shardings)
nnx.update(model, placed)
assert not model.blocks.q_proj.lora_a[...].is_fully_addressable
lora.save_peft(model, out / "adapter", config, "base")
again = lora.load_peft(alone, out / "adapter")
jax.tree.map(np.testing.assert_array_equal, nnx.state(again, lora.LoRAParam), adapted)
"""


def test_two_processes_read_what_their_devices_need_and_write_one_checkpoint(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_random(source, vocab_size=96, hidden_size=32, intermediate_size=48)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"EMA_JAX_COORDINATOR": address, "EMA_JAX_NUM_PROCESSES": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(source), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment | {"EMA_JAX_PROCESS_ID": str(i)},
        )
        for i in range(2)
    ]
    for worker in workers:
        said, error = worker.communicate(timeout=120)
        assert worker.returncode == 0, error
        got, needed, whole = map(int, re.search(r"BYTES (\d+) (\d+) (\d+)", said).groups())
        assert got == needed
        assert needed < 0.55 * whole, "all but the norms is split"
        assert re.search(r"REFUSED .*hf: already exists", said)
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "hf"]
    theirs = load_file(out / "hf" / "model.safetensors")
    for name, tensor in stored(source).items():
        values = tensor.read(range(tensor.shape[0]))
        assert theirs[name].dtype == values.dtype
        np.testing.assert_array_equal(theirs[name], values, err_msg=name)
    assert theirs.keys() == stored(source).keys()


MEASURE = """
import sys
import tracemalloc
import jax
from ema_jax.models import checkpoint
from ema_jax.models import streaming
streaming.WORKERS = 3  # each holds a block and a few tiles: the same on every machine
checkpoint.load(sys.argv[1])  # what JAX itself takes once
before = streaming.peak_bytes()
model = checkpoint.load(sys.argv[2], dtype="bfloat16")
print("PEAK", streaming.peak_bytes() - before, model.blocks.up_proj.kernel[...].dtype)
"""


def test_peak_memory_is_the_parameters_and_little_more(tiny, tmp_path):
    """One stacked matrix alone would be 128 MiB more, and a mapped file 141 MiB.

    A load takes 30 to 55 MiB: blocks, tiles, and what the allocator keeps of them.
    """
    parameters = write_random(tmp_path, vocab_size=32, hidden_size=1024, intermediate_size=8192)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny("llama")), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    peak, dtype = done.stdout.split("PEAK")[1].split()
    assert dtype == "bfloat16"
    assert parameters < int(peak) + 4 * 2**20
    assert int(peak) < parameters + 100 * 2**20


def test_the_writer_is_what_safetensors_would_write(tmp_path):
    values = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.weight": np.ones(5, jnp.bfloat16),
        "c": np.zeros((0, 2), np.float16),
    }
    shapes = [TensorSpec(name, value.shape, value.dtype) for name, value in values.items()]
    write_weights(tmp_path, shapes, values.values(), 10**9)
    save_file(values, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    read = []
    for name in ("model.safetensors", "theirs.safetensors"):
        with safe_open(tmp_path / name, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            read.append({key: file.get_tensor(key) for key in sorted(file.keys())})
    assert read[0].keys() == read[1].keys()
    for key, value in read[0].items():
        assert value.dtype == read[1][key].dtype
        np.testing.assert_array_equal(value, read[1][key])


def test_a_file_of_tensors_is_written_one_at_a_time(tmp_path):
    """Any dtype and order; equal contents give equal bytes; nothing is copied whole."""
    values = {
        "half": np.ones((2, 3), np.float16),
        "counts": np.arange(4).reshape(2, 2).T,
        "flags": np.array([True, False]),
        "scalar": np.float32(2.5).reshape(()),
    }
    write_tensors(tmp_path / "first", values, {"b": "2", "a": "1"})
    write_tensors(tmp_path / "again", dict(reversed(values.items())), {"a": "1", "b": "2"})
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    read, metadata = read_tensors(tmp_path / "first")
    assert metadata == {"a": "1", "b": "2"}
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)
    large = np.zeros((64, 1 << 20), np.uint8)
    tracemalloc.start()
    write_tensors(tmp_path / "large", {"large": large, "small": large[:1]}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < large.nbytes / 8
