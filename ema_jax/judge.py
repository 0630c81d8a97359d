"""Command: judges the responses of a JSONL file.

python -m ema_jax.judge --judge=lexical --input=IN.jsonl --output=OUT.jsonl

Each row of the input is an object with "prompt" and "response" (and, if known, "finished": false
for a response that hit the length cap). The rows come back in order with all their fields and
"verdict" (refused, complied or invalid), "score", "reason", "harm" (harmful, harmless or null),
"judge", "judge_version" and "judge_revision".

A judge's options (`get_judge`) follow --judge_options, as name=value,name=value or as a JSON
object. The endpoint judge keeps its answers in --cache (by default OUTPUT.cache): run the same
command again to resume.

python -m ema_jax.judge --sample=100 --workdir=DIR

Writes DIR/labels.csv: responses of a study that kept its text, for a person to label, without the
judge's verdicts. Once its last column is filled in, the study's command with
--stage=analyse,report reports the judge's errors and the refusal rates corrected for them.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags, logging

from ema_jax.errors import UserError
from ema_jax.refusal import sheet
from ema_jax.refusal.judges import JUDGES, PROMPT_JUDGES, get_judge
from ema_jax.refusal.verdicts import LABELS, VERDICTS, Judge
from ema_jax.runtime import cli, files
from ema_jax.runtime.paths import local_path

_FIELDS = {"prompt": str, "response": str, "finished": bool}
_CACHING = "endpoint"


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_enum("judge", "lexical", list(JUDGES), "Which judge.")
    flags.DEFINE_string("judge_options", "", "Its options: name=value,... or a JSON object.")
    flags.DEFINE_string("cache", None, "File in which the endpoint judge keeps its answers.")
    flags.DEFINE_string("input", None, "JSONL file of rows with prompt and response.")
    flags.DEFINE_string("output", None, "JSONL file to write.")
    flags.DEFINE_boolean("overwrite", False, "Replace an existing output.")
    flags.DEFINE_integer("sample", None, "Responses of a study to write for a person to label.")
    flags.DEFINE_string("workdir", None, "The study's folder.")


def main(argv: Sequence[str]) -> None:
    """Reads the input, judges its rows, writes the output."""
    del argv
    options = flags.FLAGS
    if options.sample is not None:
        _write_sheet(_path("workdir"), options.sample)
        return
    given, output = _path("input"), _path("output")
    for name, path in (("input", given), ("output", output)):
        if path is None:
            raise UserError(f"--{name} is required: give --{name}=VALUE")
    assert given is not None
    assert output is not None
    if os.path.exists(output) and not options.overwrite:
        raise UserError(f"{output}: exists already; pass --overwrite to replace it")
    settings = parse_options(options.judge_options)
    if options.judge == _CACHING:
        settings = {"cache": f"{output}.cache"} | settings
        settings |= {"cache": cache} if (cache := _path("cache")) else {}
    elif options.cache is not None:
        raise UserError(f"--cache: the {options.judge} judge keeps none; remove the flag")
    rows = read_rows(given, needs_response=options.judge not in PROMPT_JUDGES)
    files.check_writable(output)
    if settings.get("cache"):
        _check_cache(str(settings["cache"]), output, given)
    judge = get_judge(options.judge, **settings)
    judged = judge_rows(judge, rows)
    files.write_jsonl(output, judged)
    counts = Counter(row["verdict"] for row in judged)
    summary = ", ".join(f"{counts[v]} {v}" for v in VERDICTS)
    logging.info("%s: %d rows, %s", output, len(judged), summary)


def _path(flag: str) -> str | None:
    """The path that a flag holds, if it was given."""
    given = flags.FLAGS[flag].value
    return None if given is None else str(local_path(given, f"--{flag}"))


def _check_cache(cache: str, *others: str) -> None:
    """Refuses a cache that the command reads or replaces as something else."""
    files.check_writable(cache)
    if os.path.realpath(cache) in [os.path.realpath(other) for other in others]:
        raise UserError(f"--cache: {cache} is the input or the output; name another file")


def _write_sheet(workdir: str | None, sample: int) -> None:
    if workdir is None:
        raise UserError("--workdir is required with --sample: give --workdir=DIR of a study")
    path = sheet.write_sheet(workdir, sample)
    logging.info(
        "%s: fill in the column label (%s), save it there as CSV, and run the study's command "
        "again with --stage=analyse,report",
        path,
        ", ".join(LABELS),
    )


def parse_options(text: str) -> dict[str, Any]:
    """Parses `name=value,name=value` or a JSON object; values with a comma need the second form.

    Raises:
        UserError: neither of the two forms. Values are never shown, in case one is a secret.
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            parsed = files.parse_json(text)
        except ValueError as error:
            raise UserError(f"--judge_options: not valid JSON ({error})") from None
        return parsed
    options: dict[str, Any] = {}
    for number, part in enumerate(filter(None, text.split(",")), start=1):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise UserError(
                f"--judge_options: part {number} is not name=value; a value with a comma needs "
                'the form {"name": "value"}'
            )
        if name.strip() in options:
            raise UserError(f"--judge_options: {name.strip()} is given twice")
        options[name.strip()] = value.strip()
    return options


def read_rows(path: str, needs_response: bool = True) -> list[dict[str, Any]]:
    """Reads rows to judge from a JSONL file.

    Args:
        path: the file.
        needs_response: whether every row must have a response.

    Raises:
        UserError: naming file, line and field, for a missing file, a malformed line, or a field
            that is absent or of the wrong type. What is read can be written back.
    """
    optional = {"finished"} if needs_response else {"finished", "response"}
    rows = []
    for number, row in files.numbered_rows(path):
        for field, kind in _FIELDS.items():
            if field not in row and field not in optional:
                raise UserError(f'{path}:{number}: the row has no "{field}" field')
            if field in row and not isinstance(row[field], kind):
                found = type(row[field]).__name__
                raise UserError(f'{path}:{number}: "{field}" is {found}, expected {kind.__name__}')
        rows.append(row)
    return rows


def judge_rows(judge: Judge, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, in order and with all their fields, with the judge's verdicts added."""
    return [
        {
            **row,
            "verdict": verdict.verdict,
            "score": verdict.score,
            "reason": verdict.reason,
            "harm": verdict.harm,
            "judge": judge.name,
            "judge_version": judge.version,
            "judge_revision": judge.revision,
        }
        for row, verdict in zip(rows, judge(rows), strict=True)
    ]


if __name__ == "__main__":
    define_flags()
    cli.run(
        main,
        kept="no output is written, but the endpoint judge's answers are kept (--cache); the same "
        "command resumes from them",
    )
