"""NaN, infinity and numbers beyond a dtype are found while weights are read, and named."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import Q, write_gguf
from safetensors.numpy import load_file, save_file

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, gguf_folder, lora, streaming
from ema_jax.models.safetensors_files import StoredTensor

SINGLE = "model.safetensors"
NAN = float("nan")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}


def damaged_copy(source, folder, name, value=NAN):
    shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, folder / SINGLE)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_is_not_finite_is_found(tmp_path, dtype):
    stored = StoredTensor(tmp_path / "x.safetensors", "a.weight", (8, 4), dtype, 0)
    kind = np.dtype(DTYPES[dtype])
    most = jnp.finfo(kind).max
    tiny = jnp.finfo(kind).smallest_subnormal
    fine = np.array([0.0, -0.0, 1, -1, most, -most, tiny, -tiny] * 4).astype(kind).reshape(8, 4)
    streaming._check_numbers(fine, kind, stored)
    streaming._check_numbers(fine[:0], kind, stored)
    unsigned = np.dtype(f"u{kind.itemsize}")
    quiet = np.array([NAN, -NAN, np.inf, -np.inf]).astype(kind).view(unsigned)
    infinity = int(quiet[2])
    # Signalling ones too: the smallest and the largest payload, of either sign.
    sign = 1 << (8 * kind.itemsize - 1)
    bits = [*map(int, quiet), infinity + 1, infinity + 1 + sign, sign - 1, 2 * sign - 1]
    for number in bits:
        for place in ((0, 0), (7, 3), (3, 2)):
            damaged = fine.copy()
            damaged.view(unsigned)[place] = number
            for block in (damaged, np.asfortranarray(damaged), damaged.repeat(2, 1)[:, ::2]):
                with pytest.raises(UserError, match=r"x\.safetensors: a\.weight holds NaN or inf"):
                    streaming._check_numbers(block, kind, stored)


@pytest.mark.parametrize(
    ("stored", "target", "value"),
    [
        ("F32", np.float16, 65_520.0),
        ("F32", np.float16, -1e6),
        ("BF16", np.float16, 1e5),
        ("F64", np.float32, 1e39),
        ("F64", jnp.bfloat16, -1e39),
        ("F32", jnp.bfloat16, 3.4e38),
    ],
)
def test_numbers_beyond_the_dtype_that_is_asked_for(tmp_path, stored, target, value):
    tensor = StoredTensor(tmp_path / "x", "a", (1, 2), stored, 0)
    block = np.array([[1, value]]).astype(DTYPES[stored])
    with pytest.raises(UserError, match=r"beyond the .* load it in bfloat16 or float32"):
        streaming._check_numbers(block, np.dtype(target), tensor)
    streaming._check_numbers(block / 4096, np.dtype(target), tensor)


@pytest.mark.parametrize("value", [NAN, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
    ],
)
def test_a_checkpoint_names_tensor_and_file(tiny, tmp_path, name, value):
    damaged_copy(tiny("qwen2"), tmp_path / "m", name, value)
    expected = f"{SINGLE}: {name} holds NaN or infinity"
    with pytest.raises(UserError, match=re.escape(expected)):
        checkpoint.load(tmp_path / "m")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_gguf_file_names_its_tensor(tiny, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = damaged_copy(tiny("qwen2"), tmp_path / "m", "model.layers.1.mlp.up_proj.weight")
    path = write_gguf(tmp_path / "x.gguf", source, Q[kind])
    with pytest.raises(UserError, match=r"x\.gguf: blk\.1\.ffn_up\.weight holds NaN or infinity"):
        checkpoint.load(gguf_folder.folder_of(path))


@pytest.mark.parametrize("value", [NAN, np.inf])
def test_a_flax_folder_names_its_parameter(tiny, tmp_path, value):
    model = checkpoint.load(tiny("qwen2"))
    kernel = model.blocks.down_proj.kernel[...].at[1, 0, 0].set(value)
    model.blocks.down_proj.kernel = nnx.Param(kernel)
    checkpoint.save_flax(model, tmp_path / "flax")
    with pytest.raises(UserError, match=r"parameters: blocks\.down_proj\.kernel holds NaN"):
        checkpoint.load(tmp_path / "flax")


@pytest.mark.parametrize("value", [NAN, np.inf, -np.inf])
def test_an_adapter_names_its_tensor(tiny, tmp_path, value):
    config = lora.LoRAConfig(rank=2, targets=("q_proj",))
    base = checkpoint.load(tiny("qwen2"))
    model = lora.attach(base, config, jax.random.key(0))
    lora.save_peft(model, tmp_path / "a", config, "x")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
        lora.load_peft(base, tmp_path / "a")
