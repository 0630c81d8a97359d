"""Cache of an endpoint's answers: an append-only JSONL file, so that nothing is paid for twice."""

import dataclasses
import os

from absl import logging

from ema_jax.errors import UserError
from ema_jax.refusal.verdicts import HARMFUL, HARMLESS, VERDICTS, Verdict
from ema_jax.runtime.append_log import AppendLog
from ema_jax.runtime.files import check_writable

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
        self.verdicts: dict[str, Verdict] = {}
        self._log: AppendLog | None = None
        if path is not None:
            self._log = AppendLog(path)
            self._read(self._log, path)

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
        self.verdicts[key] = verdict
        if self._log is not None:
            self._log.append({"hash": key, **fields})

    def _read(self, log: AppendLog, path: str) -> None:
        others = [n for n, line in log.torn.items() if not line.startswith(_START[: len(line)])]
        others += [n for n, row in log.rows.items() if next(iter(row), "") != "hash"]
        if others:
            raise UserError(f"{path}:{others[0]}: not a cache of this judge; name another file")
        unfinished = len(log.torn)
        for number, row in log.rows.items():
            try:
                score, reason = float(row["score"]), row["reason"]
                verdict = Verdict(row["verdict"], score, reason, row.get("harm"))
                hash(row["hash"]), hash(verdict)
            except (ValueError, KeyError, TypeError):
                unfinished += 1
                continue
            known = verdict.verdict in VERDICTS and verdict.harm in (HARMFUL, HARMLESS, None)
            if not known:
                raise UserError(f"{path}:{number}: no such verdict; remove the line")
            self.verdicts[row["hash"]] = verdict
        if unfinished:
            logging.warning("%s: %d unfinished lines skipped", path, unfinished)
