"""Opening files that others made: regular ones alone, and every fault of the system in one line."""

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ema_jax.errors import UserError

_KINDS: dict[Callable[[int], bool], str] = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def open_file(path: str | os.PathLike) -> io.BufferedReader:
    """Opens a regular file for reading: nothing that would block, or never end.

    Raises:
        UserError: there is none, it is something else (a folder, a pipe, a device), or it cannot
            be opened.
    """
    try:
        # A pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{other_spelling(path)}") from None
    except (OSError, ValueError) as error:  # a name with a null character
        there = kind(path)
        reason = f"is {there}, and a file is needed" if there else why(error)
        raise UserError(f"{path}: {reason}") from None
    there = kind(descriptor)
    if there:
        os.close(descriptor)
        raise UserError(f"{path}: is {there}, and a file is needed")
    return open(descriptor, "rb")


def kind(path: str | os.PathLike | int) -> str:
    """What stands in a file's place, in words; "" where it is a file, or cannot be seen."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    return next((name for asks, name in _KINDS.items() if asks(mode)), "")


def other_spelling(path: str | os.PathLike) -> str:
    """Names a file that differs in capitals alone, to add to "no such file"; "" without one."""
    path = Path(path)
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return ""
    alike = [name for name in names if name.casefold() == path.name.casefold()]
    found = [name for name in alike if name != path.name]
    return f" (but {found[0]}: rename it to {path.name})" if found else ""


def why(error: Exception) -> str:
    """The reason that an error of the system gives, without the name of the file."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_bytes(path: str | os.PathLike) -> bytes:
    """Reads a file (`open_file`).

    Raises:
        UserError: it cannot be read.
    """
    with open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path}: {why(error)}") from None


def fill(memory: memoryview, file: io.FileIO, start: int) -> bool:
    """Reads a file from a byte on until memory is full; whether the file was long enough."""
    file.seek(start)
    while len(memory):
        count = file.readinto(memory)
        if not count:
            return False
        memory = memory[count:]
    return True
