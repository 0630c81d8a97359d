"""Prompt sets as files, just as they are published: CSV, JSON, JSON lines.

Records are mappings of column to value with all that the file has; which of them are prompts of
which domain, a row of `ema_jax.data.sources` says. Nothing is downloaded here.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ema_jax.errors import UserError
from ema_jax.runtime.files import parse_json

Record = Mapping[str, Any]


def find(path: str | Path, name: str) -> list[Path]:
    """The files of a set: the path itself, or in a folder those of the name it is published under.

    Args:
        path: a file or a folder.
        name: as published; `*` stands for what its parts differ in.

    Raises:
        UserError: nothing is there.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such prompt file or folder; set prompts.path to one")
    return sorted(path.rglob(name)) if path.is_dir() else [path]


def read_records(path: Path) -> list[Record]:
    """Reads the records of one file, by its ending; those of a nested JSON file as it nests them.

    Raises:
        UserError: it cannot be read as what it is named.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; bring the file as it was published") from None
    if path.suffix.lower() == ".csv":
        return list(_csv(path, text))
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path}: unknown file type {path.suffix!r}; use .csv, .json or .jsonl")
    try:
        made = [parse_json(text)]
    except ValueError as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        made = [_line(path, number, line) for number, line in enumerate(lines, start=1)]
    flat = made[0] if len(made) == 1 and isinstance(made[0], list) else made
    if not all(isinstance(record, dict) for record in flat):
        raise UserError(f"{path}: expected JSON objects; bring the file as it was published")
    return flat


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error})") from None


def _csv(path: Path, text: str) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise UserError(
                    f"{path}:{reader.line_num}: the row and the header differ in their number of "
                    "columns"
                )
            yield record
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def contrasts(records: list[Record]) -> Iterator[Record]:
    """CAST's rewrites, a record each: the base prompt, and every category's with its base.

    The file holds lists of objects by split, `base` and one column a category.
    """
    items = [item for record in records for items in record.values() for item in items]
    for number, item in enumerate(items):
        for category, text in item.items():
            base = "" if category == "base" else item["base"]
            yield {"prompt": text, "category": category, "group": number, "contrast": base}


def questions(records: list[Record]) -> Iterator[Record]:
    """CatQA's questions, a record each: as nested by category, or as they are."""
    for record in records:
        if "Question" in record:
            yield record
            continue
        for category, parts in record.items():
            for part, texts in parts.items():
                for text in texts:
                    yield {"Question": text, "Category": category, "Subcategory": part}
