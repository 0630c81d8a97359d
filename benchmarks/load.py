"""Loading a 7B checkpoint, compared with a plain read of its files: `python benchmarks/load.py`.

Writes a random bfloat16 checkpoint of Mistral-7B-v0.3's shape (14.5 GB, three files), reads the
files plainly, loads them, and prints seconds, GB/s and peak memory. Before the read and before the
load the files are dropped from the page cache (Linux). On an accelerator it also times a forward
pass. The checkpoint is removed at the end unless `--keep`; a later run with the same `--folder`
reuses it.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from safetensors import safe_open

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, streaming
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder
from ema_jax.models.safetensors_files import WeightFiles, write_weights
from ema_jax.runtime import cli
from ema_jax.runtime.files import TensorSpec, write_json

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32768,
}
GB, GIB = 1e9, float(1 << 30)
BUFFER = 16 << 20
SHARD_BYTES = 5 * 10**9


def write(folder: Path, layers: int) -> None:
    """Writes the checkpoint unless it exists; its values repeat a block of normal draws."""
    folder.mkdir(parents=True, exist_ok=True)
    config = MISTRAL_7B | {"num_hidden_layers": layers}
    write_json(folder / "config.json", config)
    try:
        checkpoint.check(folder)
        return
    except UserError:
        for path in folder.glob("model*"):
            path.unlink()
    model = checkpoint.abstract_decoder(DecoderConfig.from_hf(config))
    shapes = checkpoint.hf_shapes(model, jnp.bfloat16)
    size = sum(tensor.nbytes for tensor in shapes)
    if shutil.disk_usage(folder).free < 1.2 * size:
        sys.exit(f"error: {folder}: {size / GB:.1f} GB are needed; name another --folder")
    write_weights(folder, shapes, _random(shapes), SHARD_BYTES)
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _random(shapes: Sequence[TensorSpec]) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    block = (0.02 * generator.standard_normal((1 << 22) + 1, np.float32)).astype(jnp.bfloat16)
    for tensor in shapes:
        # The block has an odd length, so that no two rows are the same.
        yield np.resize(block, tensor.shape)


def drop_caches(files: Sequence[Path]) -> None:
    """Drops files from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(files: Sequence[Path]) -> float:
    """Seconds to read files from beginning to end into one buffer."""
    buffer, start = bytearray(BUFFER), time.monotonic()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - start


def host_read(folder: Path) -> None:
    """Reads and checks all weights as a load for an accelerator does, and sends nothing."""
    dtype, block_bytes = np.dtype(jnp.bfloat16), streaming.DEVICE_BLOCK_BYTES
    with ThreadPoolExecutor(streaming.WORKERS) as pool:
        reads = [
            pool.submit(streaming.read_block, tensor, block, dtype)
            for tensor in WeightFiles.find(folder).tensors().values()
            for block in streaming.blocks(
                [tuple(map(range, tensor.shape))], tensor.dtype.itemsize, block_bytes
            )
        ]
        for read in reads:
            read.result()


def send(array: np.ndarray, count: int) -> None:
    """Sends an array to the device so many times, from as many threads as a load has."""
    device = jax.devices()[0]
    with ThreadPoolExecutor(streaming.WORKERS) as pool:
        for _ in pool.map(
            lambda _: jax.block_until_ready(jax.device_put(array, device)), range(count)
        ):
            pass


def spot_check(model: Decoder, folder: Path) -> None:
    """Compares one row of a matrix of the middle layer with what safetensors itself reads."""
    layer = model.config.num_layers // 2
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    with safe_open(WeightFiles.find(folder).file_of[name], framework="np") as file:
        expected = file.get_slice(name)[1234:1235][0]
    np.testing.assert_array_equal(model.blocks.down_proj.kernel[layer, :, 1234], expected)


def time_forward(model: Decoder, batch: int, length: int) -> float:
    """Seconds of a compiled forward pass to the last position's logits."""

    @jax.jit
    def forward(state: nnx.State, tokens: jax.Array) -> jax.Array:
        decoder = nnx.merge(graph, state)
        hidden = decoder(tokens, jnp.ones(tokens.shape, bool)).hidden
        return decoder.logits(hidden[:, -1])

    graph, state = nnx.split(model)
    tokens = jnp.ones((batch, length), jnp.int32)
    jax.block_until_ready(forward(state, tokens))
    start = time.monotonic()
    jax.block_until_ready(forward(state, tokens))
    return time.monotonic() - start


def main() -> None:
    """Writes the checkpoint, reads it, loads it and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to; by default a temporary one")
    parser.add_argument("--keep", action="store_true", help="do not remove it at the end")
    parser.add_argument("--layers", type=int, default=32, help="fewer make it smaller")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    cli.log_to_stderr()
    logging.set_verbosity(logging.INFO)
    parent = options.folder or Path(tempfile.mkdtemp())
    folder = parent / f"random-mistral-{options.layers}-layers"
    try:
        write(folder, options.layers)
        for _ in range(options.repeat):
            measure(folder)
    finally:
        if not options.keep:
            shutil.rmtree(folder if options.folder else parent)


def measure(folder: Path) -> None:
    """Prints one plain read and one load, both from a cold page cache."""
    files = WeightFiles.find(folder).files
    size = sum(path.stat().st_size for path in files)
    drop_caches(files)
    plain = plain_read(files)
    drop_caches(files)
    before, start = streaming.peak_bytes(), time.monotonic()
    busy = time.process_time()
    model = checkpoint.load(folder, dtype="bfloat16")
    jax.block_until_ready(nnx.state(model))
    seconds, busy = time.monotonic() - start, time.process_time() - busy
    peak = streaming.peak_bytes()
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    spot_check(model, folder)
    print(f"files       {size / GB:.2f} GB in {len(files)}; parameters {parameters / GIB:.2f} GiB")
    print(f"plain read  {plain:.1f} s, {size / GB / plain:.2f} GB/s")
    print(
        f"load        {seconds:.1f} s, {size / GB / seconds:.2f} GB/s, {seconds / plain:.2f} times "
        f"the plain read; {busy:.1f} s of processor time"
    )
    print(
        f"peak        {peak / GIB:.2f} GiB resident ({before / GIB:.2f} before the load), "
        f"{(peak - parameters) / GIB:.2f} GiB beyond the parameters"
    )
    if jax.default_backend() != "cpu":
        forward = time_forward(model, 8, 512)
        print(f"forward     8 x 512 tokens in {forward:.3f} s on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
