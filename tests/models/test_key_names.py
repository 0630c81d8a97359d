"""Names that tensors got from what the model was wrapped into, and a missing head."""

from pathlib import Path

import pytest

from ema_jax.errors import UserError
from ema_jax.models.safetensors_files import WeightFiles

LAYER = "model.layers.0.self_attn.q_proj.weight"
NAMES = ("model.embed_tokens.weight", LAYER, "model.norm.weight", "lm_head.weight")

CASES = {
    "compiled": ("_orig_mod.", "'_orig_mod.'.*torch.compile leaves.*save the model that is inside"),
    "parallel": ("module.", "'module.'.*DataParallel"),
    "both": ("module._orig_mod.", "'module._orig_mod.'.*torch.compile"),
    "compiled first": ("_orig_mod.module.", "'_orig_mod.module.'.*torch.compile"),
    "sharded": ("_fsdp_wrapped_module.", "FSDP"),
    "of Lightning": ("_forward_module.", "Lightning"),
    "of PEFT": ("base_model.model.", "'base_model.model.'.*PEFT"),
    "a trainer's own": ("policy.", "'policy.'.*a wrapper"),
    "a multimodal model's": ("language_model.", "'language_model.'.*a wrapper"),
    "twice": ("model.", "'model.'.*a wrapper"),
}


def check(names):
    files = WeightFiles(Path("folder"), dict.fromkeys(names, Path("folder/model.safetensors")))
    files.check(dict.fromkeys(NAMES, (1, 1)), {})


@pytest.mark.parametrize("case", CASES)
def test_prefixes_are_named_with_their_origin(case):
    prefix, said = CASES[case]
    with pytest.raises(UserError, match=said) as caught:
        check(prefix + name for name in NAMES)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="the names start with"):
        check([NAMES[0], *(prefix + name for name in NAMES[1:])])


@pytest.mark.parametrize("kept", [(), NAMES[3:]])
def test_a_model_without_its_head_and_prefix(kept):
    with pytest.raises(UserError, match=r"lack 'model\.'.*AutoModelForCausalLM"):
        check([*(name.removeprefix("model.") for name in NAMES[:3]), *kept])


def test_a_missing_head():
    with pytest.raises(UserError, match="tie_word_embeddings = false; set it to true if"):
        check(NAMES[:3])


@pytest.mark.parametrize("left", [0, 1, 2])
def test_an_incomplete_download(left):
    with pytest.raises(UserError, match=r"are missing, first .*; is the download complete"):
        check([name for i, name in enumerate(NAMES) if i != left])
