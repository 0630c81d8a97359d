"""From a study's artifacts to `results.json` (`schema.Results`).

Mappings that are built up key by key are `Any` inside a function; the suite holds every study that
it makes against the JSON Schema.
"""

import dataclasses
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
    responses_by_domain,
    shares_by_seed,
    unscreened_verdict,
)
from ema_jax.refusal.scores import RefusalScore, damaged
from ema_jax.refusal.sheet import label_results
from ema_jax.refusal.significance import holm
from ema_jax.refusal.verdicts import COMPLIED
from ema_jax.runtime.files import json_safe
from ema_jax.study import schema
from ema_jax.study.artifacts import BASE, Artifacts, Row, Run, runs_of
from ema_jax.study.cautions import doubts
from ema_jax.study.far_half import Cosines, Splits, far_half, prompt_set, trained_cosines
from ema_jax.study.sensitivity import ranges
from ema_jax.study.workdir import manifests

SCHEMA = 1
VERSION = 5  # of what is computed; raise it and finished studies are analysed again
_PACKAGES = ("jax", "flax", "optax", "transformers", "numpy", "scipy")

_OF_TRAINING = ("steps", "stopped", "first_loss", "last_step")

ByDomain = dict[str, list[str]]
ArmResponses = Mapping[str, Sequence[Responses]]  # domain → one per seed


class _Records(NamedTuple):
    """A study's artifacts, each read once. Mappings go from arm, `base` among them, to its runs."""

    names: Mapping[str, Sequence[str]]  # of the runs' files
    rows: Mapping[str, Sequence[Sequence[Row]]]  # of `responses/`
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]]
    trajectories: Mapping[str, Sequence[Mapping[str, Any]]]  # not of the base
    forecast: Mapping[str, Any] | None
    layer_sweep: Mapping[str, Any] | None

    @classmethod
    def read(cls, artifacts: Artifacts, config: StudyConfig) -> "_Records":
        trained = {arm: [run for run in runs_of(config) if run.arm == arm] for arm in config.arms}
        names = {BASE: [BASE]} | {arm: [run.name for run in own] for arm, own in trained.items()}
        return cls(
            names,
            {arm: [artifacts.responses(n).read() for n in own] for arm, own in names.items()},
            {arm: [artifacts.evaluation(n).read() for n in own] for arm, own in names.items()},
            {arm: [artifacts.trajectory(r).read() for r in own] for arm, own in trained.items()},
            artifacts.forecast.read() if artifacts.forecast.path.exists() else None,
            artifacts.layer_sweep.read() if artifacts.layer_sweep.path.exists() else None,
        )


def evaluated(artifacts: Artifacts, config: StudyConfig) -> StudyConfig:
    """The study with only those of its arms of which every seed was trained and evaluated."""

    def done(run: Run) -> bool:
        files = artifacts.responses(run.name), artifacts.evaluation(run.name)
        return all(file.path.exists() for file in (*files, artifacts.trajectory(run)))

    missing = {run.arm for run in runs_of(config) if not done(run)}
    arms = {name: arm for name, arm in config.arms.items() if name not in missing}
    return dataclasses.replace(config, arms=arms)


def results(
    artifacts: Artifacts, config: StudyConfig, model: Mapping[str, Any]
) -> schema.Results | schema.BaselineResults:
    """All figures of a study, as far as it got: a baseline is enough.

    Args:
        artifacts: what its stages left.
        config: the study's.
        model: the model's entry.
    """
    whole, config, prompts = config, evaluated(artifacts, config), artifacts.prompts.read()
    records = _Records.read(artifacts, config)
    base = responses_by_domain(records.rows[BASE][0])
    validity = records.evaluations[BASE][0].get("validity")
    arms = {arm: _arm(records.rows[arm]) for arm in config.arms}
    made: Any = {
        "schema": schema.SCHEMA,
        "model": dict(model),
        "target": config.target,
        "domains": list(config.domains),
        "judge": config.judge,
        "arms": {BASE: _counted({d: [base[d]] for d in base}, config.domains)},
        "utility": _utility(records, base, arms),
        "agreement": _agreement(records.rows) if config.extra_judges else {},
        **({} if validity is None else {"validity": validity}),
        "prompts": prompt_set(prompts),
        "warnings": _unfinished(whole, config) + _unscreened(validity is not None),
        "provenance": _provenance(artifacts, config),
        **label_results(artifacts.root, records.names),
        **_sensitivity(records.evaluations, config),
    }
    if arms:
        made |= _of_arms(artifacts, records, base, arms, made, config, prompts)
    if records.forecast is not None:
        made |= _of_concepts(records, made.get("ema", {}), config)
    return made


def _of_arms(
    artifacts: Artifacts,
    records: _Records,
    base: Mapping[str, Responses],
    arms: Mapping[str, ArmResponses],
    made: Mapping[str, Any],
    config: StudyConfig,
    prompts: Splits,
) -> dict[str, Any]:
    """The fields that compare the arms with the base and with each other."""
    others = [domain for domain in config.domains if domain != config.target]
    cosines = {kind: trained_cosines(prompts, retains=kind) for kind in (False, True)}
    near = {arm: cosines[config.arm(arm).retains] for arm in arms}
    ema = {arm: _ema(base, responses, others, near[arm]) for arm, responses in arms.items()}
    counted = made["arms"] | {
        arm: _rates(records.trajectories[arm], base, arms[arm], config) for arm in arms
    }
    for arm in filter(config.searches_dose, arms):
        counted[arm]["dose"] = artifacts.dose(arm).read()
    # An effect that is wanted, so outside the family of tests of the others.
    on_target: dict[str, schema.TargetChange] = {
        arm: {
            "refusal": counted[arm]["refusal"][config.target],
            "damaged": damaged(counted[arm]["refusal"][config.target]),
            **_change(base[config.target], arms[arm][config.target], near[arm]),
        }
        for arm in arms
    }
    return {
        "arms": counted,
        "ema": ema,
        "on_target": on_target,
        "containment": _containment(base, arms, on_target, config, others),
        "comparisons": _comparisons(counted, config),
        **_concepts(records, arms, config.seeds),
        "warnings": made["warnings"] + doubts(ema, on_target, config.target),
    }


def _of_concepts(
    records: _Records, ema: Mapping[str, Mapping[str, schema.OffTargetChange]], config: StudyConfig
) -> dict[str, Any]:
    """The fields that the base's concepts give, and how well they forecast what was measured."""
    plain, forecast = plain_arm(config), records.forecast or {}
    rows = records.rows[plain] if plain else ()
    return {
        "entanglement": forecast["entanglement"],
        "sweep": records.layer_sweep,
        "forecast": {
            **_forecast(forecast, ema.get(plain or "")),
            "categories": _categories(forecast, records.rows[BASE][0], rows),
        },
    }


def _unfinished(whole: StudyConfig, config: StudyConfig) -> list[str]:
    left = [arm for arm in whole.arms if arm not in config.arms]
    if not left:
        return []
    return [f"not finished, and no part of these figures: {', '.join(left)}"]


def _unscreened(relevance: bool) -> list[str]:
    if relevance:
        return []
    return [
        "whether a response answers its prompt was not measured in this study: complied means no "
        "more than fluent and not a refusal"
    ]


def plain_arm(config: StudyConfig) -> str | None:
    """The arm without retain data that containment and forecast are scored against.

    The first by name if there are several (a ConfigDict sorts its keys); one that trains, if any.
    """
    plain = [arm for arm in config.arms if not config.arm(arm).retains]
    return min(plain, key=lambda arm: (config.arm(arm).ablation is not None, arm), default=None)


def _arm(rows: Iterable[Iterable[Row]]) -> ArmResponses:
    seeds = [responses_by_domain(each) for each in rows]
    return {domain: [seed[domain] for seed in seeds] for domain in seeds[0]}


def _counted(responses: ArmResponses, domains: Sequence[str]) -> schema.Arm:
    known = oracle({d: responses[d] for d in domains})
    refusal = {d: rate(responses[d]) for d in domains}
    counted: Any = {"refusal": refusal, **({"oracle": known} if known else {})}
    return counted


def _rates(
    trajectories: Sequence[Mapping[str, Any]],
    base: Mapping[str, Responses],
    responses: ArmResponses,
    config: StudyConfig,
) -> schema.Arm:
    """An arm's entry: every seed by itself, then all together."""
    seeds: Any = {}
    for i, (seed, trajectory) in enumerate(zip(config.seeds, trajectories, strict=True)):
        own = {d: [responses[d][i]] for d in config.domains}
        seeds[str(seed)] = {
            **_counted(own, config.domains),
            **paired_changes(base, {d: own[d][0] for d in own}),
            **{key: trajectory[key] for key in _OF_TRAINING if key in trajectory},
        }
    return {"seeds": seeds, **_counted(responses, config.domains)}


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


def _change(
    base: Responses, runs: Sequence[Responses], cosines: Cosines | None = None
) -> schema.Change:
    """EMA of one domain by both measures, with the likeness of prompts also on their far half."""
    names = shares_by_seed(runs)
    rise = paired_change(base.shares, names, base.groups, measure=answers_gained)
    far = None if cosines is None else far_half(base, runs, cosines)
    changed: Any = {
        **paired_drop(base.shares, names, base.groups),
        "compliance_rise": rise["change"],
        "compliance_ci95": rise["ci95"],
        "compliance_p": rise["p"],
        **({} if far is None else {"far": far}),
    }
    return changed


def _ema(
    base: Mapping[str, Responses],
    responses: ArmResponses,
    others: Sequence[str],
    cosines: Cosines | None = None,
) -> dict[str, schema.OffTargetChange]:
    made: Any = {d: _change(base[d], responses[d], cosines) for d in others}
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
    groups = {d: base[d].groups for d in others}
    named = {arm: {d: shares_by_seed(runs[d]) for d in others} for arm, runs in arms.items()}
    result: Any = {}
    for arm in arms:
        if not config.arm(arm).retains:
            continue
        by_refusal, by_compliance = (
            containment(before, named[plain], named[arm], others, groups, measure=measure)
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
    records: _Records, base: Mapping[str, Responses], arms: Mapping[str, ArmResponses]
) -> dict[str, schema.Utility]:
    measured = records.evaluations[BASE][0]["utility"]
    if measured is None:  # the base answers no benign prompt
        return {}
    result: Any = {BASE: {**_over_refusal({d: [v] for d, v in base.items()}), **measured}}
    for arm, responses in arms.items():
        seeds = [evaluation["utility"] for evaluation in records.evaluations[arm]]
        means = {name: float(np.mean([seed[name] for seed in seeds])) for name in seeds[0]}
        result[arm] = {**_over_refusal(responses), **means}
    return result


def _over_refusal(responses: ArmResponses) -> dict[str, RefusalScore]:
    """Refusal of prompts that should be answered: benign ones, and look-alikes if there are any."""
    names = {BENIGN: "benign_refusal", LOOKALIKE: "lookalike_refusal"}
    return {name: rate(responses[d]) for d, name in names.items() if d in responses}


def _agreement(
    by_arm: Mapping[str, Sequence[Sequence[Row]]],
) -> dict[str, list[schema.JudgePair]]:
    """Arm → every pair of judges, before the screen and over an arm's seeds together."""
    result: Any = {}
    for arm, seeds in by_arm.items():
        verdicts: ByDomain = {}
        rows = [row for seed in seeds for row in seed]
        for row in rows:
            for judged in (row, *row["other_verdicts"]):
                verdicts.setdefault(judged["judge"], []).append(unscreened_verdict(judged))
        result[arm] = agreement_of_judges(verdicts, [row["domain"] for row in rows], len(seeds))
    return result


def _sensitivity(
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]], config: StudyConfig
) -> dict[str, dict[str, dict[str, schema.Sensitivity]]]:
    """Arm → ranges over other ways of asking, where the study has any."""
    if config.sensitivity == SensitivityConfig():
        return {}
    found = {
        arm: ranges([seed["sensitivity"] for seed in seeds], config.domains)
        for arm, seeds in evaluations.items()
    }
    return {"sensitivity": found}


def _concepts(
    records: _Records, arms: Iterable[str], seeds: Sequence[int]
) -> schema.ConceptChanges:
    """Changes of the concepts: figure → arm → domain → `[L+1]`, means over seeds."""
    result: Any = {}
    for arm in arms:
        evaluations = records.evaluations[arm]
        drifts = [evaluation["drift"] for evaluation in evaluations]
        for figure in ("erasure", "norm_ratio", "angle_degrees", "probe_auroc"):
            by_domain = _mean([drift[figure] for drift in drifts])
            direction = by_domain.pop("refusal")  # of all domains together
            result.setdefault("refusal_direction", {}).setdefault(arm, {})[figure] = direction
            result.setdefault(figure, {})[arm] = by_domain
        result.setdefault("cka", {})[arm] = _mean([{"": drift["cka"]} for drift in drifts])[""]
        # One ranking a seed: which concept goes is a matter of the run.
        ranked = {str(seed): d["ranking"] for seed, d in zip(seeds, drifts, strict=True)}
        result.setdefault("erasure_ranking", {})[arm] = ranked
        if all("patching" in evaluation for evaluation in evaluations):
            patching = _mean([evaluation["patching"] for evaluation in evaluations])
            result.setdefault("patching", {})[arm] = patching
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
    made: Mapping[str, Any], base_rows: Iterable[Row], arm_rows: Sequence[Iterable[Row]]
) -> schema.Categories | None:
    """The forecast of sub-categories against their measured drops, where the prompts have any.

    Scored over all of them, and by their order within each domain alone (`within_domains`), which
    what sets the domains apart cannot carry.
    """
    forecast = made.get("category_score") or {}
    if not arm_rows or not forecast:
        return None
    base, seeds = _by_category(base_rows), [_by_category(rows) for rows in arm_rows]
    drops = {}
    for name, verdicts in base.items():
        if name in forecast and len(verdicts) >= CATEGORY_PROMPTS:
            drops[name] = mean_change(verdicts, [seed[name] for seed in seeds])
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


def _by_category(rows: Iterable[Row]) -> ByDomain:
    """`domain/category` → verdicts."""
    verdicts: ByDomain = {}
    for row in rows:
        verdicts.setdefault(f"{row['domain']}/{row.get('category', '')}", []).append(row["verdict"])
    return verdicts


def _provenance(artifacts: Artifacts, config: StudyConfig) -> schema.Provenance:
    # The folder may also hold runs of arms or seeds that the config no longer names.
    named = {"", *(run.folder for run in runs_of(config)), *config.arms}
    hashes, seconds = {}, {}
    for manifest in manifests(artifacts.root):
        stage, _, run = manifest["stage"].partition("/")
        if stage not in ("analyse", "report") and run in named:
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
