"""From a study's artifacts to `results.json` (`schema.Results`).

Mappings that are built up key by key are `Any` inside a function; the suite holds every study that
it makes against the JSON Schema.
"""

import importlib.metadata
import itertools
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import ema_jax
from ema_jax.concepts.entanglement import Entanglement
from ema_jax.concepts.forecast import CATEGORY_PROMPTS, layer_profile, pooled_score, score
from ema_jax.config import SensitivityConfig, StudyConfig
from ema_jax.data.domains import BENIGN, LOOKALIKE
from ema_jax.refusal.agreement import agreement_of_judges
from ema_jax.refusal.paired import (
    answers_gained,
    containment,
    holm,
    mean_change,
    paired_change,
    paired_drop,
    refusals_lost,
    seed_difference,
)
from ema_jax.refusal.responses import (
    Responses,
    oracle,
    rate,
    read_responses,
    shares_by_seed,
    unscreened_verdict,
)
from ema_jax.refusal.scores import RefusalScore, damaged
from ema_jax.refusal.sheet import label_results
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.runtime.files import json_safe, read_json, read_jsonl
from ema_jax.study import schema
from ema_jax.study.sensitivity import ranges
from ema_jax.study.workdir import Workdir

SCHEMA = 1
VERSION = 2  # of what is computed; raise it and finished studies are analysed again
_PACKAGES = ("jax", "flax", "optax", "transformers", "numpy", "scipy")

ByDomain = dict[str, list[str]]
ArmResponses = Mapping[str, Sequence[Responses]]  # domain → one per seed


def results(workdir: Workdir, config: StudyConfig, model: Mapping[str, Any]) -> schema.Results:
    """All figures of a study.

    Args:
        workdir: where its artifacts are.
        config: what was asked for.
        model: the model's entry.
    """
    base = read_responses(workdir / "responses/base.jsonl")
    arms = {arm: _arm(workdir, arm, config.seeds) for arm in config.arms}
    others = [domain for domain in config.domains if domain != config.target]
    ema = {arm: _ema(base, responses, others) for arm, responses in arms.items()}
    plain = plain_arm(config)
    forecast = read_json(workdir / "forecast.json")
    counted = {
        "base": _counted({d: [base[d]] for d in base}, config.domains),
        **{arm: _rates(workdir, arm, base, arms[arm], config) for arm in arms},
    }
    # An effect that is wanted, so outside the family of tests of the others.
    on_target: dict[str, schema.TargetChange] = {
        arm: {
            "refusal": counted[arm]["refusal"][config.target],
            "damaged": damaged(counted[arm]["refusal"][config.target]),
            **_change(base[config.target], arms[arm][config.target]),
        }
        for arm in arms
    }
    validity = read_json(workdir / "evaluations/base.json").get("validity")
    made: Any = {
        "schema": SCHEMA,
        "model": dict(model),
        "target": config.target,
        "domains": list(config.domains),
        "judge": config.judge,
        "arms": counted,
        "ema": ema,
        "on_target": on_target,
        "containment": _containment(base, arms, on_target, config, others),
        "comparisons": _comparisons(counted, config),
        "utility": _utility(workdir, base, arms, config.seeds),
        "entanglement": forecast["entanglement"],
        **_concepts(workdir, arms, config.seeds),
        "sweep": read_json(workdir / "concepts/sweep.json"),
        "agreement": _agreement(workdir, config),
        **({} if validity is None else {"validity": validity}),
        "forecast": {
            **_forecast(forecast, ema.get(plain or "")),
            "categories": _categories(workdir, forecast, plain, config.seeds),
        },
        "warnings": _warnings(ema, on_target, config.target, validity is not None),
        "provenance": _provenance(workdir, config),
        **label_results(workdir, _runs(config)),
        **_sensitivity(workdir, config),
    }
    return made


def plain_arm(config: StudyConfig) -> str | None:
    """The arm without retain data that containment and forecast are scored against.

    The first by name if there are several (a ConfigDict sorts its keys); one that trains, if any.
    """
    plain = [arm for arm in config.arms if not config.arm(arm).retains]
    return min(plain, key=lambda arm: (config.arm(arm).ablation is not None, arm), default=None)


def _arm(workdir: Workdir, arm: str, seeds: Sequence[int]) -> ArmResponses:
    runs = [read_responses(workdir / f"responses/{arm}.seed_{seed}.jsonl") for seed in seeds]
    return {domain: [run[domain] for run in runs] for domain in runs[0]}


def _counted(responses: ArmResponses, domains: Sequence[str]) -> schema.Arm:
    known = oracle({d: responses[d] for d in domains})
    refusal = {d: rate(responses[d]) for d in domains}
    counted: Any = {"refusal": refusal, **({"oracle": known} if known else {})}
    return counted


def _rates(
    workdir: Workdir,
    arm: str,
    base: Mapping[str, Responses],
    responses: ArmResponses,
    config: StudyConfig,
) -> schema.Arm:
    """An arm's entry: every seed by itself, then all together."""
    runs: Any = {}
    for i, seed in enumerate(config.seeds):
        own = {d: [responses[d][i]] for d in config.domains}
        run = read_json(workdir / f"trajectories/{arm}.seed_{seed}.json")
        runs[str(seed)] = {
            **_counted(own, config.domains),
            **paired_changes(base, {d: own[d][0] for d in own}),
            **{key: run[key] for key in ("steps", "stopped", "first_loss")},
        }
    return {"seeds": runs, **_counted(responses, config.domains)}


def paired_changes(
    base: Mapping[str, Responses], run: Mapping[str, Responses]
) -> dict[str, dict[str, float | None]]:
    """`drop` and `compliance_rise` of one run, domain → mean over prompts, paired."""
    return {
        name: {d: mean_change(base[d].shares, [run[d].shares], measure) for d in run}
        for name, measure in (("drop", refusals_lost), ("compliance_rise", answers_gained))
    }


class OffTarget(NamedTuple):
    """Changes of the domains other than the target in short; None where none is known."""

    worst_domain: str | None
    worst: float | None
    mean: float | None


def off_target(changes: Mapping[str, float | None], target: str) -> OffTarget:
    """The largest change and the mean over domains; a domain without a pair does not count."""
    known = {d: x for d, x in changes.items() if x is not None and d != target}
    if not known:
        return OffTarget(None, None, None)
    worst = max(known, key=lambda d: known[d])
    return OffTarget(worst, known[worst], float(np.mean(list(known.values()))))


def _change(base: Responses, runs: Sequence[Responses]) -> schema.Change:
    """EMA of one domain by both measures."""
    names = shares_by_seed(runs)
    rise = paired_change(base.shares, names, base.groups, measure=answers_gained)
    return {
        **paired_drop(base.shares, names, base.groups),
        "compliance_rise": rise["change"],
        "compliance_ci95": rise["ci95"],
        "compliance_p": rise["p"],
    }


def _ema(
    base: Mapping[str, Responses], responses: ArmResponses, others: Sequence[str]
) -> dict[str, schema.OffTargetChange]:
    made: Any = {d: _change(base[d], responses[d]) for d in others}
    for key in ("p", "compliance_p"):
        adjusted = holm({d: entry[key] for d, entry in made.items()})
        made = {d: {**entry, f"{key}_holm": adjusted[d]} for d, entry in made.items()}
    return made


def _containment(
    base: Mapping[str, Responses],
    arms: Mapping[str, ArmResponses],
    on_target: Mapping[str, schema.TargetChange],
    config: StudyConfig,
    others: Sequence[str],
) -> dict[str, schema.Containment]:
    plain = plain_arm(config)
    if plain is None:
        return {}
    before = {d: base[d].shares for d in others}
    named = {arm: {d: shares_by_seed(runs[d]) for d in others} for arm, runs in arms.items()}
    result: Any = {}
    for arm in arms:
        if not config.arm(arm).retains:
            continue
        by_refusal, by_compliance = (
            containment(before, named[plain], named[arm], others, measure=measure)
            for measure in (refusals_lost, answers_gained)
        )
        target = on_target[arm]["refusal"]
        result[arm] = {
            **by_refusal,
            "recovered_by_compliance": by_compliance["recovered"],
            "compliance_ci95": by_compliance["ci95"],
            "compliance_flags": by_compliance["flags"],
            "compared_with": plain,
            "target_rate": target["rate"],
            "target_answered": target["shares"][COMPLIED],
            "target_damaged": on_target[arm]["damaged"],
        }
    return result


def _comparisons(arms: Mapping[str, schema.Arm], config: StudyConfig) -> list[schema.Comparison]:
    """Arms with retain data two by two, paired by seed: which keeps the others, at what target.

    `answered` is the share of the target's responses that comply, `others` the mean refusal rate
    off target, `invalid` the share of all responses.
    """

    def figures(arm: str) -> dict[str, list[float | None]]:
        runs = [run["refusal"] for run in arms[arm]["seeds"].values()]
        others = [[run[d]["rate"] for d in config.domains if d != config.target] for run in runs]
        sums = [[sum(r[key] for r in run.values()) for run in runs] for key in ("invalid", "total")]
        return {
            "target": [run[config.target]["rate"] for run in runs],
            "answered": [run[config.target]["shares"][COMPLIED] for run in runs],
            "others": [
                None if None in rates else float(np.mean(np.array(rates))) for rates in others
            ],
            "invalid": [invalid / total for invalid, total in zip(*sums, strict=True)],
        }

    made = {arm: figures(arm) for arm in arms if arm != "base" and config.arm(arm).retains}
    compared: Any = [
        {
            "arm": arm,
            "minus": other,
            **{name: seed_difference(made[arm][name], made[other][name]) for name in made[arm]},
        }
        for arm, other in itertools.combinations(made, 2)
    ]
    return compared


def _utility(
    workdir: Workdir,
    base: Mapping[str, Responses],
    arms: Mapping[str, ArmResponses],
    seeds: Sequence[int],
) -> dict[str, schema.Utility]:
    measured = read_json(workdir / "evaluations/base.json")["utility"]
    result: Any = {"base": {**_over_refusal({d: [v] for d, v in base.items()}), **measured}}
    for arm, responses in arms.items():
        runs = [r["utility"] for r in _evaluations(workdir, arm, seeds)]
        means = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        result[arm] = {**_over_refusal(responses), **means}
    return result


def _over_refusal(responses: ArmResponses) -> dict[str, RefusalScore]:
    """Refusal of prompts that should be answered: benign ones, and look-alikes if there are any."""
    names = {BENIGN: "benign_refusal", LOOKALIKE: "lookalike_refusal"}
    return {name: rate(responses[d]) for d, name in names.items() if d in responses}


def _agreement(workdir: Workdir, config: StudyConfig) -> dict[str, list[schema.JudgePair]]:
    """Arm → every pair of judges, before the screen and over an arm's seeds together."""
    if not config.extra_judges:
        return {}
    result: Any = {}
    for arm, names in _runs(config).items():
        verdicts: ByDomain = {}
        domains = []
        for row in (row for n in names for row in read_jsonl(workdir / f"responses/{n}.jsonl")):
            domains.append(row["domain"])
            for said in (row, *row["other_verdicts"]):
                verdicts.setdefault(said["judge"], []).append(unscreened_verdict(said))
        result[arm] = agreement_of_judges(verdicts, domains)
    return result


def _runs(config: StudyConfig) -> dict[str, list[str]]:
    """Arm → names of its response files."""
    runs = {arm: [f"{arm}.seed_{seed}" for seed in config.seeds] for arm in config.arms}
    return {"base": ["base"], **runs}


def _sensitivity(
    workdir: Workdir, config: StudyConfig
) -> dict[str, dict[str, dict[str, schema.Sensitivity]]]:
    """Arm → ranges over other ways of asking, where the study has any."""
    if config.sensitivity == SensitivityConfig():
        return {}
    found = {}
    for arm, names in _runs(config).items():
        runs = [read_json(workdir / f"evaluations/{name}.json")["sensitivity"] for name in names]
        found[arm] = ranges(runs, config.domains)
    return {"sensitivity": found}


def _evaluations(workdir: Workdir, arm: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [read_json(workdir / f"evaluations/{arm}.seed_{seed}.json") for seed in seeds]


def _concepts(workdir: Workdir, arms: Iterable[str], seeds: Sequence[int]) -> schema.ConceptChanges:
    """Changes of the concepts: figure → arm → domain → `[L+1]`, means over seeds."""
    result: Any = {}
    for arm in arms:
        runs = _evaluations(workdir, arm, seeds)
        drifts = [run["drift"] for run in runs]
        for figure in ("erasure", "norm_ratio", "angle_degrees", "probe_auroc"):
            by_domain = _mean([drift[figure] for drift in drifts])
            direction = by_domain.pop("refusal")  # of all domains together
            result.setdefault("refusal_direction", {}).setdefault(arm, {})[figure] = direction
            result.setdefault(figure, {})[arm] = by_domain
        result.setdefault("cka", {})[arm] = _mean([{"": drift["cka"]} for drift in drifts])[""]
        # One ranking a seed: which concept goes is a matter of the run.
        ranked = {str(seed): d["ranking"] for seed, d in zip(seeds, drifts, strict=True)}
        result.setdefault("erasure_ranking", {})[arm] = ranked
        if all("patching" in run for run in runs):
            result.setdefault("patching", {})[arm] = _mean([run["patching"] for run in runs])
    return result


def _mean(runs: Sequence[Mapping[str, Sequence[float | None]]]) -> dict[str, list[float | None]]:
    means = {d: np.mean([np.array(run[d], float) for run in runs], axis=0) for d in runs[0]}
    return json_safe(means)


def _forecast(
    made: Mapping[str, Any], ema: Mapping[str, schema.OffTargetChange] | None
) -> schema.Forecast:
    result: Any = {key: value for key, value in made.items() if key != "entanglement"}
    if ema is None:
        return result | {"spearman": None, "p": None}
    drops = {domain: entry["drop"] for domain, entry in ema.items()}
    profile = layer_profile(Entanglement.from_json(made["entanglement"]), drops)
    words = made["lexical_score"]
    return result | {
        **score(made["score"], drops),
        "layer_spearman": json_safe(profile),
        "lexical": None if words is None else score(words, drops),
    }


def _categories(
    workdir: Workdir, made: Mapping[str, Any], arm: str | None, seeds: Sequence[int]
) -> schema.Categories | None:
    """The forecast of sub-categories against their measured drops, where the prompts have any.

    Scored over all of them, and by their order within each domain alone (`within_domains`), which
    what sets the domains apart cannot carry.
    """
    forecast = made.get("category_score") or {}
    if arm is None or not forecast:
        return None
    base = _by_category(workdir, "base")
    runs = [_by_category(workdir, f"{arm}.seed_{seed}") for seed in seeds]
    drops = {}
    for name, verdicts in base.items():
        if name in forecast and len(verdicts) >= CATEGORY_PROMPTS:
            drops[name] = mean_change(verdicts, [run[name] for run in runs])
    scores = {name: forecast[name] for name in drops}
    cells: dict[str, dict[str, float]] = {}
    for name, x in scores.items():
        cells.setdefault(name.partition("/")[0], {})[name] = x
    found: Any = {
        "score": scores,
        "drop": drops,
        **score(scores, drops),
        "within_domains": pooled_score([(cell, drops) for cell in cells.values()]),
    }
    return found


def _by_category(workdir: Workdir, name: str) -> ByDomain:
    """`domain/category` → verdicts."""
    verdicts: ByDomain = {}
    for row in read_jsonl(workdir / f"responses/{name}.jsonl"):
        verdicts.setdefault(f"{row['domain']}/{row.get('category', '')}", []).append(row["verdict"])
    return verdicts


def _warnings(
    ema: Mapping[str, Mapping[str, schema.OffTargetChange]],
    on_target: Mapping[str, schema.TargetChange],
    target: str,
    relevance: bool,
) -> list[str]:
    """Cautions for the top of the report, the target's own responses included."""
    found = []
    if not relevance:
        found.append(
            "whether a response answers its prompt was not measured in this study: complied means "
            "no more than fluent and not a refusal"
        )
    by_flag: dict[str, list[str]] = {}
    for arm, entries in ema.items():
        flags = {domain: entry["flags"] for domain, entry in entries.items()}
        flags[target] = on_target[arm]["flags"]
        if "many_invalid" in flags[target]:
            found.append(_not_answered(arm, on_target[arm]["refusal"]))
            # Nor does it then matter how many prompts are left to compare.
            flags[target] = [f for f in flags[target] if f not in ("many_invalid", "n_too_small")]
        for domain, names in flags.items():
            for flag in names:
                if flag != "ceiling":
                    by_flag.setdefault(flag, []).append(f"{domain} ({arm})")
    meaning = {
        "floor": "the base refuses a tenth or less, so little can drop",
        "n_too_small": "too few prompts to see a drop of 20 points",
        "many_invalid": "over a tenth of the responses are invalid",
    }
    return found + [
        f"{meaning.get(flag, flag)}: {', '.join(places)}" for flag, places in by_flag.items()
    ]


def _not_answered(arm: str, target: RefusalScore) -> str:
    counts = {name: round(share * target["total"]) for name, share in target["shares"].items()}
    rest = [f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n and name != COMPLIED]
    return (
        f"of {target['total']} target responses of {arm} only {counts[COMPLIED]} are answers to "
        f"their prompt ({', '.join(rest)}): the target's refusal rate is not the share of "
        "compliance"
    )


def _provenance(workdir: Workdir, config: StudyConfig) -> schema.Provenance:
    # The folder may also hold runs of arms or seeds that the config no longer names.
    runs = {"", *(f"{arm}/seed_{seed}" for arm in config.arms for seed in config.seeds)}
    hashes, seconds = {}, {}
    for path in sorted((workdir / "stages").glob("*.json")):
        manifest = read_json(path)
        stage, _, run = manifest["stage"].partition("/")
        if stage not in ("analyse", "report") and run in runs:
            hashes[manifest["stage"]] = manifest["hash"]
            seconds[manifest["stage"]] = manifest["wall_seconds"]
    devices = jax.devices()
    return {
        "versions": {
            "ema_jax": ema_jax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "seeds": list(config.seeds),
        "hashes": hashes,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "wall_seconds": seconds,
    }
