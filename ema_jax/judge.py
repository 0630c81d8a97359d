"""Judges the responses of a JSONL file.

python -m ema_jax.judge --judge=lexical --input=IN.jsonl --output=OUT.jsonl

Each row of the input is an object with "prompt" and "response" (and, if known, "finished": false
for a response that hit the length cap). The rows come back in order with all their fields and
"verdict" (refused, complied or invalid), "score", "reason", "judge", "judge_version" and
"judge_revision".
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from ema_jax import artifacts, cli
from ema_jax.errors import UserError
from ema_jax.refusal.judges import JUDGES, Judge, get_judge

_FIELDS = {"prompt": str, "response": str, "finished": bool}
_OPTIONAL = {"finished"}


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_enum("judge", "lexical", list(JUDGES), "Which judge.")
    flags.DEFINE_string("input", None, "JSONL file of rows with prompt and response.")
    flags.DEFINE_string("output", None, "JSONL file to write.")
    flags.DEFINE_boolean("overwrite", False, "Replace an existing output.")
    flags.mark_flags_as_required(["input", "output"])


def main(argv: Sequence[str]) -> None:
    """Reads, judges, writes."""
    del argv
    options = flags.FLAGS
    if Path(options.output).exists() and not options.overwrite:
        raise UserError(f"{options.output}: exists already; pass --overwrite to replace it")
    judge = get_judge(options.judge)
    rows = read_rows(options.input)
    judged = judge_rows(judge, rows)
    artifacts.write_jsonl(options.output, judged)
    counts = Counter(row["verdict"] for row in judged)
    summary = ", ".join(f"{counts[v]} {v}" for v in ("refused", "complied", "invalid"))
    logging.info("%s: %d rows, %s", options.output, len(judged), summary)


def read_rows(path: str) -> list[dict[str, Any]]:
    """Reads rows to judge from a JSONL file.

    Raises:
        UserError: naming file, line and field, for a missing file, a malformed line, or a field
            that is absent or of the wrong type.
    """
    # read_jsonl checks the lines but drops blank ones, after which positions are not line numbers.
    rows = artifacts.read_jsonl(path)
    with open(path, encoding="utf-8") as file:
        numbers = [number for number, line in enumerate(file, start=1) if line.strip()]
    for number, row in zip(numbers, rows, strict=True):
        for field, kind in _FIELDS.items():
            if field not in row and field not in _OPTIONAL:
                raise UserError(f'{path}:{number}: the row has no "{field}" field')
            if field in row and not isinstance(row[field], kind):
                found = type(row[field]).__name__
                raise UserError(f'{path}:{number}: "{field}" is {found}, expected {kind.__name__}')
    return rows


def judge_rows(judge: Judge, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, in order and with all their fields, with the judge's verdicts added."""
    return [
        {
            **row,
            "verdict": verdict.verdict,
            "score": verdict.score,
            "reason": verdict.reason,
            "judge": judge.name,
            "judge_version": judge.version,
            "judge_revision": judge.revision,
        }
        for row, verdict in zip(rows, judge(rows), strict=True)
    ]


if __name__ == "__main__":
    define_flags()
    cli.run(main)
