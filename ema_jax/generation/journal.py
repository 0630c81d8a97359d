"""Responses written as they come, so that a killed run resumes where it stopped."""

from pathlib import Path
from typing import Any

from ema_jax.errors import UserError
from ema_jax.runtime.append_log import AppendLog


class Journal:
    """A file of responses by index, a line each: `{"index", "tokens"}`.

    It holds model text as tokens, so whoever makes one removes it. The prompts are not in it: its
    name or folder has to distinguish it from responses to other prompts.

    Attributes:
        tokens: of each response so far, by index.

    Args:
        path: the file, made when the first response comes.

    Raises:
        UserError: a line of the file is something else. One that a kill cut short is left out.
    """

    def __init__(self, path: Path):
        self._log = AppendLog(path)
        self.tokens: dict[int, tuple[int, ...]] = {}
        for number, row in self._log.rows.items():
            index, tokens = row.get("index"), row.get("tokens")
            whole = isinstance(tokens, list) and all(map(_whole, [index, *tokens]))
            if not whole:
                raise UserError(
                    f"{path}:{number}: not a response of a study; delete the file (its responses "
                    "are generated again)"
                )
            self.tokens[row["index"]] = tuple(row["tokens"])

    def add(self, index: int, tokens: tuple[int, ...]) -> None:
        """Records a response."""
        self.tokens[index] = tokens
        self._log.append({"index": index, "tokens": tokens})


def _whole(value: Any) -> bool:
    """Whether a value can be an index or a token id."""
    return type(value) is int and 0 <= value < 2**31
