"""The two ways in which a command ends other than well, and their exit codes."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad config, input or environment: exit code 2.

    The message is one line that says what is wrong, where, and how to fix it. Raised before any
    expensive work.
    """

    exit_code = 2

    def __str__(self) -> str:
        """One line: names out of files may hold line breaks."""
        return super().__str__().replace("\n", "\\n").replace("\r", "\\r")


class RunStoppedError(Exception):
    """A run that stopped itself with its state kept (non-finite loss, SIGTERM): exit code 3."""

    exit_code = 3


class AskedToStopError(RunStoppedError):
    """A run that SIGTERM or Ctrl-C ended with its state kept: it is to be resumed."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of the known names that was probably meant: in other case, cut short, or mistyped."""
    typed = word.strip().lower()
    lower = {name.lower(): name for name in known}
    starts = [name for name in lower if name.startswith(typed) and len(typed) > 1]
    swapped = [name for name in lower if sorted(name) == sorted(typed)]
    close = difflib.get_close_matches(typed, lower, n=1)  # of the whole word: 0.6 alike or more
    found = [typed] if typed in lower else [*swapped, *close, *(starts if len(starts) == 1 else ())]
    return lower[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message that refuses a word: `; did you mean 'x'?`, or nothing."""
    name = closest(word, known)
    return f"; did you mean {name!r}?" if name else ""
