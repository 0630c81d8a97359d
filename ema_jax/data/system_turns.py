"""The system turn that a chat template writes of its own accord."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ema_jax.data.templates import TemplateError
from ema_jax.errors import UserError

# What a template may write before the first turn, besides the tokenizer's own token.
_OPENINGS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
# A turn's marker has no more ("### Instruction:"); a sentence has.
_MARKER_WORDS = 3

Apply = Callable[..., str]  # of (messages, whether the next response is opened)


def probes(template: str, *names: str) -> list[str]:
    """A word for each name that the template does not hold, nor one the other."""
    found = []
    for name in names:
        word = f"zq{name}zq"
        while word.lower() in template.lower():
            word += "zq"
        found.append(word)
    return found


def own_turn(folder: Path, apply: Apply, tokenizer: Any) -> str:
    """The text that a template puts before the first user turn, to be left out; mostly none.

    A later user turn of a conversation shows how one opens where no system turn stands before it.
    What the first has beyond that, special tokens at the start apart, is the template's own.

    Raises:
        UserError: there is a system message of the template's own that cannot be separated.
    """
    source = tokenizer.get_chat_template()
    user, answer, later, system = probes(source, "user", "assistant", "later", "system")
    text = apply([{"role": "user", "content": user}])
    head = text.partition(user)[0]
    first, opening = _openings(apply, user, answer, later)
    found = ""
    if opening is not None:
        start = _start(head, tokenizer)
        clean = opening if opening.startswith(start) else start + opening
        found = _inserted(head, clean, len(opening))
        if not _words(found, tokenizer) or head.replace(found, "", 1) != clean:
            found = ""
    rest = text.replace(found, "", 1)
    more = _words(rest.partition(user)[0], tokenizer) - _words(opening or "", tokenizer)
    if (
        _holds_message(rest, apply, user, system)
        or (first is not None and first != head)
        or more > _MARKER_WORDS
    ):
        raise UserError(
            f"{folder}: the chat template adds a system message of its own that cannot be left "
            "out; set system_prompt, or remove it from the template"
        )
    return found


def _openings(
    apply: Apply, user: str, answer: str, later: str
) -> tuple[str, str] | tuple[None, None]:
    """What stands before the first and before the second user turn of a conversation.

    None where that cannot be seen, as in templates of single turns.
    """
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    try:
        one = apply(turns, False)
        two = apply([*turns, {"role": "user", "content": later}], False)
    except TemplateError:
        return None, None
    closing = one.partition(answer)[2]
    first, has_user, _ = two.partition(user)
    between, has_later, _ = two.partition(answer)[2].partition(later)
    if not has_user or not has_later or not between.startswith(closing):
        return None, None
    return first, between.removeprefix(closing)


def _start(head: str, tokenizer: Any) -> str:
    known = (tokenizer.bos_token, *_OPENINGS)
    return next((token for token in known if token and head.startswith(token)), "")


def _inserted(head: str, clean: str, most: int) -> str:
    """What was put into `clean`, in one piece, to make `head`; nothing if that is not so.

    It is put as far to the front as can be, before the last `most` characters or within them.
    """
    size = len(head) - len(clean)
    if size <= 0:
        return ""
    kept = 0  # at the end
    while kept < most and clean[-1 - kept] == head[-1 - kept]:
        kept += 1
    before = len(clean) - kept
    return head[before : before + size] if head.startswith(clean[:before]) else ""


def _words(text: str, tokenizer: Any) -> int:
    """Number of words in a text besides special tokens, which are marks of a format."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, " ")
    return len(re.findall(r"\w+", text))


def _holds_message(text: str, apply: Apply, user: str, system: str) -> bool:
    """Whether something stands in `text` just where a given system message would."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        given = apply(messages)
    except TemplateError:  # no system role
        return False
    opening, found, closing = given.partition(system)
    longer = len(text) > len(opening) + len(closing)
    return bool(found and longer and text.startswith(opening) and text.endswith(closing))
