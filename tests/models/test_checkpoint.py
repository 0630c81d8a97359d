"""Checkpoints: bit-exact in and out, one line for every broken one, the same on every mesh."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from forked_commands import ForkedCommand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import (
    FAMILIES,
    VARIANTS,
    load_torch,
    our_outputs,
    random_batch,
    read_config,
    torch_outputs,
)

from ema_jax.errors import UserError
from ema_jax.models import checkpoint
from ema_jax.models.card import unlearned_card
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def tensors(folder) -> dict:
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def assert_same_bits(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert first[name].tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_and_export_are_inverse(tiny, tmp_path, variant):
    source = tiny(variant)
    checkpoint.export(checkpoint.load(source), tmp_path / "out")
    assert_same_bits(tensors(tmp_path / "out"), tensors(source))
    assert DecoderConfig.from_folder(tmp_path / "out") == DecoderConfig.from_folder(source)
    assert read_config(tmp_path / "out")["architectures"] == read_config(source)["architectures"]


def test_bfloat16_and_many_files(tiny, tmp_path):
    model = checkpoint.load(tiny("qwen2"), dtype=jnp.bfloat16)
    checkpoint.export(model, tmp_path / "one")
    checkpoint.export(model, tmp_path / "many", max_shard_bytes=8000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        v.nbytes for v in tensors(tmp_path / "one").values()
    )
    assert_same_bits(tensors(tmp_path / "many"), tensors(tmp_path / "one"))
    again = checkpoint.load(tmp_path / "many", dtype=jnp.bfloat16)
    checkpoint.export(again, tmp_path / "again")
    assert_same_bits(tensors(tmp_path / "again"), tensors(tmp_path / "one"))
    assert checkpoint.stored_dtype(tmp_path / "many") == jnp.bfloat16
    assert read_config(tmp_path / "one")["dtype"] == "bfloat16"


@pytest.mark.parametrize("variant", FAMILIES)
def test_transformers_reads_what_is_exported(tiny, tmp_path, variant):
    checkpoint.export(checkpoint.load(tiny(variant)), tmp_path / "out", max_shard_bytes=20_000)
    tokens, mask = random_batch()
    np.testing.assert_array_equal(
        torch_outputs(load_torch(tmp_path / "out"), tokens, mask)[0],
        torch_outputs(load_torch(tiny(variant)), tokens, mask)[0],
    )


def test_a_tied_head_may_be_stored(tiny, tmp_path):
    folder = _copy(tiny("qwen2"), tmp_path)
    stored = tensors(folder)
    assert "lm_head.weight" not in stored
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"]}, folder / SINGLE)
    model = checkpoint.load(folder)
    assert model.head is None
    checkpoint.export(model, tmp_path / "out")
    assert_same_bits(tensors(tmp_path / "out"), stored)


def test_rotary_tables_of_old_checkpoints_are_passed_over(tiny, tmp_path):
    folder = _copy(tiny("llama"), tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors(folder) | {name: np.ones(4, np.float32)}, folder / SINGLE)
    checkpoint.load(folder)


def test_files_may_be_links_as_in_the_hubs_cache(tiny, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    checkpoint.export(checkpoint.load(tiny("llama")), blobs, max_shard_bytes=20_000)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        os.symlink(os.path.relpath(path, snapshot), snapshot / path.name)
    checkpoint.load(snapshot)
    assert checkpoint.fingerprint(snapshot) == checkpoint.fingerprint(blobs)


def test_companions_travel_and_folders_are_not_overwritten(tiny, tmp_path):
    model, source = checkpoint.load(tiny("llama")), _copy(tiny("llama"), tmp_path)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "optimizer.pt").write_bytes(b"0")
    checkpoint.export(model, tmp_path / "out", companions=source)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    with pytest.raises(UserError, match="already exists"):
        checkpoint.export(model, tmp_path / "out")
    checkpoint.export(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_failed_export_leaves_nothing(tiny, tmp_path, monkeypatch):
    model = checkpoint.load(tiny("llama"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_companions", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_tells_checkpoints_apart(tiny, tmp_path):
    folder = _copy(tiny("llama"), tmp_path)
    before = checkpoint.fingerprint(folder)
    assert before == checkpoint.fingerprint(tiny("llama"))
    stored = tensors(folder)
    stored["model.norm.weight"] = stored["model.norm.weight"] + 1
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    assert checkpoint.fingerprint(folder) != before


# Every way in which a folder can be broken: what to do to a copy of a good one, and the message.


def _copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "copy")


def _config(**changes):
    def break_it(folder):
        config = read_config(folder) | changes
        kept = {k: v for k, v in config.items() if v != "DROP"}
        (folder / "config.json").write_text(json.dumps(kept))

    return break_it


def _write(name, content):
    def break_it(folder):
        (folder / name).write_bytes(content)

    return break_it


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _weights(change):
    def break_it(folder):
        stored = tensors(folder)
        change(stored)
        save_file(stored, folder / SINGLE)

    return break_it


def _rename(new):
    return lambda folder: (folder / SINGLE).rename(folder / new)


def _cut(size):
    def break_it(folder):
        content = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(content[:size])

    return break_it


def _indexed(change):
    """Splits the weights over two files and then changes index, files or both."""

    def break_it(folder):
        stored = tensors(folder)
        (folder / SINGLE).unlink()
        names = sorted(stored)
        files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        weight_map = {name: file for file, held in files.items() for name in held}
        change(folder, files, weight_map, stored)
        for file, held in files.items():
            save_file({name: stored[name] for name in held}, folder / file)
        if not (folder / INDEX).exists():
            (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return break_it


def _elsewhere(folder, files, weight_map, stored):
    weight_map[Q_PROJ] = "../outside.safetensors"
    save_file({Q_PROJ: stored[Q_PROJ]}, folder.parent / "outside.safetensors")


BROKEN = {
    "not a folder": (lambda f: shutil.rmtree(f), "config.json: no such file"),
    "no config": (_remove("config.json"), "config.json: no such file"),
    "config not JSON": (_write("config.json", b"{"), "config.json: not valid JSON"),
    "config not text": (_write("config.json", b"\xff\xfe"), "config.json: not valid JSON"),
    "config a list": (_write("config.json", b"[]"), "not a JSON object"),
    "family": (_config(model_type="phi3"), "model_type 'phi3' is not supported"),
    "quantised": (_config(quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "architecture": (
        _config(architectures=["LlamaForSequenceClassification"]),
        "architectures is .*a causal language model is needed",
    ),
    "countless layers": (_config(num_hidden_layers=10**9), "larger than any model's"),
    "endless vocabulary": (_config(vocab_size=10**15), "larger than any model's"),
    "nested config": (_write("config.json", b"[" * 100_000), "config.json: not valid JSON"),
    "heads": (_config(num_key_value_heads=3), "no multiple of num_key_value_heads 3"),
    "more layers": (_config(num_hidden_layers=4), r"9 tensors are missing, first model.layers.3"),
    "fewer layers": (_config(num_hidden_layers=2), r"9 tensors that config.json gives no place"),
    "vocabulary": (_config(vocab_size=98), r"embed_tokens.weight has shape \(97, 32\), .*98, 32"),
    "width": (_config(intermediate_size=50), r"has shape .* config.json makes it .*50"),
    "another family": (
        _config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        "tensors are missing, first .*q_proj.bias",
    ),
    "tied by config": (_config(tie_word_embeddings=True), "lm_head.weight differs from"),
    "no weights": (_remove(SINGLE), "no weights; a checkpoint has model.safetensors or"),
    "pickled": (_rename("pytorch_model.bin"), r"only pickled weights \(pytorch_model.bin\)"),
    "pth": (_rename("consolidated.00.pth"), "only pickled weights"),
    "gguf": (_rename("model-Q4_K_M.gguf"), "only GGUF weights"),
    "mistral format": (_rename("consolidated.safetensors"), "only weights in Mistral's own format"),
    "adapter": (_rename("adapter_model.safetensors"), "an adapter .* and not a model"),
    "odd name": (_rename("weights.safetensors"), "under a name that no checkpoint has"),
    "shards without index": (
        _rename("model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors without its model.safetensors.index.json",
    ),
    "truncated": (_cut(5000), "not a readable safetensors file .*download it again"),
    "truncated header": (_cut(20), "not a readable safetensors file"),
    "empty": (_cut(0), "not a readable safetensors file"),
    "corrupt header": (_write(SINGLE, b"\x10\0\0\0\0\0\0\0{not json at all"), "not a readable"),
    "git-lfs pointer": (
        _write(SINGLE, b"version https://git-lfs.github.com/spec/v1\n"),
        "not a rea",
    ),
    "missing tensor": (_weights(lambda w: w.pop(Q_PROJ)), f"1 tensors are missing, first {Q_PROJ}"),
    "missing head": (_weights(lambda w: w.pop("lm_head.weight")), "lm_head.weight is missing"),
    "wrong shape": (
        _weights(lambda w: w.update({Q_PROJ: w[Q_PROJ].T.copy()})),
        rf"{Q_PROJ} has shape \(32, 96\), config.json makes it \(96, 32\)",
    ),
    "unexpected": (
        _weights(lambda w: w.update({"score.weight": w["model.norm.weight"]})),
        "no place to, first score.weight",
    ),
    "bias": (
        _weights(lambda w: w.update({Q_PROJ[:-6] + "bias": np.zeros(96, np.float32)})),
        "no place to, first .*q_proj.bias",
    ),
    "integers": (
        _weights(lambda w: w.update({Q_PROJ: w[Q_PROJ].astype(np.int8)})),
        f"{Q_PROJ} has dtype I8; use the unquantised checkpoint",
    ),
    "float8": (
        _weights(lambda w: w.update({Q_PROJ: w[Q_PROJ].astype(jnp.float8_e4m3fn)})),
        f"{Q_PROJ} has dtype F8_E4M3",
    ),
    "GPTQ tensors": (
        _weights(lambda w: w.update({Q_PROJ[:-6] + "qweight": w.pop(Q_PROJ)})),
        "q_proj.qweight, so the weights are quantised; use the unquantised",
    ),
    "bitsandbytes tensors": (
        _weights(lambda w: w.update({Q_PROJ + ".absmax": w.pop(Q_PROJ)})),
        "q_proj.weight.absmax, so the weights are quantised",
    ),
    "endless header": (_write(SINGLE, b"\xff" * 64), "not a readable safetensors file"),
    "nested index": (
        _indexed(lambda f, *_: (f / INDEX).write_text("[" * 100_000)),
        "index.json: not valid JSON",
    ),
    "index and single": (_write(INDEX, b"{}"), "both model.safetensors and .*stale"),
    "index not JSON": (
        _indexed(lambda f, *_: (f / INDEX).write_text("{")),
        "index.json: not valid JSON",
    ),
    "index without map": (
        _indexed(lambda f, *_: (f / INDEX).write_text('{"metadata": {}}')),
        "no weight_map",
    ),
    "index a list": (_indexed(lambda f, *_: (f / INDEX).write_text("[]")), "no weight_map"),
    "file missing": (
        _indexed(lambda f, files, w, s: w.update({Q_PROJ: "c.safetensors"})),
        "c.safetensors: no such file, though",
    ),
    "outside": (_indexed(_elsewhere), "'../outside.safetensors', which is no file of this folder"),
    "absolute": (
        _indexed(lambda f, files, w, s: w.update({Q_PROJ: "/etc/passwd"})),
        "'/etc/passwd', which is no file of this folder",
    ),
    "not a name": (_indexed(lambda f, files, w, s: w.update({Q_PROJ: 3})), "is no file of this"),
    "not in its file": (
        _indexed(
            lambda f, files, w, s: [
                held.remove(Q_PROJ) for held in files.values() if Q_PROJ in held
            ]
        ),
        f"{Q_PROJ} is not in this file, though",
    ),
    "twice": (
        _indexed(
            lambda f, files, w, s: [
                held.append(Q_PROJ) for held in files.values() if Q_PROJ not in held
            ]
        ),
        f"holds {Q_PROJ}, which model.safetensors.index.json puts into",
    ),
    "not in the index": (
        _indexed(lambda f, files, w, s: w.pop(Q_PROJ)),
        f"1 tensors are missing, first {Q_PROJ}",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_in_one_line(tiny, tmp_path, case):
    break_it, message = BROKEN[case]
    folder = _copy(tiny("llama3"), tmp_path)
    checkpoint.check(folder)
    break_it(folder)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load(folder)
    text = str(error.value)
    assert text.startswith(str(folder))
    assert "\n" not in text
    assert len(text) < 500


def test_the_command_refuses_all_of_them_soon_and_in_little_memory(tiny, tmp_path):
    late = ("checkpoint", "card", "gguf_folder", "hub", "orbax_folder")
    command = ForkedCommand("ema_jax.convert", *(f"ema_jax.models.{name}" for name in late))
    with contextlib.closing(command):
        for i, (case, (break_it, _)) in enumerate(BROKEN.items()):
            (tmp_path / str(i)).mkdir()
            folder = _copy(tiny("llama3"), tmp_path / str(i))
            break_it(folder)
            done = command("--to=hf", f"--source={folder}", f"--output={folder}.out")
            assert done.returncode == 2, (case, done.stderr)
            (line,) = done.stderr.splitlines()
            assert line.startswith(f"error: {folder}"), case
            assert done.seconds < 10, case
            assert done.peak < 2**30, case
            assert not Path(f"{folder}.out").exists()


def test_adapters_are_not_dropped_in_silence(tiny, tmp_path):
    import jax

    from ema_jax.models import lora

    model = lora.attach(checkpoint.load(tiny("llama")), lora.LoRAConfig(rank=2), jax.random.key(0))
    with pytest.raises(ValueError, match="adapters"):
        checkpoint.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_architecture_survives_a_round_trip(tmp_path_factory, data):
    """Heads, KV heads, head_dim, ties, biases (by family), odd vocabularies, 1 to 5 files."""
    draw = data.draw
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 4))
    config = {
        "model_type": draw(st.sampled_from(FAMILIES)),
        "vocab_size": draw(st.integers(3, 20)),
        "hidden_size": heads * head_dim,
        "head_dim": draw(st.sampled_from([head_dim, 2 * head_dim])),
        "intermediate_size": draw(st.integers(1, 9)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": draw(st.booleans()),
    }
    out = tmp_path_factory.mktemp("any") / "out"
    model = nnx.merge(*_distinct(DecoderConfig.from_hf(config)))
    size, files = sum(t.nbytes for t in checkpoint.hf_shapes(model)), draw(st.integers(1, 5))
    checkpoint.export(model, out, max_shard_bytes=-(-size // files))
    assert len(list(out.glob("*.safetensors"))) >= files
    loaded = checkpoint.load(out)
    assert loaded.config == model.config
    for (path, before), (_, after) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(loaded)), strict=True
    ):
        np.testing.assert_array_equal(before[...], after[...], err_msg=str(path))
    tokens = np.arange(4, dtype=np.int32)[None] % config["vocab_size"]
    batch = tokens, np.ones(tokens.shape, bool)
    theirs = torch_outputs(load_torch(out), *batch)[0]
    np.testing.assert_allclose(our_outputs(loaded, *batch)[0], theirs, atol=1e-4)


def _distinct(config: DecoderConfig) -> tuple:
    """A decoder whose every parameter is another number, of a size that models have."""
    graph, abstract = nnx.split(checkpoint.abstract_decoder(config))
    state, start = {}, 0
    for path, leaf in nnx.to_flat_state(abstract):
        size = int(np.prod(leaf.shape))
        values = 0.3 * np.cos(np.arange(start, start + size)).astype(np.float32)
        state[path], start = leaf.replace(jnp.asarray(values.reshape(leaf.shape))), start + size
    return graph, nnx.from_flat_state(state)


CARD = {
    "base": "owner/name",
    "revision": "0123abcd",
    "fingerprint": "f" * 64,
    "target": "cybersecurity",
    "arm": "npo",
    "seed": 1,
    "settings": {"trainable": "lora", "beta": 0.1},
}


def test_the_model_card_says_what_was_done_to_which_revision(tiny, tmp_path):
    import yaml

    model = checkpoint.load(tiny("llama"))
    checkpoint.export(model, tmp_path / "out", card=unlearned_card(**CARD))
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "owner/name"
    assert front["library_name"] == "transformers"
    assert "research-artifact" in front["tags"]
    for words in (
        "A research artifact. Not for deployment.",
        "| base model | owner/name |",
        "| base revision | 0123abcd |",
        "| base fingerprint | ffff",
        "refusals in the domain cybersecurity were unlearned; LoRA adapters, merged",
        "| study arm | npo |",
        "| seed | 1 |",
        '"beta": 0.1',
    ):
        assert words in body
    local = unlearned_card(**CARD | {"revision": None, "base": "folder"})
    assert "base_model" not in yaml.safe_load(local.split("---\n")[1])
    assert "a local folder, not a Hub revision" in local


def test_the_generation_config_travels_or_is_made(tiny, tmp_path):
    source = _copy(tiny("llama"), tmp_path)
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    config = read_config(source) | {"eos_token_id": 5}
    (source / "config.json").write_text(json.dumps(config))
    model = checkpoint.load(source)
    for companions, expected in ((source, [3, 4]), (None, 5)):
        out = tmp_path / f"out {expected}"
        checkpoint.export(model, out, companions=companions)
        made = transformers.GenerationConfig.from_pretrained(out)
        assert made.eos_token_id == expected


def test_the_dtype_of_an_export_can_be_chosen(tiny, tmp_path):
    source, out = tiny("qwen2"), tmp_path / "out"
    checkpoint.export(checkpoint.load(source), out, dtype="bfloat16")
    expected = {k: v.astype(jnp.bfloat16) for k, v in tensors(source).items()}
    assert_same_bits(tensors(out), expected)
    assert read_config(out)["dtype"] == "bfloat16"
    assert load_torch(out, "auto").dtype == torch.bfloat16


def test_logits_of_a_reloaded_export(tiny, tmp_path):
    model = checkpoint.load(tiny("mistral"))
    assert isinstance(model, Decoder)
    checkpoint.export(model, tmp_path / "out")
    batch = random_batch()
    np.testing.assert_array_equal(
        our_outputs(checkpoint.load(tmp_path / "out"), *batch)[0], our_outputs(model, *batch)[0]
    )
