"""Files of a finished study as other commands read them: checked, as they come from anywhere.

Within a study its own manifests hold what was written (`manifest.verify`); a folder that was copied
or edited has to be as the types say, so that what reads it fails in one line or not at all.
"""

import functools
import re
from pathlib import Path
from typing import Any, NotRequired

import pydantic
from typing_extensions import TypedDict  # typing's own cannot be read by pydantic before 3.12

from ema_jax.errors import UserError
from ema_jax.refusal.verdicts import VERDICTS
from ema_jax.runtime.files import read_json, read_jsonl
from ema_jax.study import schema

_SEED = re.compile("[0-9]{1,10}")


class Asked(TypedDict):
    """What is read of a row of `prompts/`."""

    id: str
    prompt: str
    sha256: str


class Judged(TypedDict):
    """What is read of a row of `responses/`; texts are there where the study keeps them."""

    id: str
    domain: str
    verdict: str
    reason: str
    group: NotRequired[str | None]


class JudgedText(Judged):
    """A row of `responses/` with its text."""

    response: str
    finished: bool
    judge: str
    score: float
    category: NotRequired[str]
    harm: NotRequired[str | None]


def read_results(workdir: Path) -> dict[str, Any]:
    """`results.json` of a study's folder, as `schema.Results` or `schema.BaselineResults` says.

    Raises:
        UserError: it is not there, is of another schema, or a field is missing or of another kind.
    """
    path = workdir / "results.json"
    if not path.is_file():
        raise UserError(f"{workdir}: no results.json in it; finish the study's analyse stage first")
    found = read_json(path)
    if not isinstance(found, dict) or found.get("schema") != schema.SCHEMA:
        raise UserError(f"{path}: not the results of a study of schema {schema.SCHEMA}")
    _check(schema.Results if "ema" in found else schema.BaselineResults, found, str(path))
    seeds = [seed for arm in found["arms"].values() for seed in arm.get("seeds", {})]
    if wrong := [seed for seed in seeds if not _SEED.fullmatch(seed)]:
        raise _changed(str(path), f"seed {wrong[0]!r} is no number")
    return found


def read_asked(workdir: Path) -> dict[str, dict[str, Any]]:
    """Rows of the prompts that were evaluated, by id; none where they are not there."""
    path = workdir / "prompts" / "eval.jsonl"
    return {row["id"]: row for row in _rows(Asked, path)} if path.is_file() else {}


def read_judged(workdir: Path, run: str, *, text: bool = False) -> list[dict[str, Any]]:
    """Rows of the responses of one run (`base`, or `ARM.seed_K`).

    Raises:
        UserError: not there, a row that is none, or one without its text, if that is asked for.
    """
    return _rows(JudgedText if text else Judged, workdir / "responses" / f"{run}.jsonl")


def _rows(kind: Any, path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    _check(list[kind], rows, str(path))
    for row in rows:
        if row.get("verdict", VERDICTS[0]) not in VERDICTS:
            said = f"verdict {row['verdict']!r} is none of {', '.join(VERDICTS)}"
            raise _changed(str(path), said)
    return rows


def _check(kind: Any, value: Any, where: str) -> None:
    try:
        _adapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _changed(where, f"{place}: {first['msg']}") from None


def _changed(where: str, what: str) -> UserError:
    return UserError(
        f"{where}: {what}; it was changed after it was written: copy it again, or delete it and "
        "run the study's command"
    )


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)
