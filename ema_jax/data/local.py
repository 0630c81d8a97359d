"""Prompts from the user's own files: JSONL, CSV or Parquet in one schema.

| column | |
|---|---|
| `prompt` | required: the text, not empty, at most `max_chars` characters |
| `domain` | required: any name; `benign` is the contrast |
| `id` | optional, unique over all files; default: a hash of the prompt |
| `split` | optional: harvest, retain, dev, eval or concept; such a row keeps its split |
| `source` | optional: where the prompt comes from; default: the file's name |
| `group` | optional: variants of one prompt share it and never part over splits; default: the id |
| `category` | optional: a finer label within the domain, for forecasts by sub-category |
| `contrast` | optional: the prompt rewritten to be benign, for `concepts.contrast = "matched"` |

Other columns are ignored. A path may be a file or a folder of such files.
"""

import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ema_jax.data.domains import SPLITS, Row
from ema_jax.errors import UserError
from ema_jax.runtime.files import parse_json, sha256_text
from ema_jax.runtime.opening import open_file, read_bytes

COLUMNS = ("prompt", "domain", "id", "split", "source", "group", "category", "contrast")
REQUIRED = ("prompt", "domain")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_local(path: str | Path, *, max_chars: int = 8000) -> list[Row]:
    """Reads a prompt file, or every prompt file of a folder in the order of their names.

    Raises:
        UserError: naming the file and the line (the row, in Parquet) that is malformed.
    """
    rows: list[Row] = []
    places: dict[str, str] = {}
    for file in _files(Path(path)):
        for place, record in _READERS[file.suffix.lower()](file):
            row = parse_record(record, place, file.stem, max_chars)
            if record.get("id") is not None:
                if row.id in places:
                    raise UserError(
                        f"{place}: id {row.id!r:.80} was used before, at {places[row.id]}; "
                        "give every row its own id"
                    )
                places[row.id] = place
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: no prompts in it; it needs rows with {', '.join(REQUIRED)}")
    return rows


def parse_record(record: Mapping[str, Any], place: str, source: str, max_chars: int) -> Row:
    """One row of the schema above; `place` is its file and line, for messages."""
    for column in REQUIRED:
        if record.get(column) is None:
            found = ", ".join(str(key) for key in record)
            raise UserError(f"{place}: column {column!r} is missing (found: {found:.200})")
    for column in COLUMNS:
        value = record.get(column)
        if column in ("id", "group") and isinstance(value, int) and not isinstance(value, bool):
            continue
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}: {column!r} must be text, found {value!r:.40}")
        if value is not None and _SURROGATE.search(value):
            raise UserError(f"{place}: {column!r} holds an unpaired surrogate; store valid UTF-8")
        if (
            column not in ("split", "category", "contrast")
            and value is not None
            and not value.strip()
        ):
            raise UserError(f"{place}: {column!r} is empty; fill it in or remove the row")
    prompt, split = record["prompt"], record.get("split") or None
    if len(prompt) > max_chars:
        raise UserError(
            f"{place}: 'prompt' has {len(prompt):,} characters, more than max_chars={max_chars:,}; "
            "shorten it or raise max_chars"
        )
    if split is not None and split not in SPLITS:
        raise UserError(f"{place}: unknown split {split!r:.40}; use one of {', '.join(SPLITS)}")
    key = record.get("id")
    name = str(key) if key is not None else f"{source}/{sha256_text(prompt)[:16]}"
    group, category = record.get("group"), (record.get("category") or "").strip()
    return Row(
        id=name,
        domain=record["domain"].strip(),
        prompt=prompt,
        source=record.get("source") or source,
        group=str(group) if group is not None else name,
        categories=(category,) if category else (),
        contrast=(record.get("contrast") or "").strip(),
        split=split,
    )


def _files(path: Path) -> list[Path]:
    known = ", ".join(_READERS)
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such prompt file or folder; set prompts.path to one")
    if os.path.isdir(path):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READERS)
        if not files:
            raise UserError(f"{path}: no prompt files in this folder; it needs {known}")
        return files
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path}: unknown file type {path.suffix!r}; use {known}")
    return [path]


def _decode(path: Path) -> str:
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None


Records = Iterator[tuple[str, Mapping[str, Any]]]


def _jsonl(path: Path) -> Records:
    # Not splitlines(): JSON strings may hold U+2028, which it would split at.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {line.strip()!r:.40}")
        yield f"{path}:{number}", record


def _csv(path: Path) -> Records:
    reader = csv.DictReader(io.StringIO(_decode(path), newline=""), strict=True)

    def parsed(read: Callable[[], Any]) -> Any:
        place = f"{path}:{reader.line_num + 1}"
        try:
            return read()
        except csv.Error as error:
            if "field limit" in str(error):
                raise UserError(
                    f"{place}: a cell has over 131,072 characters, the most of CSV; shorten it, or "
                    "close the quotation mark before it"
                ) from None
            raise UserError(f"{place}: not valid CSV ({error})") from None

    _check_columns(parsed(lambda: reader.fieldnames) or (), f"{path}:1")
    while True:
        place = f"{path}:{reader.line_num + 1}"
        record = parsed(lambda: next(reader, None))
        if record is None:
            return
        if None in record or None in record.values():
            raise UserError(f"{place}: the row and the header differ in their number of columns")
        # An empty cell is how CSV writes "not given".
        yield (
            place,
            {key: value if key in REQUIRED else value or None for key, value in record.items()},
        )


def _check_columns(names: Sequence[str], place: str) -> None:
    for column in REQUIRED:
        if column not in names:
            found = ", ".join(names) or "nothing"
            raise UserError(f"{place}: column {column!r} is missing from the header ({found:.200})")
    for column in COLUMNS:
        if list(names).count(column) > 1:
            raise UserError(f"{place}: column {column!r} stands twice in the header; remove one")


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as file:
            table = pyarrow.parquet.read_table(file)
        _check_columns(table.column_names, str(path))
        wanted = [column for column in COLUMNS if column in table.column_names]
        records = table.select(wanted).to_pylist()
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: not UTF-8; write its text and the names of its columns as UTF-8"
        ) from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        kind = type(error).__name__
        raise UserError(f"{path}: not a readable Parquet file ({kind})") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}: row {number}", record


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
