"""`python -m ema_jax.convert`: both directions bit for bit, and its refusals."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from tiny_models import our_outputs, random_batch

from ema_jax.convert import convert
from ema_jax.errors import UserError
from ema_jax.models import checkpoint
from ema_jax.models.hub import resolve
from ema_jax.models.sharding import make_mesh


def run(*flags):
    command = [sys.executable, "-m", "ema_jax.convert", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def tensors(folder) -> dict[str, tuple]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)
                found[name] = (value.dtype.name, value.shape, value.tobytes())
    return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["qwen2", "mistral"])
def test_to_flax_and_back_is_bit_exact(tiny, tmp_path, variant, dtype):
    source, flax, back = tmp_path / "source", tmp_path / "flax", tmp_path / "hf"
    checkpoint.export(checkpoint.load(tiny(variant), dtype=dtype), source)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    convert(str(source), str(flax), "flax")
    convert(str(flax), str(back), "hf")
    assert tensors(back) == tensors(source)
    for name in ("config.json", "tokenizer_config.json"):
        assert (back / name).read_text() == (source / name).read_text()
    manifest = json.loads((flax / "manifest.json").read_text())
    assert manifest["dtype"] == jnp.dtype(dtype).name
    assert manifest["source"] == str(source)
    assert manifest["revision"] is None
    assert not list(flax.glob("*.safetensors"))


def test_command_line_both_ways(tiny, tmp_path):
    flax, back = tmp_path / "flax", tmp_path / "hf"
    for flags in (
        (f"--source={tiny('qwen3')}", f"--output={flax}", "--to=flax"),
        (f"--source={flax}", f"--output={back}", "--to=hf"),
    ):
        done = run(*flags)
        assert done.returncode == 0, done.stderr
    assert tensors(back) == tensors(tiny("qwen3"))
    refused = run(f"--source={flax}", f"--output={back}", "--to=hf")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {back}: already exists")
    assert refused.stderr.count("\n") == 1


def test_a_flax_folder_restores_to_any_mesh_and_dtype(tiny, tmp_path):
    source, flax = tiny("llama"), tmp_path / "flax"
    convert(str(source), str(flax), "flax")
    mesh = make_mesh((2, 2, 2))
    ours, expected = checkpoint.load(flax, mesh=mesh), checkpoint.load(source, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, *map(_arrays, (ours, expected)))
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, _arrays(ours), _arrays(expected))
    assert all(jax.tree.leaves(same))
    assert ours.blocks.q_proj.kernel[...].sharding.spec == P(None, "fsdp", "tensor")
    narrow = checkpoint.load(flax, dtype=jnp.bfloat16)
    assert narrow.embed[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        our_outputs(checkpoint.load(flax), *random_batch())[0],
        our_outputs(checkpoint.load(source), *random_batch())[0],
    )


def _arrays(model):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(model))


def test_the_fingerprint_follows_the_parameters(tiny, tmp_path):
    folders = {}
    for name in ("first", "again"):
        folders[name] = tmp_path / name
        convert(str(tiny("qwen2")), str(folders[name]), "flax")
    other = checkpoint.load(tiny("qwen2"))
    other.embed[...] += 1
    checkpoint.save_flax(other, tmp_path / "other")
    prints = {name: checkpoint.fingerprint(folder) for name, folder in folders.items()}
    assert prints["first"] == prints["again"] != checkpoint.fingerprint(tmp_path / "other")


def _no_manifest(folder):
    (folder / "manifest.json").unlink()


def _other_manifest(folder):
    (folder / "manifest.json").write_text('{"format": "another"}')


def _bare_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"dtype": "int8"}))


def _no_parameters(folder):
    shutil.rmtree(folder / "parameters")


def _no_metadata(folder):
    (folder / "parameters" / "state" / "_METADATA").unlink()


def _other_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))


def _damaged_arrays(folder):
    for path in (folder / "parameters" / "state").rglob("d/*"):
        path.write_bytes(b"\0" * 64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_manifest, "manifest.json: no such file"),
        (_other_manifest, "not the manifest of a Flax checkpoint"),
        (_bare_manifest, "not the manifest of a Flax checkpoint"),
        (_no_parameters, "not a readable Orbax checkpoint"),
        (_no_metadata, "not a readable Orbax checkpoint"),
        (_other_config, r"embed has shape \(97, 32\), config.json makes it \(100, 32\)"),
        (_damaged_arrays, "not a readable Orbax checkpoint"),
    ],
)
def test_broken_flax_folders(tiny, tmp_path, damage, message):
    folder = tmp_path / "flax"
    convert(str(tiny("qwen2")), str(folder), "flax")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


def test_overwrite_replaces_checkpoints_only(tiny, tmp_path):
    output = tmp_path / "out"
    convert(str(tiny("qwen2")), str(output), "hf")
    convert(str(tiny("mistral")), str(output), "hf", overwrite=True)
    assert tensors(output) == tensors(tiny("mistral"))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="no checkpoint folder, so it is not overwritten"):
        convert(str(tiny("qwen2")), str(precious), "hf", overwrite=True)
    assert (precious / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("/nowhere/at/all", None, "no such folder, and no hub id"),
        ("./missing", None, "no such folder, and no hub id"),
        ("plainname", None, "no such folder, and no hub id"),
        ("nobody/nothing", None, "hub cannot be reached .* copy the folder"),
        ("nobody/nothing", "v1", "nobody/nothing at revision 'v1': .* hub cannot be reached"),
        ("no body/nothing", None, "no valid hub id"),
        (__file__, None, "not a folder"),
        (".", "main", "a folder has no revision 'main'"),
    ],
)
def test_sources_that_cannot_be_resolved(source, revision, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(source, revision)
    assert "\n" not in str(error.value)


def _hub_error(name):
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)  # its constructor wants a response of the HTTP library in use
    error.args = ("GET https://hub/?token=secret\nsecond line",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "accept its terms .* set HF_TOKEN"),
        ("RepositoryNotFoundError", "nor such a model on the hub"),
        ("RevisionNotFoundError", "no such revision"),
        ("HfHubHTTPError", r"download failed \(HfHubHTTPError\)"),
    ],
)
def test_hub_failures_name_the_id_and_no_secret(monkeypatch, error, message):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise _hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message) as raised:
        resolve("owner/name", "main")
    text = str(raised.value)
    assert text.startswith("owner/name at revision 'main'")
    assert "secret" not in text
    assert "\n" not in text


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository; it notes what is asked for and serves what the patterns allow."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    hub = SimpleNamespace(files={}, asked=[], snapshot=tmp_path / "snapshots" / COMMIT)

    def download(repo_id, *, revision, **patterns):
        hub.snapshot.mkdir(parents=True, exist_ok=True)
        served = list(filter_repo_objects(list(hub.files), **patterns))
        for name in served:
            (hub.snapshot / name).write_text(hub.files[name])
        hub.asked.append((repo_id, revision, served))
        return str(hub.snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: list(hub.files))
    return hub


def test_a_hub_id_downloads_only_what_is_needed(hub, tiny):
    small = ["config.json", "tokenizer.json", "merges.txt", "model.safetensors.index.json"]
    small += ["chat_template.jinja", "tokenizer.model"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"]
    unwanted += ["modeling_custom.py", "model.gguf", "README.md"]
    hub.files = dict.fromkeys([*small, *weights, *unwanted], "")
    hub.files["config.json"] = (tiny("llama") / "config.json").read_text()
    assert resolve("owner/name", "main") == (hub.snapshot, COMMIT)
    (first, second) = hub.asked
    assert first[:2] == ("owner/name", "main")
    assert sorted(first[2]) == sorted(small)
    # The weights of the commit that the first answer was of, whatever `main` is by now.
    assert second[:2] == ("owner/name", COMMIT)
    assert sorted(second[2]) == sorted(small + weights)


@pytest.mark.parametrize(
    ("config", "weights", "message", "downloads"),
    [
        ({"model_type": "gpt2"}, "model.safetensors", "'gpt2' is not supported", 1),
        ({"quantization_config": {"quant_method": "awq"}}, "model.safetensors", r"\(awq\)", 1),
        ({}, "pytorch_model.bin", "weights such as pytorch_model.bin but none in safetensors", 2),
        ({}, "model-Q4.gguf", "weights such as model-Q4.gguf but none in safetensors", 2),
        ({}, "notes.md", "owner/name: no weights; name a model with model.safetensors", 2),
    ],
)
def test_a_hub_model_that_cannot_be_used(hub, tiny, config, weights, message, downloads):
    """Found out before gigabytes are downloaded."""
    theirs = json.loads((tiny("llama") / "config.json").read_text())
    hub.files = {"config.json": json.dumps(theirs | config), weights: ""}
    with pytest.raises(UserError, match=message) as error:
        resolve("owner/name")
    assert "\n" not in str(error.value)
    assert len(hub.asked) == downloads


def test_the_dtype_and_the_card_of_a_converted_checkpoint(tiny, tmp_path):
    flax, out = tmp_path / "flax", tmp_path / "out"
    convert(str(tiny("qwen2")), str(flax), "flax", dtype="bfloat16")
    assert json.loads((flax / "manifest.json").read_text())["dtype"] == "bfloat16"
    convert(str(flax), str(out), "hf", dtype="float32")
    held = {name: np.frombuffer(value[2], np.float32) for name, value in tensors(out).items()}
    for name, value in tensors(tiny("qwen2")).items():
        rounded = np.frombuffer(value[2], np.float32).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(held[name], rounded)
    card = (out / "README.md").read_text()
    assert "| source | qwen2 |" in card
    assert "| what was modified | nothing but the format" in card
    assert str(tmp_path) not in card
