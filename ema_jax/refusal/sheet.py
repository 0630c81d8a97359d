"""Label sheet of a study: a sample of its responses for a person to label, and its evaluation.

`write_sheet` draws responses stratified by arm, domain and verdict, and writes `DIR/labels.csv`
without the verdicts, in random order. `DIR/labels.key.json` maps each row to its response and the
probability with which it was drawn. Once the column `label` is filled in, the analyse stage reads
both (`label_results`): the judge's errors and the refusal shares corrected for them.
"""

import codecs
import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ema_jax.errors import UserError
from ema_jax.refusal.corrected import summary
from ema_jax.refusal.verdicts import LABELS, REFUSED, UNJUDGED, share
from ema_jax.runtime.files import read_json, read_jsonl, sha256_file, write_json, write_text
from ema_jax.runtime.opening import read_bytes

SHEET, KEY = "labels.csv", "labels.key.json"
COLUMNS = ("id", "arm", "seed", "domain", "prompt", "response", "label")
_TEXTS = ("id", "domain", "prompt", "response", "response_sha256", "verdict")
_BOM = "\ufeff"
_MAX_CELL = 32_000  # Excel cuts at 32,767 characters
_FORMULA = ("=", "+", "-", "@", "\t", "＝", "＋", "－", "＠")


def write_sheet(workdir: str | Path, sample: int, seed: int = 0) -> Path:
    """Writes `labels.csv` and its key.

    Every stratum of N responses gets a number of rows proportional to √N, so that small ones are
    seen too; the key holds each row's probability of being drawn.

    Args:
        workdir: a study's folder, its responses kept with text.
        sample: number of rows; all responses if there are fewer.
        seed: of the draw and of the order.

    Raises:
        UserError: no such study, responses without text, or an existing sheet.
    """
    workdir = Path(workdir)
    path = workdir / SHEET
    if sample < 1:
        raise UserError(f"--sample: {sample} rows; at least 1")
    if path.exists():
        raise UserError(f"{path}: exists already and may hold labels; move it away to sample again")
    files = sorted((workdir / "responses").glob("*.jsonl"))
    if not files:
        raise UserError(f"{workdir}: no responses/*.jsonl; --workdir is the folder of a study")
    rows = [{**row, "run": f.stem} for f in files for row in read_jsonl(f)]
    if not all("response" in row and "prompt" in row for row in rows):
        raise UserError(
            f"{workdir}: its responses were kept without text, so there is nothing to label; run "
            "the study with --config.keep_text=True in a new --workdir and sample from that"
        )
    for row in rows:
        texts = all(isinstance(row.get(field), str) for field in _TEXTS)
        if not texts or not isinstance(row.get("reason"), str | None):
            raise UserError(
                f"{workdir}/responses/{row['run']}.jsonl: {str(row.get('id'))[:80]!r} is no judged "
                "response of a study; run the study again in a new --workdir"
            )
    rows = [row for row in rows if share(row["verdict"], row["reason"]) != UNJUDGED]
    rng = np.random.default_rng(seed)
    drawn, probability = _draw([_stratum(row) for row in rows], sample, rng)
    order = rng.permutation(len(drawn))
    width = len(str(len(drawn)))
    key, lines = {}, []
    for number, i in enumerate(drawn[order], start=1):
        row, name = rows[i], f"r{number:0{width}d}"
        arm, _, of_seed = row["run"].partition(".seed_")
        shown = (name, arm, of_seed, row["domain"], row["prompt"], row["response"], "")
        lines.append([_cell(x) for x in shown])
        key[name] = {
            "run": row["run"],
            "prompt": row["id"],
            "response_sha256": row["response_sha256"],
            "probability": float(probability[i]),
        }
    out = io.StringIO(newline="")
    csv.writer(out).writerows([COLUMNS, *lines])
    write_json(workdir / KEY, key)
    # With a byte order mark, without which Excel reads the file in an eight-bit encoding.
    write_text(path, _BOM + out.getvalue())
    return path


def _stratum(row: Mapping[str, Any]) -> tuple[str, str, str]:
    arm = row["run"].partition(".seed_")[0]
    return arm, row["domain"], share(row["verdict"], row["reason"])


def _draw(
    strata: Sequence[tuple[str, str, str]], n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Systematic sampling through the strata: rows drawn, and the probability of every row."""
    sizes = Counter(strata)
    by_stratum = dict(zip(sizes, _probabilities(np.array([*sizes.values()]), n), strict=True))
    probability = np.array([by_stratum[s] for s in strata])
    shuffled = rng.permutation(len(strata))
    order = np.array(sorted(shuffled, key=lambda i: strata[i]), int)
    reached = np.floor(np.round(np.cumsum(probability[order]) + rng.random(), 9))
    chosen = np.diff(reached, prepend=0.0) > 0
    return order[chosen], probability


def _probabilities(sizes: np.ndarray, n: int) -> np.ndarray:
    """Probability of a row, by stratum of N > 0: as 1/√N, adding up to n rows in all."""
    sure = np.zeros(len(sizes), bool)
    while True:
        rest = np.where(sure, 0, sizes)
        left = max(n - sizes[sure].sum(), 0)
        probability = np.where(sure, 1.0, left / np.sqrt(sizes) / max(np.sqrt(rest).sum(), 1e-9))
        above = ~sure & (probability >= 1)
        if not above.any():
            return probability
        sure |= above


def _cell(value: Any) -> str:
    """Text that a spreadsheet shows as it is, neither computed as a formula nor truncated."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
    if len(text) > _MAX_CELL:
        text = text[:_MAX_CELL] + " … [cut]"
    return "'" + text if text.startswith("\t") or text.lstrip().startswith(_FORMULA) else text


def read_sheet(path: str | Path) -> dict[str, str]:
    """Row id → label, of the rows that have one.

    Reads the formats that spreadsheets save: UTF-8 with or without a byte order mark, UTF-16, an
    eight-bit encoding; comma, semicolon or tab between the columns. Only `id` and `label` are used.

    Raises:
        UserError: naming the line, for a missing column, an unknown label, or an id that is
            missing or repeated.
    """
    text = _decoded(read_bytes(path))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    try:
        return _labels(str(path), lines)
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num}: not readable as CSV ({error})") from None


def _labels(path: str, lines: Any) -> dict[str, str]:
    header = [name.strip().lower() for name in next(lines, [])]
    if not {"id", "label"} <= set(header):
        raise UserError(f"{path}:1: no columns id and label in the first line")
    places, labels, seen = (header.index("id"), header.index("label")), {}, set()
    for line in lines:
        if not any(cell.strip() for cell in line):
            continue
        name, label = (line[i].strip().strip("'") if i < len(line) else "" for i in places)
        where = f"{path}:{lines.line_num}"
        if not name or name in seen:
            raise UserError(f"{where}: {'id ' + name + ' stands twice' if name else 'no id'}")
        seen.add(name)
        label = label.lower().replace("-", "_").replace(" ", "_")
        if label and label not in LABELS:
            raise UserError(f"{where}: label {label!r} is none of {', '.join(LABELS)}")
        if label:
            labels[name] = label
    return labels


def _decoded(data: bytes) -> str:
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # ids and labels are ASCII; the texts are not read


def _delimiter(text: str) -> str:
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def settings(workdir: Any) -> dict[str, str]:
    """Hashes of the sheet and its key, where there is a sheet: the analyse stage reads both."""
    if not (workdir / SHEET).exists():
        return {}
    paths = {"labels": workdir / SHEET, "labels_key": workdir / KEY}
    return {name: sha256_file(path) for name, path in paths.items() if path.exists()}


def label_results(workdir: Any, runs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """`labels` and `corrected` of `results.json`; nothing without labels.

    Args:
        workdir: a study's folder.
        runs: arm → names of its response files, `base` among them; others are left out.

    Raises:
        UserError: a sheet without its key, or of responses that have changed since.
    """
    path = workdir / SHEET
    if not path.exists() or not (given := read_sheet(path)):
        return {}
    rows = [
        {**row, "arm": arm, "run": name, "share": share(row["verdict"], row["reason"])}
        for arm, names in runs.items()
        for name in names
        for row in read_jsonl(workdir / f"responses/{name}.jsonl")
    ]
    rows = [row for row in rows if row["share"] != UNJUDGED]
    found = list(_found(workdir, given, rows, {*itertools.chain(*runs.values())}))
    if not found:
        return {}
    # Labelled rows stand for the unlabelled ones too: weights add up to all responses.
    scale = len(rows) / sum(weight for *_, weight in found)
    labelled: dict[str, list[tuple[str, str, float]]] = {}
    for row, label, weight in found:
        labelled.setdefault(row["arm"], []).append((row["share"], label, weight * scale))
    counts: dict[str, dict[str, list[float]]] = {}
    items: dict[tuple[str, str], dict[str, str]] = {}  # prompt → what it is a variant of
    for row in rows:
        # Per seed: the same prompt under another seed is no further evidence.
        each = counts.setdefault(row["arm"], {}).setdefault(row["domain"], [0.0, 0.0])
        each[0] += (row["share"] == REFUSED) / len(runs[row["arm"]])
        each[1] += 1 / len(runs[row["arm"]])
        place = row["arm"], row["domain"]
        items.setdefault(place, {})[row["id"]] = str(row.get("group") or row["id"])
    for (arm, domain), groups in items.items():  # nor are variants of one prompt
        alone = len(set(groups.values())) / len(groups)
        counts[arm][domain] = [alone * x for x in counts[arm][domain]]
    return summary(labelled, counts, sum(row["share"] == REFUSED for row in rows) / len(rows))


def _is_key(drawn: Any) -> bool:
    """Whether a row of the key is what `write_sheet` wrote."""
    if not isinstance(drawn, dict):
        return False
    texts = all(isinstance(drawn.get(k), str) for k in ("run", "prompt", "response_sha256"))
    share_drawn = drawn.get("probability")
    return texts and isinstance(share_drawn, float | int) and 0 < share_drawn <= 1


def _found(
    workdir: Any, given: Mapping[str, str], rows: Sequence[Mapping[str, Any]], runs: set[str]
) -> Iterator[tuple[Mapping[str, Any], str, float]]:
    """Responses with their labels and sampling weights."""
    by_place = {(row["run"], row["id"]): row for row in rows}
    key = read_json(workdir / KEY)
    for name, label in given.items():
        drawn = key.get(name) if isinstance(key, dict) else None
        if drawn is None:
            raise UserError(f"{workdir / SHEET}: id {name!r:.80} is none of {workdir / KEY}")
        if not _is_key(drawn):
            raise UserError(
                f"{workdir / KEY}: {name!r:.80} is damaged; move the sheet away and sample again"
            )
        if drawn["run"] not in runs:
            continue
        row = by_place.get((drawn["run"], drawn["prompt"]))
        if row is None or row["response_sha256"] != drawn["response_sha256"]:
            raise UserError(
                f"{workdir / SHEET}: the response of {name} is no longer that of responses/"
                f"{drawn['run']}.jsonl; move the sheet away and sample again"
            )
        yield row, label, 1 / drawn["probability"]
