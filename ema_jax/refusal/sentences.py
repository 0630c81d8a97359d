"""Normalised sentences of a response, as the lexical judge reads them."""

import json
import re
from typing import Any

# Words read of a sentence: text with no full stop for longer is no sentence, and time is bounded.
MAX_WORDS = 120

_QUOTES = str.maketrans(
    dict.fromkeys("’‘ʼ´`′＇‛", "'") | dict.fromkeys("“”„‟«»「」＂", '"') | {"–": "-", "—": "-"}
)
# Contractions written out, those without their apostrophe as well.
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\b(ca|do|wo|is|are|does|did|could|would|should|was|were|has|have)nt\b", r"\1n't"),
        (r"\bcan'(?!t\b)(?= \w)", "can't"),
        (r"\bi ?m\b", "i'm"),
        (r"\bive\b", "i've"),
        (r"\b(?:cannot|can't)", "can not"),
        (r"\bwon't\b", "will not"),
        (r"\bshan't\b", "shall not"),
        (r"n't\b", " not"),
        (r"'m\b", " am"),
        (r"'re\b", " are"),
        (r"'ll\b", " will"),
        (r"'d\b", " would"),
        (r"'ve\b", " have"),
        (r"\b(it|that|there|here|what|let)'s\b", r"\1 is"),
        (r"\b(is|are|was|were) (n't|not)\b", r"\1 not"),
    ]
]
_FENCE = re.compile(r"^\s*```\w*\n(.*?)\n?```\s*$", re.DOTALL)
_SPEAKER = re.compile(
    r"^\W*(?:(?:assistant|response|reply|answer|my (?:reply|answer)(?: is)?)\s*:)\s*", re.IGNORECASE
)
_QUOTED = re.compile(r"\"[^\"]{12,}\"")
_MARKUP = re.compile(r"(?m)^\s*(?:#{1,6} |> ?|-{3,}\s*$)|[*_`~]{1,3}(?=\S)|(?<=\S)[*_`~]{1,3}")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=\S)|\s*\n+\s*|(?<=\w): (?=\w)|; ")
_PLEASANTRY = re.compile(
    r"\W*(?:hello|hi|hey|thank you|thanks|good question|great question|ha\b|oof|hmm|okay|wait)"
    r"(?!.*\b(?:but|however|not)\b)"
)


def sentences(response: str) -> list[str]:
    """The sentences of a response in lower case: quotation marks straight, contractions written
    out, markup removed.

    A reply that is JSON or stands in quotation marks as a whole is unwrapped; other quotations are
    another's words and are omitted.
    """
    text = _unwrap(response.translate(_QUOTES).strip())
    text = _MARKUP.sub("", _QUOTED.sub('""', text)).lower()
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    found = [" ".join(s.split()[:MAX_WORDS]) for s in _SENTENCE_END.split(text)]
    found = [s for s in found if any(c.isalnum() for c in s)]
    while len(found) > 1 and _PLEASANTRY.match(found[0]):
        found.pop(0)
    return found


def _unwrap(text: str) -> str:
    fenced = _FENCE.match(text.replace("'''", "```"))
    inner = fenced.group(1) if fenced else text
    if inner[:1] in "{[":
        try:
            return "\n".join(_strings(json.loads(inner)))
        except (ValueError, RecursionError):
            pass
    text = _SPEAKER.sub("", text)
    if (
        len(text) > 1
        and text[0] == text[-1]
        and text[0] in "\"'"
        and text[0] not in text[1:-1].replace("n't", "")
    ):
        return text[1:-1]
    return text


def _strings(value: Any) -> list[str]:
    """The texts in a JSON value; a true flag named for refusing adds "refused"."""
    if isinstance(value, dict):
        found = []
        for key, item in value.items():
            if item is True and re.match(r"refus|declin|denied|blocked", str(key).lower()):
                found.append("refused")
            found += _strings(item)
        return found
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value.replace("_", " ")] if isinstance(value, str) else []
