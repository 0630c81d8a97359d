"""Chat: templates and tokens."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from ema_jax.data import system_turns, templates
from ema_jax.errors import UserError
from ema_jax.models import token_ids
from ema_jax.runtime.files import read_json, sha256_text

# Stands for a prompt in the rendered template that results record.
_PLACEHOLDER = "PROMPT"
# Llama 3.1's template takes the date as a variable, where it is given.
_DATE_STRING = templates.DAY.strftime("%d %b %Y")
# Renderings that are compared: enough to catch one of two random texts (1 in 128 escapes).
_REPEATS = 8
_KEPT = 1 << 14  # prompts whose tokens are kept


class TokenExample(NamedTuple):
    """A rendered prompt and a response to it, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.response)

    def cut(self, tokens: int) -> "TokenExample":
        """The example with at most so many tokens of its response."""
        return TokenExample(self.prompt, self.response[:tokens])


@dataclasses.dataclass(frozen=True)
class Chat:
    """A checkpoint's tokenizer and chat template, with every choice made explicit.

    Attributes:
        tokenizer: a transformers fast tokenizer.
        eos_ids: every id that ends a response.
        system_prompt: text of a system message; None adds none, also where the template would
            insert its own (Qwen2.5's does).
        left_out: the system turn of its own that the template renders and that is left out.
        enable_thinking: the variable of that name in templates such as Qwen3's: whether the model
            may think before it answers.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]
    system_prompt: str | None = None
    left_out: str = ""
    enable_thinking: bool = False

    @classmethod
    def load(
        cls, folder: str | Path, system_prompt: str | None = None, enable_thinking: bool = False
    ) -> "Chat":
        """Reads the tokenizer of a checkpoint folder, and tries its template.

        Raises:
            UserError: no fast tokenizer, no chat template or one that fails, a system prompt that
                the template refuses or drops, thinking where the template knows no such choice, or
                no end-of-sequence token.
        """
        folder = Path(folder)
        tokenizer = load_tokenizer(folder)
        if not tokenizer.chat_template:
            raise UserError(f"{folder}: the tokenizer has no chat template; use an instruct model")
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise UserError(
                f"{folder}: several chat templates and none named default "
                f"({', '.join(tokenizer.chat_template)}); save the one to use as "
                "chat_template.jinja"
            )
        if enable_thinking and "enable_thinking" not in str(tokenizer.chat_template):
            raise UserError(
                f"{folder}: the chat template has no enable_thinking; leave it unset (a model that "
                "always thinks needs no setting)"
            )
        chat = cls(
            tokenizer,
            eos_ids(folder, tokenizer),
            system_prompt,
            enable_thinking=enable_thinking,
        )
        chat._try_template(folder)
        if system_prompt is None:
            left_out = system_turns.own_turn(folder, chat._apply, tokenizer)
            chat = dataclasses.replace(chat, left_out=left_out)
        chat._warn_of_endless_responses(folder)
        logging.info(
            "chat template of %s: %r (sha256 %s)", folder.name, chat.template, chat.template_hash
        )
        if chat.left_out:
            logging.info(
                "its own system turn is left out: %r (model.system_prompt sets one)", chat.left_out
            )
        return chat

    @staticmethod
    def check(folder: str | Path) -> None:
        """Refuses a checkpoint folder without a fast tokenizer, before anything is loaded."""
        if not (Path(folder) / "tokenizer.json").exists():
            raise UserError(
                f"{folder}: no tokenizer.json; a fast tokenizer is needed (save one with "
                "AutoTokenizer.from_pretrained(…).save_pretrained)"
            )

    def _try_template(self, folder: Path) -> None:
        """Refuses a template that fails, or drops or changes what it is given."""
        user, system = self._probes("user", "system")
        messages = [{"role": "user", "content": user}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            texts = {self._apply(messages) for _ in range(_REPEATS)}
        except templates.TemplateError as error:
            if self.system_prompt is None:
                raise
            raise UserError(
                f"{folder}: the chat template takes no system message ({error.what}); "
                "leave system_prompt unset"
            ) from None
        if len(texts) > 1:
            raise UserError(
                f"{folder}: the chat template renders one prompt in several ways; remove what is "
                "random from it"
            )
        (text,) = texts
        if user not in text:
            raise UserError(f"{folder}: the chat template drops the prompt; correct it")
        if self.system_prompt is not None and system not in text:
            raise UserError(
                f"{folder}: the chat template drops the system message; leave system_prompt "
                "unset, or write it into the prompts"
            )

    def _warn_of_endless_responses(self, folder: Path) -> None:
        """Warns where the template ends a response otherwise than generation does."""
        user, answer = self._probes("user", "assistant")
        try:
            _, _, after = self.render(user, answer).partition(answer)
        except templates.TemplateError:  # one for prompts alone: `example` says so where it matters
            return
        if not set(self._encode(after)) & set(self.eos_ids):
            names = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(list(self.eos_ids))))
            ending = repr(after) if after else "nothing"
            logging.warning(
                "%s: the chat template ends a response with %s, which holds no end-of-sequence "
                "token (%s): responses may run to max_new_tokens; name the turn's end as "
                "eos_token_id in generation_config.json",
                folder,
                ending,
                names,
            )

    @property
    def pad_id(self) -> int:
        """Token of padded positions; masked everywhere, so any id will do."""
        return self.eos_ids[0]

    def render(self, prompt: str, response: str | None = None) -> str:
        """The text that the model sees: up to where its response starts, or with a response."""
        messages = [{"role": "user", "content": prompt}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return self._apply(messages).replace(self.left_out, "", 1)

    def conversation(self, messages: list[dict[str, str]], opened: bool) -> str:
        """Several turns as the model sees them; `opened`: up to where the next response starts."""
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        text = self._apply(messages, opened)
        return text if messages[0]["role"] == "system" else text.replace(self.left_out, "", 1)

    def _apply(self, messages: list[dict[str, str]], opened: bool | None = None) -> str:
        return templates.render(
            self.tokenizer,
            messages,
            add_generation_prompt=messages[-1]["role"] != "assistant" if opened is None else opened,
            date_string=_DATE_STRING,
            enable_thinking=self.enable_thinking,
        )

    def prompt_tokens(self, prompt: str) -> tuple[int, ...]:
        """Token ids of the rendered prompt; the template brings its own special tokens."""
        return self._prompt_tokens(prompt)

    @functools.cached_property
    def _prompt_tokens(self) -> Callable[[str], tuple[int, ...]]:
        # A study asks the same prompts of every model, and a template is rendered elsewhere.
        return functools.lru_cache(_KEPT)(lambda prompt: self._encode(self.render(prompt)))

    def example(self, prompt: str, response: str) -> TokenExample:
        """Token ids of a prompt and of a response up to the first end-of-sequence token.

        Raises:
            UserError: the template does not render a response after its own prompt.
        """
        before = self.render(prompt)
        after = self._continuation(before, self.render(prompt, response))
        start, both = self._encode(before), self._encode(before + after)
        # Some tokenizers would merge the prompt's last characters with the response's first ones,
        # which a model that continues the prompt cannot do.
        tokens = both[len(start) :] if both[: len(start)] == start else self._encode(after)
        ends = [i for i, token in enumerate(tokens) if token in self.eos_ids]
        return TokenExample(start, tokens[: ends[0] + 1] if ends else tokens)

    def _continuation(self, before: str, both: str) -> str:
        """The text that a conversation has after its prompt: the response and the turn's end.

        Mistral's templates write the system message into the last user turn, and only if nothing
        follows it. The model under study has seen it there: what differs before the user's text is
        the prompt's.
        """
        if both.startswith(before):
            return both[len(before) :]
        user, answer = self._probes("user", "assistant")
        opening, _, closing = self.render(user).partition(user)
        shorter, found, rest = self.render(user, answer).partition(user)
        if before.startswith(opening) and found and rest.startswith(closing):
            turn = shorter + before[len(opening) :]
            if both.startswith(turn):
                return both[len(turn) :]
        raise UserError(
            "the chat template renders a prompt differently once it has a response; "
            "use a template whose generation prompt is a prefix of the conversation"
        )

    def _probes(self, *names: str) -> list[str]:
        return system_turns.probes(self.tokenizer.get_chat_template(), *names)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, without special tokens."""
        return self._encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def template(self) -> str:
        """The template rendered around a placeholder."""
        return self.render(_PLACEHOLDER)

    @property
    def template_hash(self) -> str:
        """SHA-256 of `template`."""
        return sha256_text(self.template)


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a checkpoint folder.

    Raises:
        UserError: there is none, it cannot be read or brings code, or it has ids that the model has
            no rows for.
    """
    # It would advise to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    Chat.check(folder)
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a")  # some of its settings are looked at only here
    except Exception as error:  # the tokenizers library raises plain ones
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: the tokenizer brings code of its own, which is not run; if its "
                "tokenizer.json is complete, set tokenizer_class in tokenizer_config.json to "
                "PreTrainedTokenizerFast and remove auto_map there"
            ) from None
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({first_line(error)}); download it again"
        ) from None
    rows = _model_config(folder).get("vocab_size")
    if isinstance(rows, int):
        # Also tokens that transformers adds while it loads, which no file gives an id.
        token_ids.check_largest(folder, *token_ids.largest_of(tokenizer.get_vocab()), rows)
    return tokenizer


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    return config if isinstance(config, dict) else {}


def eos_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's end-of-sequence id and those that the configs name.

    `config.json` counts where `generation_config.json` names none, as in transformers.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    path = folder / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    named = config.get("eos_token_id") if isinstance(config, dict) else "no JSON object"
    if named is None:
        path, named = folder / "config.json", _model_config(folder).get("eos_token_id")
    named = [] if named is None else named if isinstance(named, list) else [named]
    largest, _ = token_ids.largest_of(tokenizer.get_vocab())
    if not all(type(i) is int and 0 <= i <= largest for i in named):
        raise UserError(f"{path}: eos_token_id is {named}, expected ids of the tokenizer")
    ids += named
    if not ids:
        raise UserError(f"{folder}: the tokenizer names no end-of-sequence token")
    return tuple(dict.fromkeys(ids))


def first_line(error: Exception) -> str:
    """The first line of another library's error message."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
