"""Responses written as they come, so that a killed run goes on where it stopped."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax

from ema_jax.artifacts import write_text


class Journal:
    """A file of responses by index, a line each: `{"index", "tokens"}`.

    It holds what the model said, so whoever makes one removes it. What was asked is not in it: its
    name or folder has to tell it from the answers to other questions. Of several processes the
    first one writes.

    Args:
        path: the file, made when the first response comes.
    """

    def __init__(self, path: Path):
        self._path = path
        self.tokens = dict(self._read())

    def add(self, index: int, tokens: tuple[int, ...]) -> None:
        """Writes a response down."""
        self.tokens[index] = tokens
        if jax.process_index() == 0:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(index, tokens))

    def _read(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill in the middle of a line
            write_text(self._path, whole)
        for line in whole.splitlines():
            row = json.loads(line)
            yield row["index"], tuple(row["tokens"])


def _line(index: int, tokens: tuple[int, ...]) -> str:
    return json.dumps({"index": index, "tokens": tokens}) + "\n"
