"""Fast tokenizers for the embedded models, trained on the corpus, in their families' forms."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MISTRAL_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ message['content'] }}[/INST]{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(family: str, texts: Iterable[str], vocab_size: int, folder: Path) -> Any:
    """Trains a BPE tokenizer and saves it with its chat template.

    Args:
        family: `qwen2` (byte-level BPE, ChatML) or `mistral` (SentencePiece-like BPE with byte
            fallback, `[INST]`).
        texts: the corpus.
        vocab_size: ids in all, special tokens included.
        folder: where to save.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if family == "qwen2":
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(r"'(?:s|t|m|ll|ve|re|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"),
                    "isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        texts = itertools.chain(texts, ["user", "assistant"] * 100)
        trained = _train(tokenizer, texts, vocab_size, specials, alphabet, trainers)
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        template = _QWEN_TEMPLATE
    else:
        specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
                pre_tokenizers.Punctuation("isolated"),
            ]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        texts = (f" {text}" for text in texts)  # as the template writes them
        trained = _train(tokenizer, texts, vocab_size, specials, [], trainers)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        template = _MISTRAL_TEMPLATE
    fast = PreTrainedTokenizerFast(tokenizer_object=trained, **names)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def _train(
    tokenizer: Any,
    texts: Iterable[str],
    vocab_size: int,
    specials: list[str],
    alphabet: list[str],
    trainers: Any,
) -> Any:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
