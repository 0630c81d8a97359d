"""The prompt set of a study: its sizes, its leakage, and EMA where leakage is least.

Prompts that are near ones that a model was trained on may change because of their words. The far
half of a domain's evaluation prompts are those least like any prompt that the arm was trained on
(`data.similarity`): the target's harvest prompts, and the retain prompts of an arm that has them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ema_jax.data.domains import TRAINED
from ema_jax.data.prompts import Prompt
from ema_jax.data.similarity import leakage, nearest
from ema_jax.refusal.paired import answers_gained, paired_change, refusals_lost
from ema_jax.refusal.responses import Responses, shares_by_seed
from ema_jax.study import schema

_FEWEST = 4  # prompts of a half

Splits = Mapping[str, Sequence[Prompt]]
Cosines = Mapping[str, float]  # id of a prompt → cosine with the nearest trained one


def prompt_set(prompts: Splits) -> schema.PromptSet:
    """Numbers of prompts, and how alike those that are measured are to those trained on."""
    counts = {split: dict(Counter(p.domain for p in each)) for split, each in prompts.items()}
    asked: dict[str, list[str]] = {}
    for prompt in prompts["eval"]:
        asked.setdefault(prompt.domain, []).append(prompt.prompt)
    trained = [prompt.prompt for split in TRAINED for prompt in prompts[split]]
    found: schema.PromptSet = {"counts": counts, "leakage": leakage(asked, trained)}
    return found


def trained_cosines(prompts: Splits, *, retains: bool) -> dict[str, float]:
    """Cosine of every evaluation prompt with the nearest that an arm was trained on."""
    trained = [*prompts["harvest"], *(prompts["retain"] if retains else ())]
    asked = prompts["eval"]
    cosines = nearest([p.prompt for p in asked], [p.prompt for p in trained])
    return dict(zip((p.id for p in asked), cosines.tolist(), strict=True))


def far_half(base: Responses, runs: Sequence[Responses], cosines: Cosines) -> schema.FarHalf | None:
    """EMA by both measures on the half of the prompts least like those trained on.

    None with too few prompts, or where responses do not name theirs (studies made before they did).
    """
    if len(base.ids) < 2 * _FEWEST or any(name not in cosines for name in base.ids):
        return None
    order = sorted(range(len(base.ids)), key=lambda i: (cosines[base.ids[i]], base.ids[i]))
    half = order[: len(order) // 2]
    base, runs = base.only(half), [run.only(half) for run in runs]
    drop, rise = (
        paired_change(base.shares, shares_by_seed(runs), base.groups, measure=measure)
        for measure in (refusals_lost, answers_gained)
    )
    return {
        "n": len(half),
        "cosine": float(np.max([cosines[name] for name in base.ids])),
        "drop": drop["change"],
        "ci95": drop["ci95"],
        "compliance_rise": rise["change"],
        "compliance_ci95": rise["ci95"],
    }
