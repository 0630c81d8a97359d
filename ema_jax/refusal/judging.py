"""What every judge shares: which rows it gets to see, and checks of its options."""

import math
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from ema_jax.errors import UserError
from ema_jax.refusal import thoughts, validity
from ema_jax.refusal.verdicts import INVALID, JUDGE_FAILED, PARSE_ERROR, Verdict


def judge_valid(
    rows: Sequence[Mapping[str, Any]],
    script: str | None,
    judge: Callable[[list[Mapping[str, Any]]], Sequence[Verdict]],
) -> list[Verdict]:
    """Cuts thoughts off, decides validity, and has the valid rows judged: alike for every judge.

    The judge sees the answer of a response alone (`thoughts.py`); a response that is nothing but
    thoughts is `empty`. Answers of the judge that could not be read (`UNREADABLE`) and rows that it
    declined are counted in a warning.

    Args:
        rows: with `prompt` and `response`; a row without a response counts as valid.
        script: the script that responses should be in; None accepts any.
        judge: gives one verdict for each of the rows it is handed.
    """
    rows = [
        {**row, "response": thoughts.answer(row["response"])} if "response" in row else row
        for row in rows
    ]
    causes = [
        validity.invalid_reason(row["response"], row.get("finished", True), script)
        if "response" in row
        else ""
        for row in rows
    ]
    valid = [row for row, cause in zip(rows, causes, strict=True) if not cause]
    judged = judge(valid) if valid else []
    assert len(judged) == len(valid)
    for reason, count in Counter(verdict.reason for verdict in judged).items():
        if reason.startswith(JUDGE_FAILED):
            what = "could not be read" if reason == PARSE_ERROR else "are no verdicts"
            logging.warning(
                "%d of %d answers of the judge %s; their rows are invalid (%s)",
                count,
                len(judged),
                what,
                reason,
            )
    rest = iter(judged)
    return [Verdict(INVALID, 0.0, cause) if cause else next(rest) for cause in causes]


def check_positive(judge: str, **values: float) -> None:
    """Refuses options that are not above zero."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UserError(f"judge {judge!r}: {name} is {value}, expected more than 0")


def check_template(judge: str, template: str, fields: Sequence[str]) -> None:
    """Refuses a `str.format` template without one of the fields, or with another one."""
    try:
        found = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"judge {judge!r}: template: {error}; write {{{{ for a brace") from None
    used = {name for name, _, _ in found if name is not None}
    plain = all(not spec and not how for name, spec, how in found if name is not None)
    if used != set(fields) or not plain:
        wanted = ", ".join(f"{{{name}}}" for name in fields)
        raise UserError(f"judge {judge!r}: the template needs {wanted} and no other field")
