"""Adapters against PEFT, in both directions, with factors that do something."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_models import load_torch, our_outputs, random_batch, torch_outputs

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, lora
from ema_jax.models.decoder import LoRAParam

CONFIGS = {
    "all": lora.LoRAConfig(rank=4, alpha=12.0),
    "rslora": lora.LoRAConfig(rank=4, alpha=8.0, rslora=True),
    "subset": lora.LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "down_proj")),
}
VARIANT = "qwen2_window"  # biases beside the adapters, and GQA
WEIGHTS = "adapter_model.safetensors"


def trained(model, config: lora.LoRAConfig):
    """The model with adapters whose second factor is not zero any more."""
    model = lora.attach(model, config, jax.random.key(1))
    for i, name in enumerate(config.targets):
        linear = getattr(model.blocks, name)
        shape = linear.lora_b.shape
        linear.lora_b = LoRAParam(0.1 * jax.random.normal(jax.random.key(i), shape))
    return model


@pytest.fixture(scope="module")
def base(tiny):
    return checkpoint.load(tiny(VARIANT))


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_our_adapters(tiny, tmp_path, base, name):
    config, batch = CONFIGS[name], random_batch(padding="left")
    model = trained(base, config)
    lora.save_peft(model, tmp_path / "adapter", config, base=str(tiny(VARIANT)))
    wrapped = peft.PeftModel.from_pretrained(load_torch(tiny(VARIANT)), tmp_path / "adapter")
    ours, theirs = our_outputs(model, *batch)[0], torch_outputs(wrapped, *batch)[0]
    plain = our_outputs(base, *batch)[0]
    mask = batch[1]
    assert np.abs(ours - theirs)[mask].max() <= 1e-4
    assert np.abs(ours - plain)[mask].max() > 0.1, "the adapters have to do something"

    merged = lora.merge(model)
    np.testing.assert_allclose(our_outputs(merged, *batch)[0][mask], ours[mask], atol=1e-4)
    again = lora.load_peft(base, tmp_path / "adapter")
    np.testing.assert_array_equal(our_outputs(again, *batch)[0], ours)
    checkpoint.export(merged, tmp_path / "merged")
    exported = torch_outputs(load_torch(tmp_path / "merged"), *batch)[0]
    assert np.abs(exported - theirs)[mask].max() <= 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_pefts_adapters(tiny, tmp_path, base, name):
    config, batch = CONFIGS[name], random_batch(padding="right")
    description = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        target_modules=list(config.targets),
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(load_torch(tiny(VARIANT)), description).eval()
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = lora.load_peft(base, tmp_path / "adapter")
    theirs = torch_outputs(wrapped, *batch)[0]
    assert np.abs(our_outputs(model, *batch)[0] - theirs)[batch[1]].max() <= 1e-4
    assert np.abs(our_outputs(base, *batch)[0] - theirs)[batch[1]].max() > 0.1


def test_fresh_adapters_change_nothing_and_share_the_base(base):
    batch = random_batch()
    model = lora.attach(base, CONFIGS["all"], jax.random.key(3))
    assert not np.asarray(model.blocks.q_proj.lora_b[...]).any()
    # Another program than the base's, so to the rounding of its kernels.
    ours, plain = our_outputs(model, *batch)[0], our_outputs(base, *batch)[0]
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert model.blocks.q_proj.kernel[...] is base.blocks.q_proj.kernel[...]
    assert base.blocks.q_proj.lora_a is None
    off = lora.detach(trained(base, CONFIGS["all"]))
    np.testing.assert_array_equal(our_outputs(off, *batch)[0], our_outputs(base, *batch)[0])
    a = np.asarray(model.blocks.down_proj.lora_a[...])
    bound = 1 / np.sqrt(a.shape[1])
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert not np.array_equal(a[0], a[1])


def test_float32_adapters_on_a_bfloat16_base(tiny, base):
    narrow = checkpoint.load(tiny(VARIANT), dtype=jnp.bfloat16)
    model, exact = trained(narrow, CONFIGS["all"]), trained(base, CONFIGS["all"])
    assert {leaf[...].dtype.name for leaf in _leaves(model, LoRAParam)} == {"float32"}
    merged = lora.merge(model)
    assert merged.blocks.q_proj.kernel[...].dtype == jnp.bfloat16
    tokens, mask = random_batch()
    expected = our_outputs(exact, tokens, mask)[0]
    for candidate in (model, merged):
        error = our_outputs(candidate, tokens, mask)[0] - expected
        assert np.sqrt(np.mean(error**2)) < 0.05 * np.std(expected)


def _leaves(model, kind):
    return [leaf for _, leaf in nnx.to_flat_state(nnx.state(model, kind))]


def test_only_adapters_are_split_off_for_training(base):
    model = trained(base, CONFIGS["subset"])
    _, adapters, rest = nnx.split(model, LoRAParam, ...)
    assert len(jax.tree.leaves(adapters)) == 6
    assert len(jax.tree.leaves(rest)) == len(jax.tree.leaves(nnx.state(base)))


def test_an_unknown_target_is_refused(base):
    with pytest.raises(UserError, match="'c_attn' is none of q_proj"):
        lora.attach(base, lora.LoRAConfig(targets=("c_attn",)), jax.random.key(0))


def _tensors(change):
    def break_it(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors), folder / WEIGHTS)

    return break_it


def _config(**changes):
    def break_it(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return break_it


def _without(tensors, part):
    return {name: value for name, value in tensors.items() if part not in name}


BROKEN = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds adapter_config.json without adapter"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no such file"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes(b"1234"), "not a readable safetensors file"),
    "wrong prefix": (
        _tensors(lambda w: {k.removeprefix("base_model.model."): v for k, v in w.items()}),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is missing",
    ),
    "missing layer": (_tensors(lambda w: _without(w, "layers.2.")), "layers.2.* is missing"),
    "missing factor": (_tensors(lambda w: _without(w, "lora_B")), "lora_B.weight is missing"),
    "unknown module": (
        _tensors(lambda w: w | {"base_model.model.lm_head.lora_A.weight": np.ones((4, 32))}),
        "lm_head.lora_A.weight is no projection",
    ),
    "rank": (_config(r=5), r"has shape \(4, 32\), this model makes it \(5, 32\)"),
    "dora": (_config(use_dora=True), "use_dora = True is not supported"),
    "patterns": (_config(rank_pattern={"q_proj": 2}), "rank_pattern = .* is not supported"),
    "bias": (_config(bias="all"), "bias = 'all' is not supported"),
    "saved modules": (_config(modules_to_save=["lm_head"]), "modules_to_save = .* not supported"),
    "another method": (_config(peft_type="IA3"), "peft_type is not LORA"),
    "no alpha": (_config(lora_alpha=None), "lora_alpha is missing or no number"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_adapters_that_do_not_fit_are_refused(tiny, tmp_path, base, case):
    break_it, message = BROKEN[case]
    folder = tmp_path / "adapter"
    lora.save_peft(trained(base, CONFIGS["all"]), folder, CONFIGS["all"], base="base")
    break_it(folder)
    with pytest.raises(UserError, match=message) as error:
        lora.load_peft(base, folder)
    assert "\n" not in str(error.value)
