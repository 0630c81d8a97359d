"""The ids that end a response, wherever a checkpoint names them."""

import json

import pytest
from tiny_tokenizers import write_tokenizer

from ema_jax.data.chat import Chat
from ema_jax.errors import UserError

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML = TURNS.replace("END", "<|im_end|>")

# (config.json, generation_config.json, tokenizer's) → expected, by the tokens' names
NAMED = {
    "config alone": ("<|im_end|>", None, "</s>", ("</s>", "<|im_end|>")),
    "config with a list": (["<|im_end|>", "</s>"], None, "</s>", ("</s>", "<|im_end|>")),
    "config and no tokenizer": ("<|im_end|>", None, None, ("<|im_end|>",)),
    "generation config silent": ("<|im_end|>", {}, "</s>", ("</s>", "<|im_end|>")),
    "generation config null": (
        "<|im_end|>",
        {"eos_token_id": None},
        "</s>",
        ("</s>", "<|im_end|>"),
    ),
    "generation config first": ("<s>", "<|im_end|>", "</s>", ("</s>", "<|im_end|>")),
    "both": ("<|im_end|>", "<|im_end|>", "</s>", ("</s>", "<|im_end|>")),
    "config the same": ("</s>", None, "</s>", ("</s>",)),
    "config null": (None, None, "</s>", ("</s>",)),
    "no config at all": ("none", None, "</s>", ("</s>",)),
}


@pytest.mark.parametrize("name", NAMED)
def test_every_id_is_honoured(tmp_path, name):
    config, generation, own, expected = NAMED[name]
    tokenizer = write_tokenizer(tmp_path, CHATML, "<s>", own)

    def ids(named):
        return tokenizer.convert_tokens_to_ids(named) if named else named

    if config != "none":
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ids(config)}))
    if generation is not None:
        found = generation if isinstance(generation, dict) else {"eos_token_id": ids(generation)}
        (tmp_path / "generation_config.json").write_text(json.dumps(found))
    assert Chat.load(tmp_path).eos_ids == tuple(ids(list(expected)))


@pytest.mark.parametrize("named", [9999, -1, "</s>", [True], [1, "x"], 1.5, {"a": 1}])
def test_what_is_no_id_is_refused(tmp_path, named):
    write_tokenizer(tmp_path, CHATML)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(UserError, match=r"config\.json: eos_token_id is .* expected ids of the"):
        Chat.load(tmp_path)


ENDS = {
    "another token": (TURNS.replace("END", "<|eot_id|>"), True),
    "text": (TURNS, True),
    "nothing": ("{% for m in messages %}{{ m.content }}{% endfor %}", True),
    "its own": (CHATML, False),
    "text and its own": (TURNS.replace("END", "\n.<|im_end|>"), False),
    "no responses": (
        "{{ raise_exception('no') if messages | length > 1 }}{{ messages[0].content }}",
        False,
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_turn_that_ends_otherwise_is_said(tmp_path, caplog, name):
    template, warned = ENDS[name]
    write_tokenizer(tmp_path, template)
    Chat.load(tmp_path)
    assert ("which holds no end-of-sequence token ('<|im_end|>')" in caplog.text) is warned
