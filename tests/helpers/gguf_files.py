"""Tiny checkpoints as GGUF files, written with the gguf package as llama.cpp's converter does."""

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, TokenType
from safetensors.numpy import load_file
from tiny_models import VOCABULARY, read_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

Q = GGMLQuantizationType
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT = (
    "The quick brown fox doesn't jump over 12 lazy dogs; it's resting in the shade.",
    "How do I write a letter to my landlord about the heating, please?",
    "def area(x):\n    return x ** 2  # square\n",
    "naïve café über straße, 東京 日本語 你好, привет мир, שלום",
    "I'm sorry, but I can't help with that request. Is there anything else?",
)
# Of the published tokenizer; transformers' reading of a GGUF file does not know it.
SMOLLM_SPLITTING = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter (`LlamaModel.permute`) orders them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def stored(value: np.ndarray, kind: Q) -> tuple[np.ndarray, Q]:
    """A matrix quantised where the kind's blocks fit into its rows; everything else in float32."""
    if value.ndim < 2 or value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Q.F32
    return gguf.quants.quantize(np.ascontiguousarray(value), kind), kind


def arrays(folder: Path, kind: Q) -> dict[str, np.ndarray]:
    """The checkpoint's tensors after a round trip through a kind, by Hugging Face's names."""
    found = {}
    for name, value in load_file(folder / "model.safetensors").items():
        data, used = stored(value, kind)
        found[name] = gguf.quants.dequantize(data, used).reshape(value.shape)
    return found


def qwen_tokenizer(size: int) -> Tokenizer:
    """A byte-level BPE tokenizer as Qwen2's published one is built."""
    result = Tokenizer(models.BPE())
    result.normalizer = normalizers.NFC()
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(CONTROL), initial_alphabet=ByteLevel.alphabet()
    )
    result.train_from_iterator(TEXT * 3, trainer)
    return result


def bpe_vocabulary(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """`tokenizer.ggml.*` of a byte-level BPE tokenizer."""
    content = json.loads(tokenizer.to_str())
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [
            int(TokenType.CONTROL if token in CONTROL else TokenType.NORMAL) for token in tokens
        ],
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "padding_token_id": ids["<|endoftext|>"],
        "add_bos_token": False,
    }


def tiny_vocabulary() -> dict[str, Any]:
    """A vocabulary for the tiny models: single bytes and no merge worth the name."""
    tokens = [*CONTROL, *sorted(ByteLevel.alphabet())[: VOCABULARY - 4], "ab"]
    types = [int(TokenType.CONTROL)] * len(CONTROL) + [int(TokenType.NORMAL)] * (
        VOCABULARY - len(CONTROL)
    )
    return {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": types,
        "merges": ["a b"],
        "eos_token_id": 2,
        "bos_token_id": 0,
    }


def metadata(folder: Path) -> dict[str, Any]:
    """The keys of an architecture that llama.cpp's converter writes."""
    config = read_config(folder)
    kind = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    values = {
        "general.name": config["model_type"],
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": heads,
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{kind}.attention.key_length": head_dim,
        f"{kind}.attention.value_length": head_dim,
        f"{kind}.rope.dimension_count": head_dim,
        f"{kind}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        f"{kind}.vocab_size": config["vocab_size"],
        "tokenizer.chat_template": CHATML,
    }
    vocabulary = tiny_vocabulary()
    return {
        "general.architecture": kind,
        **values,
        **{f"tokenizer.ggml.{name}": v for name, v in vocabulary.items()},
    }


def write_gguf(
    path: Path,
    folder: Path,
    kind: Q = Q.F32,
    changes: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Writes a tiny checkpoint as GGUF.

    Args:
        path: to write.
        folder: the checkpoint, with one safetensors file.
        kind: of the matrices whose rows allow it.
        changes: of the metadata; None removes a key.
        extra: float32 tensors to add.
        without: tensors to leave out.
    """
    values = metadata(folder) | (changes or {})
    architecture = values.pop("general.architecture")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        _add(writer, key, value)
    config = read_config(folder)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"]
    )  # the same names as the others', and two more
    permutes = config["model_type"] in ("llama", "mistral")
    for name, value in load_file(folder / "model.safetensors").items():
        stem, _, end = name.rpartition(".")
        if permutes and stem.endswith(("q_proj", "k_proj")):
            which = "num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"
            value = permuted(value, config[which])
        data, used = stored(value, kind)
        if f"{names.get_name(stem)}.{end}" not in without:
            writer.add_tensor(f"{names.get_name(stem)}.{end}", data, raw_dtype=used)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def strings(count: int, special: tuple[str, ...] = ()) -> list[str]:
    """Random texts of words, digits, special tokens, white space and characters of all scripts."""
    generator = random.Random(0)
    words = [*" ".join(TEXT).split(), *special, "2024-05-06", "3.14", "½", "🙂", "\t", "e\u0301"]
    spaces = (" ", " ", " ", "", "  ", "\n", "\r\n", "\n\n  ")
    made = []
    for _ in range(count):
        parts = [generator.choice(words) + generator.choice(spaces) for _ in range(12)]
        made.append("".join(parts[: generator.randint(1, 12)]))
    ranges = ((0, 0x250), (0x370, 0x5FF), (0x900, 0x97F), (0x3040, 0x9FFF), (0x1F300, 0x1F6FF))
    for _ in range(count // 4):
        chosen = [generator.randint(*generator.choice(ranges)) for _ in range(20)]
        made.append("".join(map(chr, chosen)))
    return made
