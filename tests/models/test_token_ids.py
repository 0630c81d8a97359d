"""Tokenizers with more ids than the embedding has rows are refused before weights are read."""

import json

import jax
import pytest
import transformers
from tiny_models import _SIZES
from tiny_tokenizers import write_tokenizer

from ema_jax.data.chat import Chat
from ema_jax.errors import UserError
from ema_jax.lm_eval import Scorer
from ema_jax.models import checkpoint, hub, lora, token_ids
from ema_jax.refusal.judge_model import JudgeModel, Verbatim

TEMPLATE = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with exactly a row for each id."""
    folder = tmp_path_factory.mktemp("model")
    rows = len(write_tokenizer(folder, TEMPLATE, "<s>"))
    config = transformers.AutoConfig.for_model("llama", **_SIZES | {"vocab_size": rows})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _copy(folder, out):
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return json.loads((out / "config.json").read_text())["vocab_size"]


def _change(name, change):
    def changed(folder, rows):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        change(content, rows)
        path.write_text(json.dumps(content))

    return changed


def _added(content, rows):
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": rows, "content": "<new>"})


def _shrunk(folder, rows):
    write_tokenizer(folder, TEMPLATE, "<s>", more=["<one>", "<two>"])


GROWN = {
    "added in tokenizer.json": _change("tokenizer.json", _added),
    "in the vocabulary": _change("tokenizer.json", lambda c, n: c["model"]["vocab"].update(q=n)),
    "far beyond": _change("tokenizer.json", lambda c, n: c["model"]["vocab"].update(q=10**6)),
    "in added_tokens.json": _change("added_tokens.json", lambda c, n: c.update({"<new>": n})),
    "in tokenizer_config.json": _change(
        "tokenizer_config.json",
        lambda c, n: c.update(added_tokens_decoder={str(n): {"content": "<new>", "special": True}}),
    ),
    "tokens added and saved": _shrunk,
    "fewer rows": _change("config.json", lambda c, n: c.update(vocab_size=n - 1)),
}


@pytest.mark.parametrize("name", GROWN)
def test_more_ids_than_rows(folder, tmp_path, name, monkeypatch):
    rows = _copy(folder, tmp_path)
    GROWN[name](tmp_path, rows)
    monkeypatch.setattr(checkpoint, "_read_hf", lambda *a: pytest.fail("weights were read"))
    for use in (
        checkpoint.check,
        checkpoint.load,
        lambda f: hub.find(str(f)),
        lambda f: JudgeModel.find(str(f), None),
        lambda f: Scorer.load(str(f)),
    ):
        with pytest.raises(UserError, match=r"ids reach \d+ .* and the embedding has \d+ rows"):
            use(tmp_path)


@pytest.mark.parametrize("load", [Chat.load, Verbatim.of])
def test_a_token_that_only_transformers_adds(folder, tmp_path, load):
    """A pad token of no file's vocabulary gets the next id while the tokenizer is loaded."""
    _copy(folder, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[PAD]"}))
    with pytest.raises(UserError, match=r"\('\[PAD\]'\) and the embedding has"):
        load(tmp_path)


def test_as_many_ids_as_rows(folder):
    checkpoint.check(folder)
    Chat.load(folder)
    Verbatim.of(folder)


def test_an_adapter_that_brings_a_larger_tokenizer(folder, tmp_path):
    model, config = checkpoint.load(folder), lora.LoRAConfig(rank=1)
    adapted = lora.attach(model, config, jax.random.key(0))
    lora.save_peft(adapted, tmp_path / "adapter", config, str(folder))
    write_tokenizer(tmp_path / "adapter", TEMPLATE, "<s>")
    lora.load_peft(model, tmp_path / "adapter")
    write_tokenizer(tmp_path / "adapter", TEMPLATE, "<s>", more=["<new>"])
    with pytest.raises(UserError, match="'<new>'"):
        lora.load_peft(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"model": []}', '{"model": {"vocab": 3}}', '{"added_tokens": {"a": 1}}'],
)
def test_a_damaged_tokenizer_is_left_to_who_needs_it(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    token_ids.check_folder(tmp_path, 1)


def test_a_unigram_vocabulary_is_counted(tmp_path):
    vocabulary = [["a", -1.0], ["b", -2.0], ["c", -3.0]]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    token_ids.check_folder(tmp_path, 3)
    with pytest.raises(UserError, match="reach 2"):
        token_ids.check_folder(tmp_path, 2)
