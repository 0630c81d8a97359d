"""Chat: templates, tokens, masks, and padded batches."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ema_jax.artifacts import read_json, sha256_text
from ema_jax.errors import UserError

_DEFAULT_SYSTEM_MARK = "<|im_start|>system"


class TokenExample(NamedTuple):
    """A rendered prompt and a response to it, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


class Batch(NamedTuple):
    """Padded rows for one forward pass."""

    tokens: Int[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]  # real tokens
    response: Bool[np.ndarray, "B T"]  # tokens of the response, its end-of-sequence included


@dataclasses.dataclass(frozen=True)
class Chat:
    """A checkpoint's tokenizer and chat template, with every choice made explicit.

    Attributes:
        tokenizer: a transformers fast tokenizer.
        eos_ids: every id that ends a response.
        system_prompt: text of a system message; None adds none, also where the template would
            slip in one of its own (Qwen2.5's does).
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]
    system_prompt: str | None = None

    @classmethod
    def load(cls, folder: str | Path, system_prompt: str | None = None) -> "Chat":
        """Reads the tokenizer of a checkpoint folder.

        Raises:
            UserError: no fast tokenizer, no chat template, or no end-of-sequence token.
        """
        import transformers

        folder = Path(folder)
        cls.check(folder)
        transformers.logging.set_verbosity_error()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer.chat_template:
            raise UserError(f"{folder}: the tokenizer has no chat template; use an instruct model")
        ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        if (folder / "generation_config.json").exists():
            named = read_json(folder / "generation_config.json").get("eos_token_id") or []
            ids += named if isinstance(named, list) else [named]
        if not ids:
            raise UserError(f"{folder}: the tokenizer names no end-of-sequence token")
        return cls(tokenizer, tuple(dict.fromkeys(ids)), system_prompt)

    @staticmethod
    def check(folder: str | Path) -> None:
        """Refuses a checkpoint folder without a fast tokenizer, before anything is loaded."""
        if not (Path(folder) / "tokenizer.json").exists():
            raise UserError(
                f"{folder}: no tokenizer.json; a fast tokenizer is needed (save one with "
                "AutoTokenizer.from_pretrained(…).save_pretrained)"
            )

    @property
    def pad_id(self) -> int:
        """What padded places hold; masked everywhere, so any id will do."""
        return self.eos_ids[0]

    def render(self, prompt: str, response: str | None = None) -> str:
        """The text that the model sees: up to where its response starts, or with a response."""
        messages = [{"role": "user", "content": prompt}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=response is None
        )
        if self.system_prompt is None and _DEFAULT_SYSTEM_MARK in text.split(prompt)[0]:
            text = text[text.index("<|im_start|>user") :]
        return text

    def prompt_tokens(self, prompt: str) -> tuple[int, ...]:
        """Token ids of the rendered prompt; the template brings its own special tokens."""
        return self._encode(self.render(prompt))

    def example(self, prompt: str, response: str) -> TokenExample:
        """Token ids of a prompt and of a response up to the first end-of-sequence token.

        Raises:
            UserError: the template does not render a response after its own prompt.
        """
        before, whole = self.prompt_tokens(prompt), self._encode(self.render(prompt, response))
        if whole[: len(before)] != before:
            raise UserError(
                "the chat template renders a prompt differently once it has a response; "
                "use a template whose generation prompt is a prefix of the conversation"
            )
        after = whole[len(before) :]
        ends = [i for i, token in enumerate(after) if token in self.eos_ids]
        return TokenExample(before, after[: ends[0] + 1] if ends else after)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def template_hash(self) -> str:
        """SHA-256 of the rendered template around a placeholder."""
        return sha256_text(self.render("PROMPT"))


def pad_prompts(
    prompts: Sequence[Sequence[int]], length: int, rows: int, pad_id: int
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Left-padded `(tokens, mask)`; missing rows repeat the last prompt."""
    tokens = np.full((rows, length), pad_id, np.int32)
    mask = np.zeros((rows, length), bool)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


def pad_examples(
    examples: Sequence[TokenExample], length: int, rows: int, pad_id: int
) -> Batch:
    """A right-padded batch; missing rows are empty, with no token of a response."""
    tokens = np.full((rows, length), pad_id, np.int32)
    mask, response = np.zeros((rows, length), bool), np.zeros((rows, length), bool)
    for row, item in enumerate(examples):
        size, start = len(item.prompt) + len(item.response), len(item.prompt)
        tokens[row, :size] = item.prompt + item.response
        mask[row, :size] = True
        response[row, start:size] = True
    return Batch(tokens, mask, response)


def bucket(length: int, multiple: int = 16) -> int:
    """The padded length of a bucket: few distinct ones, so that few programs are compiled."""
    return -(-length // multiple) * multiple


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, so that memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
