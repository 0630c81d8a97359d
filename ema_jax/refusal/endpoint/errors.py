"""Errors of an endpoint's server: about one row, or about every request.

Servers that speak OpenAI's protocol agree on codes only in part: where the code is silent, the
message decides. No part of a message is kept or shown, as it may repeat the text or the key.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ema_jax.refusal.verdicts import INVALID, JUDGE_FAILED, Verdict

TOO_LONG, FILTERED = "context_length_exceeded", "content_filter"

# Code or type → reason for which a single row is declined.
_DECLINED = {
    TOO_LONG: TOO_LONG,
    "string_above_max_length": "string_above_max_length",
    "exceed_context_size_error": TOO_LONG,  # llama.cpp
    FILTERED: FILTERED,  # Azure
    "content_policy_violation": "content_policy_violation",
    "ResponsibleAIPolicyViolation": FILTERED,  # Azure, within
    "data_inspection_failed": FILTERED,  # Model Studio
}
_ROW_STATUSES = (400, 403, 413, 422)
_CODE = re.compile(r"[a-z_]{1,40}")

# "This model's maximum context length is 4096 tokens" (OpenAI, vLLM); "This endpoint's maximum
# context length is …" (OpenRouter); "longer than the maximum model length of …" (vLLM); "the
# request exceeds the available context size" (llama.cpp); "longer than the model's context length"
# (SGLang); "`inputs` tokens + `max_new_tokens` must be <= …" (TGI); "prompt is too long: …".
_LONG = re.compile(
    r"maximum context (?:length|size|window)|context (?:length|size|window)[^.]{0,30}exceed"
    r"|exceed[^.]{0,60}context (?:length|size|window)|longer than the (?:maximum model|model's)"
    r"|(?:prompt|input) is too long|inputs?\W* tokens \+ |reduce the length of"
    r"|exceeds the maximum number of tokens",
    re.IGNORECASE,
)
# Temporary, when slots of a server share one context.
_FULL = re.compile(r"context size has been exceeded", re.IGNORECASE)
_FLAGGED = re.compile(
    r"\bflagged\b|content (?:management )?polic|content filter|response was filtered"
    r"|inappropriate content|requires moderation",
    re.IGNORECASE,
)
_LIMIT = re.compile(r"maximum context length is (\d+)", re.IGNORECASE)
_ASKED_FOR = re.compile(r"too large: (\d+)|(\d+) (?:tokens )?in the (?:completion|output)")


class PassingError(Exception):
    """A failure that may be gone on the next attempt.

    Attributes:
        wait_seconds: how long the server asks to wait.
        otherwise: verdict of the row if the failure stays; None if the run cannot continue then.
    """

    def __init__(self, what: str, wait_seconds: float = 0.0, otherwise: Verdict | None = None):
        super().__init__(what)
        self.wait_seconds, self.otherwise = wait_seconds, otherwise


def declined(reason: str) -> Verdict:
    """The verdict on a row that the server declines to judge."""
    return Verdict(INVALID, 0.0, f"{JUDGE_FAILED}declined: {reason}")


@dataclass(frozen=True)
class ServerError:
    """An error as a server reports it, however it is wrapped.

    Attributes:
        status: of HTTP, or the one named in a body that came with success.
        codes: its code, type and inner code, where they are text.
        message: in the server's words; not to be shown.
        flagged: True if moderation blocked the input.
    """

    status: int
    codes: tuple[str, ...] = ()
    message: str = ""
    flagged: bool = False

    @classmethod
    def read(cls, status: int, body: bytes) -> "ServerError":
        """Parses a body of any content."""
        try:
            return cls.of(status, json.loads(body))
        except (ValueError, RecursionError):
            return cls(status)

    @classmethod
    def of(cls, status: int, body: Any) -> "ServerError":
        """From a parsed body: OpenAI's `{"error": {…}}`, vLLM's older flat one, TGI's text."""
        outer = body if isinstance(body, Mapping) else {}
        error = outer.get("error", outer)
        if isinstance(error, str):
            error = {"message": error, "type": outer.get("error_type")}
        if not isinstance(error, Mapping):
            return cls(status)
        inner, metadata = (
            error[name] if isinstance(error.get(name), Mapping) else {}
            for name in ("innererror", "metadata")
        )
        codes = [error.get("code"), error.get("type"), inner.get("code")]
        # OpenRouter passes on the message of the provider behind it.
        words = [error.get("message"), metadata.get("raw")]
        if status == 200 and type(error.get("code")) is int:
            status = error["code"]
        return cls(
            status,
            tuple(code for code in codes if isinstance(code, str)),
            " ".join(text for text in words if isinstance(text, str)),
            any(metadata.get(name) for name in ("flagged", "flagged_input", "reasons")),
        )

    @property
    def code(self) -> str:
        """The first code that is a plain identifier, or `""`."""
        return next((code for code in self.codes if _CODE.fullmatch(code)), "")

    @property
    def declined(self) -> str:
        """Reason for which the server declines this row, or `""` if the error is not about it."""
        for code in self.codes:
            if code in _DECLINED:
                return _DECLINED[code]
        if self.status == 413:
            return "too_long"
        if self.status not in _ROW_STATUSES:
            return ""
        if self.flagged:
            return "moderation"
        if _LONG.search(self.message) and not self._answer_alone_too_long:
            return TOO_LONG
        return FILTERED if _FLAGGED.search(self.message) else ""

    @property
    def declined_in_passing(self) -> str:
        """As `declined`, for an error that may be gone on another attempt."""
        return TOO_LONG if self.status == 500 and _FULL.search(self.message) else ""

    @property
    def _answer_alone_too_long(self) -> bool:
        """True if no row would fit, because the answer asked for is longer than the context."""
        limit, asked_for = _LIMIT.search(self.message), _ASKED_FOR.search(self.message)
        if limit is None or asked_for is None:
            return False
        return int(asked_for[1] or asked_for[2]) >= int(limit[1])
