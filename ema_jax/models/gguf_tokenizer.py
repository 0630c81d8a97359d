"""Tokenizers from the vocabulary in a GGUF file: `tokenizer.json` and `tokenizer_config.json`.

A GGUF file holds tokens, merges or scores, and the names of a tokenizer's kind (`model`) and of the
way it splits text (`pre`); the rest follows from these. Sources: llama.cpp's `llama-vocab.cpp`, and
the published tokenizers. (transformers reads such files too, but only with PyTorch installed, and
leaves out NFC and `ignore_merges`.)
"""

import dataclasses
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ema_jax.errors import UserError
from ema_jax.models.gguf_file import GgufFile

# Kinds of tokens (`tokenizer.ggml.token_type`) that are found whole in a text.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Splitting:
    """How a byte-level BPE tokenizer prepares text before it merges."""

    pattern: str | None = None  # GPT-2's, which the library has built in
    digits: bool = False  # each on its own, before the pattern
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token is not merged up to

    def pre_tokenizer(self) -> Any:
        byte_level = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=self.pattern is None
        )
        steps: list[Any] = [byte_level]
        if self.pattern is not None:
            steps.insert(0, pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        if self.digits:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        return pre_tokenizers.Sequence(steps)


SPLITTINGS = {
    "gpt-2": _Splitting(),
    "smollm": _Splitting(digits=True),
    "llama-bpe": _Splitting(_LLAMA3, ignore_merges=True),
    "tekken": _Splitting(_TEKKEN, ignore_merges=True),
    "qwen2": _Splitting(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Splitting(_QWEN2),
}
"""By `tokenizer.ggml.pre`."""


def tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        UserError: no vocabulary, or one of a kind that is not known here.
    """
    kind = file.get("tokenizer.ggml.model", str, ...)
    tokens = _texts(file, "tokens")
    if kind == "gpt2":
        result = _byte_level(file, tokens)
    elif kind == "llama":
        result = _sentencepiece(file, tokens)
    else:
        raise UserError(
            f"{file.path}: its tokenizer is of the kind {kind!r}, which is not supported (gpt2: "
            "byte-level BPE; llama: SentencePiece)"
        )
    types = _numbers(file, "token_type", len(tokens))
    special = [
        token
        for token, type_ in zip(tokens, types, strict=True)
        if type_ == _CONTROL or (type_ == _UNKNOWN and kind == "llama")
    ]
    result.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    whole = [token for token, kind_ in zip(tokens, types, strict=True) if kind_ == _USER_DEFINED]
    result.add_tokens([AddedToken(t, normalized=False, special=False) for t in whole])
    bos = file.get("tokenizer.ggml.bos_token_id", int)
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", bool, kind == "llama"):
        token = _token(file, tokens, "tokenizer.ggml.bos_token_id")
        result.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, bos)]
        )
    return result


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`: special tokens and chat template."""
    tokens = _texts(file, "tokens")
    config: dict[str, Any] = {
        # Not the family's own class: that one would build its parts again.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in _SPECIAL.items():
        if key in file.metadata:
            config[name] = _token(file, tokens, key)
    template = file.get("tokenizer.chat_template", str)
    return config if template is None else {**config, "chat_template": template}


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    pre = file.get("tokenizer.ggml.pre", str, "default")
    if pre not in SPLITTINGS:
        raise UserError(
            f"{file.path}: its tokenizer splits text as {pre!r} (tokenizer.ggml.pre); known are "
            f"{', '.join(SPLITTINGS)}; convert the model to GGUF again, or use its safetensors"
        )
    merges = _merges(file)
    splitting = SPLITTINGS[pre]
    result = _bpe(file, tokens, merges, ignore_merges=splitting.ignore_merges)
    if splitting.nfc:
        result.normalizer = normalizers.NFC()
    result.pre_tokenizer = splitting.pre_tokenizer()
    result.decoder = decoders.ByteLevel()
    return result


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    if "tokenizer.ggml.merges" in file.metadata:
        merges = _merges(file)
    else:
        merges = _merges_by_score(tokens, _numbers(file, "scores", len(tokens)))
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    result = _bpe(file, tokens, merges, fuse_unk=True, byte_fallback=True)
    result.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first" if prefix else "never", split=False
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    result.decoder = decoders.Sequence(steps)
    return result


def _bpe(
    file: GgufFile, tokens: list[str], merges: list[tuple[str, str]], **options: bool
) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # the library raises plain ones
        raise UserError(
            f"{file.path}: its vocabulary and merges do not fit ({str(error)[:200]}); download it "
            "again"
        ) from None


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    parts = (merge.partition(" ") for merge in _texts(file, "merges"))
    return [(left, right) for left, _, right in parts]


def _merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply: the best token first, however it is split."""
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(-score, -len(left), -len(right), (left, right)) for left, right in known]
    found.sort(key=lambda row: row[:3])
    return [row[3] for row in found]


def _texts(file: GgufFile, name: str) -> list[str]:
    values = file.get(f"tokenizer.ggml.{name}", list, ...)
    if not values or not isinstance(values[0], str):
        raise UserError(f"{file.path}: tokenizer.ggml.{name} holds no text; download it again")
    return values


def _numbers(file: GgufFile, name: str, count: int) -> list[Any]:
    values = file.get(f"tokenizer.ggml.{name}", list, ...)
    if len(values) != count or isinstance(values[0], str):
        raise UserError(
            f"{file.path}: tokenizer.ggml.{name} has no number for each of the {count} tokens; "
            "download it again"
        )
    return values


def _token(file: GgufFile, tokens: list[str], key: str) -> str:
    number = file.get(key, int, ...)
    if not 0 <= number < len(tokens):
        raise UserError(
            f"{file.path}: {key} is {number}, and there are {len(tokens)} tokens; download it again"
        )
    return tokens[number]
