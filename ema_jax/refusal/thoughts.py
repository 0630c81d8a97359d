"""The answer of a response without the train of thought before it.

A reasoning model thinks first, between markers that differ by family. Its thoughts are no answer:
a thought of declining is no refusal. Judges read the rest; the response itself stays unchanged.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_WORDS = (
    "think|thinking|thoughts?|reasoning|reflect|reflection|rationale|scratchpad|"
    "(?:inner|internal)[ _-]?monologue|chain[ _-]of[ _-]thought|cot"
)
_S = r"[\s|]{0,3}"  # blanks and bars, as in <|think|>; bounded, so that no text is slow to search
_NAME = rf"{_S} (?: \w{{1,20}} : )? (?: {_WORDS} ) {_S}"
# <think>, <seed:think>, <|thinking|>, [THINK], and the names that single families use.
_OPENS = rf"""
    < {_NAME} >
  | \[ {_S} THINK {_S} \]
  | <\| (?: begin_of_thought | START_THINKING ) \|>
  | <\|channel> \s? (?: thought | analysis )
  | <unused94> (?: thought )?
  | ◁ {_S} think {_S} ▷
"""
_CLOSES = rf"""
    < {_S} / {_NAME} >
  | \[ {_S} / {_S} THINK {_S} \]
  | <\| (?: end_of_thought | END_THINKING ) \|>
  | <channel\|>
  | <unused95>
  | ◁ {_S} / {_S} think {_S} ▷
"""
_FLAGS = re.IGNORECASE | re.VERBOSE
_MARKER = re.compile(rf"(?P<opens>{_OPENS})|(?P<closes>{_CLOSES})", _FLAGS)

# Code may name a marker: fenced blocks, and spans between backticks of one line.
_CODE = re.compile(r"```.*?```|~~~.*?~~~|(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)", re.DOTALL)
_QUOTES = "\"'“”‘’«»"

# What may stand around an answer as a whole.
_WRAPPERS = "answer|response|output|solution|final|final_answer"
_ANSWER_OPENS = re.compile(
    rf"\s* (?: < (?: {_WRAPPERS} ) > | <\| (?: begin_of_solution | START_RESPONSE ) \|> )", _FLAGS
)
_ANSWER_CLOSES = re.compile(
    rf"(?: < / (?: {_WRAPPERS} ) > | <\| (?: end_of_solution | END_RESPONSE ) \|> ) \s* \Z", _FLAGS
)

# gpt-oss names a channel before each message; only the final one is for the user. A decoder that
# drops special tokens leaves the names: analysis…assistantfinal….
_MESSAGE = re.compile(
    r"<\|channel\|>\s?(?P<channel>\w{1,20})(?: [^<]{0,80})?(?:<\|constrain\|>\w{0,20})?"
    r"<\|message\|>"
    r"(?P<text>.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
_BARE_CHANNELS = re.compile(r"\s*analysis(?=\S).*?assistantfinal", re.DOTALL)
# Granite 3.2 marks its thoughts in words.
_IN_WORDS = re.compile(
    r"\s*(?:here is|here's) my thought process:(?:.*?(?:here is|here's) my response:|.*\Z)",
    re.DOTALL | re.IGNORECASE,
)


class _Marker(NamedTuple):
    start: int
    end: int
    opens: bool
    quoted: bool


def answer(text: str) -> str:
    """The response without its thoughts; `""` if it is nothing but thoughts.

    Thoughts run from an opening marker to the one that closes it or else to the end, and from the
    start to a closing marker that none opened (chat templates may open the thought themselves). A
    marker inside code or quotation marks, and an unclosed opening one in the middle of a line, is
    one that the answer talks about and stays.

    A text without thoughts is returned unchanged.
    """
    messages = list(_MESSAGE.finditer(text))
    if messages and not _is_code(text, messages[0].start()):
        final = [m["text"].strip() for m in messages if m["channel"].lower() == "final"]
        return "\n".join(final)
    for pattern in (_BARE_CHANNELS, _IN_WORDS):
        if found := pattern.match(text):
            return text[found.end() :].strip()
    return _unwrapped(_without_thoughts(text))


def _without_thoughts(text: str) -> str:
    markers = list(_markers(text))
    kept, position, cut, index = "", 0, False, 0
    while index < len(markers):
        marker, index = markers[index], index + 1
        if marker.quoted:
            continue
        if marker.opens:
            closing = _closing(markers, index - 1)
            if closing is None and not _starts_line(text, marker.start):
                continue
            kept += text[position : marker.start]
            position = len(text) if closing is None else markers[closing].end
            index = len(markers) if closing is None else closing + 1
        elif not cut:
            position = marker.end  # the chat template opened this thought
        elif _is_line(text, marker):
            kept += text[position : marker.start]  # some models close once more
            position = marker.end
        else:
            continue
        cut = True
    return (kept + text[position:]).strip() if cut else text


def _closing(markers: list[_Marker], opening: int) -> int | None:
    """The marker that closes a thought: the one that balances it, or else the last there is."""
    for also_quoted in (False, True):  # a thought may quote its marker, or leave a block open
        depth, last = 0, None
        for index, marker in enumerate(markers[opening:], start=opening):
            if marker.quoted and not also_quoted:
                continue
            depth += 1 if marker.opens else -1
            last = last if marker.opens else index
            if depth == 0:
                return index
        if last is not None:
            return last
    return None


def _markers(text: str) -> Iterator[_Marker]:
    code = [(m.start(), m.end()) for m in _CODE.finditer(text)]
    for match in _MARKER.finditer(text):
        start, end = match.span()
        in_code = any(a <= start and end <= b for a, b in code)
        quoted = start > 0 and end < len(text) and text[start - 1] in _QUOTES
        quoted = in_code or (quoted and text[end] in _QUOTES)
        yield _Marker(start, end, match["opens"] is not None, quoted)


def _is_code(text: str, position: int) -> bool:
    return any(m.start() <= position < m.end() for m in _CODE.finditer(text))


def _starts_line(text: str, start: int) -> bool:
    return not text[text.rfind("\n", 0, start) + 1 : start].strip()


def _is_line(text: str, marker: _Marker) -> bool:
    after = text[marker.end :].partition("\n")[0]
    return _starts_line(text, marker.start) and not after.strip()


def _unwrapped(text: str) -> str:
    """Without the marker that opens an answer as a whole, and the one that closes it."""
    opening = _ANSWER_OPENS.match(text)
    if opening is None:
        return text
    text = text[opening.end() :]
    closing = _ANSWER_CLOSES.search(text)
    return (text[: closing.start()] if closing else text).strip()
