"""Agreement with people of the judges that need no model: `python benchmarks/judges.py FOLDER`.

FOLDER (or the environment's EMA_JAX_LABELS) holds labelled sets, none of them part of the project:
XSTest's completions, the ChatGPT set of Reuter and Schulze, JSONL with own labels
(`ema_jax/refusal/labelled_sets.py`). Prints one row per set, part of it (prompt type, tone, style)
judge: accuracy, precision, recall and Cohen's kappa of `refused` against the rest, the share of
answers called refused, and the share found of what people call degenerate or off-topic. `--own`
adds the project's own examples: of openings and kinds of damage, the held-out half. Figures on
models left out of the training come from `python -m ema_jax.refusal.train_lexical`.
"""

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import accuracy_score, cohen_kappa_score, precision_score, recall_score

from ema_jax.refusal.judges import TEXT_JUDGES, get_judge
from ema_jax.refusal.labelled_sets import Labelled, read_folder
from ema_jax.refusal.train_lexical import own_rows
from ema_jax.refusal.verdicts import COMPLIED, DEGENERATE, OFF_TOPIC, REFUSED

COLUMNS = (
    "set",
    "part",
    "judge",
    "n",
    "accuracy",
    "precision",
    "recall",
    "kappa",
    "answers refused",
    "degenerate caught",
    "off-topic caught",
)


def percent(values: Sequence[bool] | np.ndarray) -> str:
    return f"{100 * np.mean(values):.1f} %" if len(values) else "–"


def show(source: str, part: str, judge: str, rows: list[Labelled], shares: list[str]) -> None:
    """Prints one line of the table; rows without a label count only in a set that has no labels."""
    known = [(r.label, s) for r, s in zip(rows, shares, strict=True) if r.label]
    truth = np.array([label == REFUSED for label, _ in known])
    guess = np.array([share == REFUSED for _, share in known])
    cells = ["–"] * 4
    if len(set(truth)) == 2:
        figures = (accuracy_score, precision_score, recall_score)
        cells = [f"{100 * figure(truth, guess):.1f} %" for figure in figures]
        cells.append(f"{cohen_kappa_score(truth, guess):.2f}")
    elif len(known):
        cells[0] = percent(truth == guess)
    called = [s == REFUSED for r, s in zip(rows, shares, strict=True) if r.label in (COMPLIED, "")]
    caught = {
        label: [s == label for known_, s in known if known_ == label]
        for label in (DEGENERATE, OFF_TOPIC)
    }
    cells += [percent(called), percent(caught[DEGENERATE]), percent(caught[OFF_TOPIC])]
    print("| " + " | ".join((source, part, judge, str(len(rows)), *cells)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=os.environ.get("EMA_JAX_LABELS"))
    parser.add_argument("--judges", default=",".join(TEXT_JUDGES))
    parser.add_argument("--parts", action="store_true", help="a row for every part as well")
    parser.add_argument("--own", type=Path, help="the project's tests/data")
    args = parser.parse_args()
    if args.folder is None:
        parser.error("name a folder of labelled sets, or set EMA_JAX_LABELS")
    warnings.simplefilter("ignore")  # precision of a judge that refuses nothing
    rows = read_folder(args.folder)
    if args.own:
        seen = {row.response for row in own_rows(args.own)}
        rows += [row for row in read_folder(args.own) if row.response not in seen]
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    judges = {name: get_judge(name) for name in args.judges.split(",")}
    for source in dict.fromkeys(row.source for row in rows):
        mine = [row for row in rows if row.source == source]
        parts = {"all": mine}
        for row in mine if args.parts else []:
            parts.setdefault(row.group or "–", []).append(row)
        for name, judge in judges.items():
            verdicts = judge(
                [{"prompt": r.prompt, "response": r.response, "finished": r.finished} for r in mine]
            )
            share = {id(r): v.share for r, v in zip(mine, verdicts, strict=True)}
            for part, inside in parts.items():
                show(source, part, name, inside, [share[id(r)] for r in inside])


if __name__ == "__main__":
    main()
