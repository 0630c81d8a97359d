"""Append-only logs: rows that survive a kill as soon as they are written."""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ema_jax.runtime import distributed
from ema_jax.runtime.files import parse_json
from ema_jax.runtime.opening import read_bytes


class AppendLog:
    """A file of JSON objects, one a line, that is only ever appended to.

    A kill in the middle of a line leaves part of one, which is set apart on reading; the next row
    starts on a line of its own. Rows may be added from several threads. Of several processes, which
    add the same rows, the first one writes.

    Attributes:
        rows: objects that were there at the start, by line number.
        torn: text of all other lines, by line number.

    Args:
        path: the file, made when the first row is added.

    Raises:
        UserError: something else is there, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self._path, self._lock = Path(path), threading.Lock()
        self.rows: dict[int, dict[str, Any]] = {}
        self.torn: dict[int, str] = {}
        data = read_bytes(path) if os.path.lexists(path) else b""
        self._separator = "\n" if data and not data.endswith(b"\n") else ""
        for number, line in enumerate(data.decode("utf-8", errors="replace").split("\n"), start=1):
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                self.rows[number] = row
            elif line.strip():
                self.torn[number] = line

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; NaN and infinity are refused."""
        line = json.dumps(dict(row), allow_nan=False)
        if not distributed.is_first():
            return
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text, self._separator = f"{self._separator}{line}\n", "\n"
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(text)
            self._separator = ""  # else the disk is full, and the line may be torn
