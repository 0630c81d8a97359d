"""Tokenizers from GGUF files: transformers' and the published tokenizers' tokens."""

import json
import unicodedata

import pytest
import transformers
from gguf_files import (
    CONTROL,
    QWEN2_SPLIT,
    SMOLLM_SPLITTING,
    TEXT,
    bpe_vocabulary,
    metadata,
    qwen_tokenizer,
    strings,
    write_gguf,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ema_jax.models import gguf_tokenizer
from ema_jax.models.gguf_file import GgufFile
from ema_jax.models.gguf_folder import hf_config


def tokenizers(tmp_path, tiny, vocabulary) -> tuple:
    """Ours as `AutoTokenizer` loads it, and transformers' own reading of the file."""
    changes = {key: None for key in metadata(tiny("llama")) if key.startswith("tokenizer.ggml")}
    changes |= {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()}
    path = write_gguf(tmp_path / "t.gguf", tiny("llama"), changes=changes)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    file = GgufFile.open(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(file)))
    (folder / "tokenizer.json").write_text(gguf_tokenizer.tokenizer(file).to_str())
    config = gguf_tokenizer.tokenizer_config(file)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True), theirs


def test_byte_level_tokens_are_those_of_transformers_and_of_the_original(tiny, tmp_path):
    original = qwen_tokenizer(500)
    ours, theirs = tokenizers(tmp_path, tiny, bpe_vocabulary(original, "qwen2"))
    assert len(ours) == len(theirs) == original.get_vocab_size()
    assert (ours.eos_token, ours.chat_template) == (theirs.eos_token, theirs.chat_template)
    for text in strings(800, CONTROL):
        tokens = ours(text)["input_ids"]
        assert tokens == original.encode(text).ids, repr(text)
        assert ours.decode(tokens) == original.decode(tokens, skip_special_tokens=False)
        composed = unicodedata.normalize("NFC", text)  # transformers' reading leaves that out
        assert ours(composed)["input_ids"] == theirs(composed)["input_ids"], repr(text)


def test_smollm_splits_every_digit(tiny, tmp_path):
    vocabulary = bpe_vocabulary(qwen_tokenizer(500), "smollm")
    ours, theirs = tokenizers(tmp_path, tiny, vocabulary)
    theirs.backend_tokenizer.pre_tokenizer = SMOLLM_SPLITTING
    for text in strings(800, CONTROL):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_transformers(tiny, tmp_path, prefix):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special)
    trained.train_from_iterator([w for text in TEXT for w in (text, *text.split())], trainer)
    ids = trained.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    merged = ["".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    vocabulary = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [float(-merged.index(t)) if t in merged else -1e4 for t in tokens],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": prefix,
    }
    ours, theirs = tokenizers(tmp_path, tiny, vocabulary)
    if not prefix:  # which transformers leaves out
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="never", split=False
        )
    assert ours("a")["input_ids"][0] == 1
    for text in strings(400, ("</s>",)):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
    if prefix:
        for text in TEXT:
            assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text


def test_regex_is_the_published_one():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PRETOKENIZE_REGEX == QWEN2_SPLIT
