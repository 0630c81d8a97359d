"""Responses written as they come, so that a killed run goes on where it stopped."""

import json
from pathlib import Path

from ema_jax.runtime import distributed


class Journal:
    """A file of responses by index, a line each: `{"index", "tokens"}`.

    It holds what the model said, so whoever makes one removes it. What was asked is not in it: its
    name or folder has to tell it from the answers to other questions. Of several processes, which
    have the same responses at the same time, the first one writes.

    Args:
        path: the file, made when the first response comes.
    """

    def __init__(self, path: Path):
        self._path = path
        self.tokens: dict[int, tuple[int, ...]] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # A kill in the middle of a line leaves a part of one, and its response is asked for again.
        self._before = "" if text.endswith("\n") or not text else "\n"
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.tokens[row["index"]] = tuple(row["tokens"])

    def add(self, index: int, tokens: tuple[int, ...]) -> None:
        """Writes a response down."""
        self.tokens[index] = tokens
        if distributed.is_first():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                line = json.dumps({"index": index, "tokens": tokens})
                file.write(f"{self._before}{line}\n")
        self._before = ""
