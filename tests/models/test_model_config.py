"""`config.json` of real models and of every transformers age, and what is refused."""

import copy
import json
import math

import jax
import pytest
import transformers
from flax import nnx
from tiny_models import VARIANTS, read_config

from ema_jax.errors import UserError
from ema_jax.models import checkpoint
from ema_jax.models.config import DecoderConfig, rope_frequencies

# As the hub has them (transformers 4 form), the fields that matter.
REAL = {
    "Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Mistral-7B-Instruct-v0.3": {
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
    },
    "Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
PARAMETERS = {
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen3-0.6B": 596_049_920,
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_have_the_published_number_of_parameters(name):
    config = DecoderConfig.from_hf(REAL[name])
    leaves = jax.tree.leaves(nnx.state(checkpoint.abstract_decoder(config)))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]
    assert set(config.windows) == {None}


def hf_config(values: dict):
    rest = {k: v for k, v in values.items() if k != "model_type"}
    return transformers.AutoConfig.for_model(values["model_type"], **rest)


@pytest.mark.parametrize("name", REAL)
def test_rotary_frequencies_of_real_configs_equal_transformers(name):
    """The 4.x form here, what transformers 5 makes of it there, and its own 5.x form read back."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = hf_config(REAL[name])
    kind = theirs.rope_parameters["rope_type"]
    ours, factor = rope_frequencies(DecoderConfig.from_hf(REAL[name]))
    if kind == "default":
        dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        theta = theirs.rope_parameters["rope_theta"]
        expected = [theta ** (-2 * i / dim) for i in range(dim // 2)]
        expected_factor = 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    assert ours == pytest.approx(expected, rel=1e-5)
    assert factor == expected_factor
    new_form = json.loads(theirs.to_json_string())
    assert "rope_theta" not in new_form
    again, _ = rope_frequencies(DecoderConfig.from_hf(new_form))
    assert (again == ours).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_old_and_new_forms_are_one_architecture(tiny, variant):
    new = read_config(tiny(variant))
    old = dict(new)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old["torch_dtype"] = old.pop("dtype")
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "llama"])
def test_what_a_config_leaves_out_is_filled_in_as_transformers_does(model_type):
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 2}
    values = {"model_type": model_type, **sizes, "num_attention_heads": 32}
    theirs, ours = hf_config(values), DecoderConfig.from_hf(values)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 512 // 32)
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert ours.windows == (getattr(theirs, "sliding_window", None),) * 2


def test_a_head_dim_of_null_is_derived():
    values = REAL["Mistral-7B-Instruct-v0.3"] | {"head_dim": None}
    assert DecoderConfig.from_hf(values).head_dim == 128


# A copy: transformers fills in the rotary parameters of a dict that it is given.
BASE = copy.deepcopy(REAL["Llama-3.1-8B-Instruct"])
YARN = {"rope_type": "yarn"}
REFUSED = {
    "list": ([], "not a JSON object"),
    "family": ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; use .*mistral, qwen2"),
    "list_family": ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
    "reward_model": (
        {"architectures": ["LlamaForSequenceClassification"]},
        r"a causal language model is needed \(LlamaForCausalLM\)",
    ),
    "infinite": ({"rope_theta": math.inf}, "rope_theta is inf, expected a positive number"),
    "text_rope": ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
    "list_rope": ({"rope_scaling": {"type": ["yarn"]}}, "is not supported"),
    "too_deep": ({"num_hidden_layers": 10**6}, "larger than any model's"),
    "window_layers": (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": None,
        },
        "max_window_layers is None, expected a whole number",
    ),
    "no_family": ({"model_type": None}, "model_type None is not supported"),
    "moe_family": ({"model_type": "mixtral"}, "'mixtral' is not supported"),
    "moe": ({"num_local_experts": 8}, "mixtures of experts are not supported"),
    "attention_bias": ({"attention_bias": True}, "attention_bias = true is not supported"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias = true is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
    "bnb": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"quantised \(bitsandbytes\)",
    ),
    "unnamed": ({"quantization_config": {"bits": 4}}, r"quantised \(unknown method\)"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
    "mrope": ({"rope_scaling": {"type": "mrope"}}, "'mrope' is not supported"),
    "by_layer": (
        {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rotary parameters that differ by layer",
    ),
    "no_factor": ({"rope_scaling": YARN}, "rope scaling 'yarn' needs factor"),
    "bad_factor": ({"rope_scaling": YARN | {"factor": "4"}}, "factor is '4'"),
    "text_original": (
        {"rope_scaling": YARN | {"factor": 4.0, "original_max_position_embeddings": "32"}},
        "original_max_position_embeddings is '32', expected a positive number",
    ),
    "negative_option": (
        {"rope_scaling": YARN | {"factor": 4.0, "beta_fast": -1}},
        "beta_fast is -1, expected a positive number",
    ),
    "no_band": (
        {"rope_scaling": BASE["rope_scaling"] | {"low_freq_factor": 4.0}},
        "no rotary embedding follows from",
    ),
    "no_rotation": (
        {"rope_theta": 1, "rope_scaling": YARN | {"factor": 4.0}},
        "no rotary embedding follows from",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    "heads": ({"num_key_value_heads": 7}, "32 is no multiple of num_key_value_heads 7"),
    "uneven": ({"hidden_size": 4097}, "4097 is no multiple of num_attention_heads 32"),
    "odd": ({"head_dim": 33}, "head_dim 33 is odd"),
    "missing": ({"vocab_size": None}, "vocab_size is missing"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive whole"),
    "text": ({"hidden_size": "4096"}, "hidden_size is '4096', expected a positive whole"),
    "epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a positive number"),
    "layer_types": (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention"],
        },
        "layer_types has to name",
    ),
    "one_layer_type": (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": 3,
        },
        "layer_types has to name",
    ),
    "chunked": (
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["chunked_attention"] * 32,
        },
        "layer_types has to name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_decoder_cannot_do_is_refused_in_one_line(case):
    changes, message = REFUSED[case]
    config = BASE | changes if isinstance(changes, dict) else changes
    with pytest.raises(UserError, match=message) as error:
        DecoderConfig.from_hf(config, where="some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert "\n" not in str(error.value)
