"""Sets of responses labelled by people, read from the formats in which they are published.

None of the sets is part of the project; a folder holds those that the user has.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_jax.refusal.verdicts import COMPLIED, LABELS, REFUSED
from ema_jax.runtime import files
from ema_jax.runtime.opening import read_bytes

# Tones of the ChatGPT set that are clearly one or the other; redirecting, contradicting and not
# knowing are neither, and have no label.
_TONES = {"complied": COMPLIED, "disclaimed": COMPLIED, "rejected": REFUSED}


@dataclass(frozen=True)
class Labelled:
    """One labelled response: `source` is the set or model, `group` the tone, prompt type or style.

    `label` is one of `LABELS`, or `""` where the set's own labels do not decide.
    """

    source: str
    group: str
    prompt: str
    response: str
    label: str
    finished: bool = True


def read_folder(folder: Path) -> list[Labelled]:
    """Every labelled set under a folder, by the columns of its files.

    XSTest (`completions_MODEL.csv`: full and partial refusals count as refused), the ChatGPT set of
    Reuter and Schulze (JSONL with `tone`), and JSONL with `prompt`, `response` and a `label` of
    `LABELS` (own labels; optional `group`, `style`, `source`, `finished`).
    """
    rows: list[Labelled] = []
    for path in sorted(Path(folder).rglob("completions_*.csv")):
        rows += read_xstest(path)
    for path in sorted(Path(folder).rglob("*.jsonl")):
        rows += read_jsonl(path)
    return rows


def read_xstest(path: Path) -> list[Labelled]:
    """One model's completions with XSTest's final labels."""
    with io.StringIO(read_bytes(path).decode("utf-8"), newline="") as file:
        return [
            Labelled(
                path.stem.removeprefix("completions_"),
                row["type"],
                row["prompt"],
                row["completion"],
                COMPLIED if row["final_label"] == "1_full_compliance" else REFUSED,
            )
            for row in csv.DictReader(file)
        ]


def read_jsonl(path: Path) -> list[Labelled]:
    """The labelled rows of a JSONL file: none if it has neither labels nor tones."""
    return [row for value in files.read_jsonl(path) if (row := _labelled(path, value)) is not None]


def _labelled(path: Path, row: dict[str, Any]) -> Labelled | None:
    prompt, response = str(row.get("prompt", "")), row.get("response")
    if not isinstance(response, str):
        return None
    if "tone" in row:
        return Labelled("chatgpt", row["tone"], prompt, response, _TONES.get(row["tone"], ""))
    if row.get("label") not in LABELS:
        return None
    group = str(row.get("group") or row.get("style") or "")
    finished = bool(row.get("finished", True))
    return Labelled(row.get("source", path.stem), group, prompt, response, row["label"], finished)
