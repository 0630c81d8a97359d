"""How far the judges that need no model agree with people: `python benchmarks/judges.py FOLDER`.

FOLDER holds XSTest's labelled completions (`completions_MODEL.csv`, CC-BY-4.0, not part of the
project): 250 safe and 200 unsafe prompts a model. Full and partial refusals count as refused. A row
per model, part and judge: accuracy, precision, recall, Cohen's kappa, and the share refused beside
the people's.

The rules of `lexical` are written by hand, which no fold can hold out. What can be held out are
their points: at the end these are fitted anew (logistic regression on which rules a response meets)
without a tenth of the prompts, or without the model, that they are then tried on. If the rules' own
figures were owed to points that suit just these rows, the fitted ones would do worse elsewhere.
"""

import argparse
import csv
import warnings
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, cohen_kappa_score, precision_score, recall_score
from sklearn.model_selection import GroupKFold

from ema_jax.refusal import lexical
from ema_jax.refusal.judges import TEXT_JUDGES, get_judge

COLUMNS = (
    "model",
    "part",
    "judge",
    "accuracy",
    "precision",
    "recall",
    "kappa",
    "refused",
    "people",
)


def show(model: str, part: str, judge: str, truth: np.ndarray, guess: np.ndarray) -> None:
    figures = [
        accuracy_score(truth, guess),
        precision_score(truth, guess, zero_division=np.nan),
        recall_score(truth, guess, zero_division=np.nan),
        cohen_kappa_score(truth, guess),
        guess.mean(),
        truth.mean(),
    ]
    cells = [f"{100 * x:.1f} %" if i != 3 else f"{x:.2f}" for i, x in enumerate(figures)]
    print("| " + " | ".join((model, part, judge, *cells)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    warnings.simplefilter("ignore")  # kappa of a judge that refuses nothing
    sets = {}
    for path in sorted(parser.parse_args().folder.glob("completions_*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            sets[path.stem.removeprefix("completions_")] = list(csv.DictReader(file))
    truth = {m: np.array([r["final_label"] != "1_full_compliance" for r in sets[m]]) for m in sets}
    unsafe = {m: np.array([r["type"].startswith("contrast_") for r in sets[m]]) for m in sets}
    texts = {m: [r["completion"] for r in sets[m]] for m in sets}
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for model in sets:
        guess = {
            name: np.array(
                [
                    verdict.verdict == "refused"
                    for verdict in get_judge(name)(
                        [{"prompt": "", "response": t} for t in texts[model]]
                    )
                ]
            )
            for name in TEXT_JUDGES
        }
        everything = np.ones(len(truth[model]), bool)
        parts = {"all": everything, "safe": ~unsafe[model], "unsafe": unsafe[model]}
        for part, rows in parts.items():
            for name in TEXT_JUDGES:
                show(model, part, name, truth[model][rows], guess[name][rows])

    names = [rule.name for rule in lexical.RULES]
    met = {
        m: np.array(
            [[n in {r.name for r in lexical.matched_rules(t)} for n in names] for t in texts[m]]
        )
        for m in sets
    }
    x, y = np.concatenate([*met.values()]).astype(float), np.concatenate([*truth.values()])
    model_of = np.concatenate([[m] * len(texts[m]) for m in sets])
    prompts = np.concatenate([[r["prompt"] for r in sets[m]] for m in sets])

    def fitted(train: np.ndarray, tried: np.ndarray) -> np.ndarray:
        return LogisticRegression(max_iter=1000).fit(x[train], y[train]).predict(x[tried])

    held_out = np.zeros(len(y), bool)
    for train, tried in GroupKFold(10).split(x, y, prompts):
        held_out[tried] = fitted(train, tried)
    for model in sets:
        here = model_of == model
        show(model, "all", "points fitted on other prompts", y[here], held_out[here])
        show(model, "all", "points fitted on other models", y[here], fitted(~here, here))


if __name__ == "__main__":
    main()
