"""Cache of an endpoint's answers: an append-only JSONL file, so that nothing is paid for twice."""

import dataclasses
import json
import os
import threading

from absl import logging

from ema_jax.errors import UserError
from ema_jax.refusal.verdicts import HARMFUL, HARMLESS, VERDICTS, Verdict
from ema_jax.runtime.files import check_writable, parse_json

_START = '{"hash": "'


class AnswerCache:
    """Verdicts by the hash of endpoint, model, template and row. Holds no text.

    Each answer is one line, written as soon as it arrives. A line that a killed run left unfinished
    is skipped; its row is asked for again.

    Args:
        path: the file, created with the first answer; None keeps answers in memory.

    Raises:
        UserError: the file exists and is not such a cache.
    """

    def __init__(self, path: str | None):
        self._path, self._lock = path, threading.Lock()
        self.verdicts: dict[str, Verdict] = {}
        self._torn = False
        if path is not None and os.path.exists(path):
            self._read(path)

    @classmethod
    def check(cls, path: str) -> None:
        """Refuses a file that is no cache or not writable, before any answer is paid for.

        Raises:
            UserError: naming the file.
        """
        check_writable(path)
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise UserError(f"{path}: cannot be written; name another file")
        cls(path)

    def add(self, key: str, verdict: Verdict) -> None:
        """Stores an answer; safe to call from several threads."""
        fields = dataclasses.asdict(verdict)
        if verdict.harm is None:
            del fields["harm"]
        line = json.dumps({"hash": key, **fields}) + "\n"
        with self._lock:
            self.verdicts[key] = verdict
            if self._path is not None:
                os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write("\n" + line if self._torn else line)
                self._torn = False

    def _read(self, path: str) -> None:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", errors="replace")
        unfinished = 0
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            head = min(len(line), len(_START))
            if line[:head] != _START[:head]:
                raise UserError(f"{path}:{number}: not a cache of this judge; name another file")
            try:
                row = parse_json(line)
                score, reason = float(row["score"]), row["reason"]
                verdict = Verdict(row["verdict"], score, reason, row.get("harm"))
            except (ValueError, KeyError, TypeError):
                unfinished += 1
                continue
            known = verdict.verdict in VERDICTS and verdict.harm in (HARMFUL, HARMLESS, None)
            if not known:
                raise UserError(f"{path}:{number}: no such verdict; remove the line")
            self.verdicts[row["hash"]] = verdict
        self._torn = bool(text) and not text.endswith("\n")
        if unfinished:
            logging.warning("%s: %d unfinished lines passed over", path, unfinished)
