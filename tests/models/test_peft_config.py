"""Adapters of PEFT that are plain LoRA, on all layers or some, and those that are not."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import load_torch, our_outputs, random_batch, torch_outputs

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, lora, peft_config

VARIANT = "qwen2"


@pytest.fixture(scope="module")
def base(tiny):
    return checkpoint.load(tiny(VARIANT))


def write(folder, reference, **fields):
    """An adapter of PEFT whose factors do something; returns the model that has it."""
    torch.manual_seed(0)
    description = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    wrapped = peft.get_peft_model(reference, description).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder)
    return wrapped


# As published for organisms of emergent misalignment: rank 1, on one layer's down_proj, and more.
SOME_LAYERS = {
    "rank 1, one layer": {"r": 1, "target_modules": ["down_proj"], "layers_to_transform": [1]},
    "one number": {"r": 2, "target_modules": ["down_proj"], "layers_to_transform": 2},
    "two of three": {
        "r": 2,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "pattern in a list": {
        "r": 3,
        "target_modules": ["o_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["layers"],
    },
    "rank-stabilised": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["up_proj", "gate_proj"],
        "layers_to_transform": [1],
    },
    "a module in full": {"r": 2, "target_modules": ["model.layers.1.mlp.down_proj"]},
    "a module by its end": {"r": 2, "target_modules": ["1.self_attn.q_proj", "2.mlp.up_proj"]},
    "a regular expression": {"r": 2, "target_modules": r".*layers\.[02]\..*\.(q|k)_proj"},
    "others on other layers": {"r": 2, "target_modules": r".*(0.*q_proj|1.*down_proj)"},
    "excluded": {
        "r": 2,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["0.self_attn.q_proj"],
    },
    "all linear": {"r": 2, "target_modules": "all-linear"},
    "gaussian": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", SOME_LAYERS)
def test_adapters_on_some_layers_are_those_of_peft(tiny, tmp_path, base, name):
    batch = random_batch(padding="left")
    theirs = torch_outputs(write(tmp_path, load_torch(tiny(VARIANT)), **SOME_LAYERS[name]), *batch)
    ours = our_outputs(lora.load_peft(base, tmp_path), *batch)[0]
    assert np.abs(ours - theirs[0])[batch[1]].max() <= 1e-4
    assert np.abs(ours - our_outputs(base, *batch)[0])[batch[1]].max() > 1e-2


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write(folder, load_torch(tiny(VARIANT)), r=2, target_modules=["q_proj", "down_proj"])
    return folder


NOT_PLAIN = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by iterations": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "of the future": {"init_lora_weights": "xyz"},
    "a number": {"init_lora_weights": 1},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 1}},
    "alphas": {"alpha_pattern": {"q_proj": 1}},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "parameters": {"target_parameters": ["mlp.experts"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "activated": {"alora_invocation_tokens": [3]},
    "replicated layers": {"layer_replication": [[0, 2], [1, 3]]},
    "quantised": {"use_qalora": True},
    "bias": {"lora_bias": True},
    "transposed": {"fan_in_fan_out": True},
    "mixture": {"arrow_config": {"top_k": 1}},
    "a later field": {"use_something_new": True},
    "another task": {"task_type": "SEQ_CLS"},
    "another pattern": {"layers_pattern": "h"},
}


def _changed(plain, folder, **changes):
    for path in plain.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_lora_is_refused(plain, tmp_path, base, name):
    (key,) = list(NOT_PLAIN[name])[:1]
    with pytest.raises(UserError, match=f"{key} = .* is not supported: only plain LoRA"):
        lora.load_peft(base, _changed(plain, tmp_path, **NOT_PLAIN[name]))


HARMLESS = [
    {"lora_dropout": 0.3},
    {"inference_mode": False, "auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    {"init_lora_weights": False},
    {"a_later_field": None, "another": {}, "one_more": False},
    {"megatron_core": "megatron.core", "qalora_group_size": 16},
    {"revision": "main", "peft_version": "9.9"},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=str)
def test_fields_that_change_nothing_are_taken(plain, tmp_path, base, changes):
    lora.load_peft(base, _changed(plain, tmp_path, **changes))


IMPOSSIBLE = [
    *(
        ({"r": rank}, "r is missing or no whole number from 1 to 65536")
        for rank in (0, -1, -(10**300), 2.7, True, None, "8", [8], 65_537, 10**9, 10**300)
    ),
    ({"r": 65_536}, "has shape"),
    ({"lora_alpha": -1}, "lora_alpha"),
    ({"layers_to_transform": [10**300]}, "is no projection of this model"),
    ({"layers_to_transform": [-1]}, "is no projection of this model"),
    ({"lora_alpha": "8"}, "lora_alpha is missing or no number"),
    ({"lora_alpha": 0}, "lora_alpha"),
    ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
    ({"layers_to_transform": "1"}, "layers_to_transform is '1', expected numbers"),
    ({"layers_to_transform": [1]}, "is no projection of this model"),
    ({"target_modules": ["q_proj"]}, "down_proj.* is no projection"),
    ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "k_proj.*is missing for this model"),
    ({"target_modules": ["c_attn"]}, "is no projection"),
    ({"peft_type": "LOHA"}, "peft_type is not LORA"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE, ids=str)
def test_descriptions_that_do_not_fit_are_refused(plain, tmp_path, base, changes, message):
    with pytest.raises(UserError, match=message) as error:
        lora.load_peft(base, _changed(plain, tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_layer_without_one_factor_is_refused(plain, tmp_path, base):
    _changed(plain, tmp_path, target_modules=".*")
    path = tmp_path / peft_config.WEIGHTS
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"lora_A\.weight is missing"):
        lora.load_peft(base, tmp_path)


FOLDERS = {
    "pickled": (["adapter_config.json", "adapter_model.bin"], r"adapter_model\.bin, .*pickled"),
    "pickled in parts": (["adapter_model-00001-of-2.bin"], r"adapter_model-00001-of-2\.bin"),
    "no tensors": (["adapter_config.json"], "holds adapter_config.json without adapter_model"),
    "another name": (
        ["adapter_config.json", "adapter.safetensors"],
        r"holds adapter\.safetensors and no adapter_model",
    ),
    "a model": (["config.json", "model.safetensors"], "a model .* and no adapter"),
    "nothing": ([], "neither adapter_config.json nor adapter_model.safetensors"),
    "tensors alone": (["adapter_model.safetensors"], "adapter_config.json: no such file"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_there_instead_is_said(tmp_path, base, name):
    files, message = FOLDERS[name]
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        lora.load_peft(base, tmp_path)


def test_a_folder_that_is_not_there(tmp_path, base):
    with pytest.raises(UserError, match="no such folder of an adapter"):
        lora.load_peft(base, tmp_path / "none")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json"], "an adapter .* and no model; name the model"),
        (["adapter_config.json", "adapter_model.bin"], "an adapter .* and no model"),
        (["config.json", "adapter_model.bin"], "a pickled adapter"),
        (["config.json", "adapter_config.json"], "an adapter's description"),
        (["config.json", "adapter_config.json", "adapter_model.safetensors"], "an adapter "),
    ],
)
def test_an_adapter_in_place_of_a_model(tiny, tmp_path, files, message):
    for file in files:
        (tmp_path / file).touch()
        if file == "config.json":
            (tmp_path / file).write_bytes((tiny(VARIANT) / file).read_bytes())
    with pytest.raises(UserError, match=message):
        checkpoint.check(tmp_path)
