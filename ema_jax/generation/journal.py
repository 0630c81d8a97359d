"""Responses written as they come, so that a killed run resumes where it stopped."""

from pathlib import Path

from ema_jax.runtime.append_log import AppendLog


class Journal:
    """A file of responses by index, a line each: `{"index", "tokens"}`.

    It holds model text as tokens, so whoever makes one removes it. The prompts are not in it: its
    name or folder has to distinguish it from responses to other prompts.

    Attributes:
        tokens: of each response so far, by index.

    Args:
        path: the file, made when the first response comes.
    """

    def __init__(self, path: Path):
        self._log = AppendLog(path)
        self.tokens = {row["index"]: tuple(row["tokens"]) for row in self._log.rows.values()}

    def add(self, index: int, tokens: tuple[int, ...]) -> None:
        """Records a response."""
        self.tokens[index] = tokens
        self._log.append({"index": index, "tokens": tokens})
