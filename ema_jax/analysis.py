"""From a study's artifacts to `results.json` (schema 1 of DESIGN)."""

import importlib.metadata
import itertools
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import ema_jax
from ema_jax.artifacts import read_json, read_jsonl
from ema_jax.concepts.entanglement import Entanglement
from ema_jax.concepts.forecast import CATEGORY_PROMPTS, layer_profile, pooled_score, score
from ema_jax.config import StudyConfig
from ema_jax.data.domains import BENIGN, LOOKALIKE
from ema_jax.refusal.agreement import agreement_of_judges
from ema_jax.refusal.scores import (
    containment,
    holm,
    paired_drop,
    pooled_rate,
    refusal_rate,
    seed_difference,
)
from ema_jax.refusal.sheet import labels
from ema_jax.stages import Workdir

SCHEMA = 1
_PACKAGES = ("jax", "flax", "optax", "transformers", "numpy", "scipy")

ByDomain = dict[str, list[str]]


def results(workdir: Workdir, config: StudyConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of a study.

    Args:
        workdir: where its artifacts are.
        config: what it was told.
        model: the model's entry.
    """
    base, ids = _verdicts(workdir, "base")
    arms = {arm: _arm(workdir, arm, config.seeds) for arm in config.arms}
    others = [domain for domain in config.domains if domain != config.target]
    ema = {arm: _ema(base, verdicts, ids, others) for arm, verdicts in arms.items()}
    plain = plain_arm(config)
    forecast = read_json(workdir / "forecast.json")
    rates = {arm: _rates(workdir, arm, arms[arm], config) for arm in arms}
    return {
        "schema": SCHEMA,
        "model": dict(model),
        "target": config.target,
        "domains": list(config.domains),
        "judge": config.judge,
        "arms": {
            "base": {"refusal": {d: refusal_rate(base[d]) for d in config.domains}},
            **rates,
        },
        "ema": ema,
        "containment": _containment(base, arms, config, others),
        "comparisons": _comparisons(rates, config),
        "utility": _utility(workdir, base, arms, config.seeds),
        "entanglement": forecast["entanglement"],
        **_concepts(workdir, arms, config.seeds),
        "sweep": read_json(workdir / "concepts/sweep.json"),
        "agreement": _agreement(workdir, config),
        "forecast": {
            **_forecast(forecast, ema.get(plain or "")),
            "categories": _categories(workdir, forecast, plain, config.seeds),
        },
        "warnings": _warnings(ema, arms),
        "provenance": _provenance(workdir, config),
        **labels(workdir, _runs(config)),
    }


def plain_arm(config: StudyConfig) -> str | None:
    """The arm without retain data that containment and forecast are scored against.

    The first by name if there are several (a ConfigDict sorts its keys); one that trains, if any.
    """
    plain = [arm for arm in config.arms if not config.arm(arm).retains]
    return min(plain, key=lambda arm: (config.arm(arm).trainable == "ablation", arm), default=None)


def listed(by_domain: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Arrays as lists, with null for what is undefined."""
    return {
        name: [None if np.isnan(x) else float(x) for x in values]
        for name, values in by_domain.items()
    }


def _verdicts(workdir: Workdir, name: str) -> tuple[ByDomain, ByDomain]:
    """Domain → verdicts, and domain → ids of the clusters, in the order of the prompts."""
    verdicts: ByDomain = {}
    groups: ByDomain = {}
    for row in read_jsonl(workdir / f"responses/{name}.jsonl"):
        verdicts.setdefault(row["domain"], []).append(row["verdict"])
        groups.setdefault(row["domain"], []).append(row["group"])
    return verdicts, groups


def _arm(workdir: Workdir, arm: str, seeds: Sequence[int]) -> dict[str, list[list[str]]]:
    """Domain → verdicts `[seeds][prompts]`."""
    runs = [_verdicts(workdir, f"{arm}.seed_{seed}")[0] for seed in seeds]
    return {domain: [run[domain] for run in runs] for domain in runs[0]}


def _rates(
    workdir: Workdir, arm: str, verdicts: Mapping[str, list[list[str]]], config: StudyConfig
) -> dict[str, Any]:
    runs = {}
    for i, seed in enumerate(config.seeds):
        run = read_json(workdir / f"trajectories/{arm}.seed_{seed}.json")
        runs[str(seed)] = {
            "refusal": {d: refusal_rate(verdicts[d][i]) for d in config.domains},
            **{key: run[key] for key in ("steps", "stopped", "first_loss")},
        }
    return {"seeds": runs, "refusal": {d: pooled_rate(verdicts[d]) for d in config.domains}}


def _ema(
    base: ByDomain,
    verdicts: Mapping[str, list[list[str]]],
    groups: ByDomain,
    others: Sequence[str],
) -> dict[str, Any]:
    drops = {d: paired_drop(base[d], verdicts[d], groups[d]) for d in others}
    adjusted = holm({d: drop["p"] for d, drop in drops.items()})
    return {d: {**drop, "p_holm": adjusted[d]} for d, drop in drops.items()}


def _containment(
    base: ByDomain,
    arms: Mapping[str, Mapping[str, list[list[str]]]],
    config: StudyConfig,
    others: Sequence[str],
) -> dict[str, Any]:
    plain = plain_arm(config)
    if plain is None:
        return {}
    return {
        arm: {
            **containment(base, arms[plain], arms[arm], others),
            "compared_with": plain,
            "target_rate": pooled_rate(arms[arm][config.target])["rate"],
        }
        for arm in arms
        if config.arm(arm).retains
    }


def _comparisons(arms: Mapping[str, Mapping[str, Any]], config: StudyConfig) -> list[Any]:
    """Arms with retain data two by two, paired by seed: who keeps the others, at what target.

    `others` is the mean refusal rate off target, `invalid` the share of all responses.
    """

    def figures(arm: str) -> dict[str, list[float | None]]:
        runs = [run["refusal"] for run in arms[arm]["seeds"].values()]
        others = [[run[d]["rate"] for d in config.domains if d != config.target] for run in runs]
        sums = [[sum(r[key] for r in run.values()) for run in runs] for key in ("invalid", "total")]
        return {
            "target": [run[config.target]["rate"] for run in runs],
            "others": [None if None in rates else float(np.mean(rates)) for rates in others],
            "invalid": [invalid / total for invalid, total in zip(*sums, strict=True)],
        }

    made = {arm: figures(arm) for arm in arms if config.arm(arm).retains}
    return [
        {
            "arm": arm,
            "minus": other,
            **{name: seed_difference(made[arm][name], made[other][name]) for name in made[arm]},
        }
        for arm, other in itertools.combinations(made, 2)
    ]


def _utility(
    workdir: Workdir,
    base: ByDomain,
    arms: Mapping[str, Mapping[str, list[list[str]]]],
    seeds: Sequence[int],
) -> dict[str, Any]:
    measured = read_json(workdir / "evaluations/base.json")["utility"]
    result = {"base": {**_over_refusal({d: [v] for d, v in base.items()}), **measured}}
    for arm, verdicts in arms.items():
        runs = [r["utility"] for r in _evaluations(workdir, arm, seeds)]
        means = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        result[arm] = {**_over_refusal(verdicts), **means}
    return result


def _over_refusal(verdicts: Mapping[str, list[list[str]]]) -> dict[str, Any]:
    """Refusal of prompts that should be answered: benign ones, and look-alikes if there are any."""
    names = {BENIGN: "benign_refusal", LOOKALIKE: "lookalike_refusal"}
    return {name: pooled_rate(verdicts[d]) for d, name in names.items() if d in verdicts}


def _agreement(workdir: Workdir, config: StudyConfig) -> dict[str, Any]:
    """Arm → every pair of judges, where more than one judged; an arm's seeds are taken together."""
    if not config.extra_judges:
        return {}
    result = {}
    for arm, names in _runs(config).items():
        verdicts: ByDomain = {}
        domains = []
        for row in (row for n in names for row in read_jsonl(workdir / f"responses/{n}.jsonl")):
            domains.append(row["domain"])
            for said in (row, *row["other_verdicts"]):
                verdicts.setdefault(said["judge"], []).append(said["verdict"])
        result[arm] = agreement_of_judges(verdicts, domains)
    return result


def _runs(config: StudyConfig) -> dict[str, list[str]]:
    """Arm → names of its response files."""
    runs = {arm: [f"{arm}.seed_{seed}" for seed in config.seeds] for arm in config.arms}
    return {"base": ["base"], **runs}


def _evaluations(workdir: Workdir, arm: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [read_json(workdir / f"evaluations/{arm}.seed_{seed}.json") for seed in seeds]


def _concepts(workdir: Workdir, arms: Iterable[str], seeds: Sequence[int]) -> dict[str, Any]:
    """What became of the concepts: figure → arm → domain → `[L+1]`, means over seeds."""
    result: dict[str, Any] = {}
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
    return listed({d: np.mean([np.array(run[d], float) for run in runs], axis=0) for d in runs[0]})


def _forecast(made: Mapping[str, Any], ema: Mapping[str, Any] | None) -> dict[str, Any]:
    result = {key: value for key, value in made.items() if key != "entanglement"}
    if ema is None:
        return result | {"spearman": None, "p": None}
    drops = {domain: entry["drop"] for domain, entry in ema.items()}
    profile = layer_profile(Entanglement.from_json(made["entanglement"]), drops)
    words = made["lexical_score"]
    return {
        **result,
        **score(made["score"], drops),
        "layer_spearman": listed({"": profile})[""],
        "lexical": None if words is None else score(words, drops),
    }


def _categories(
    workdir: Workdir, made: Mapping[str, Any], arm: str | None, seeds: Sequence[int]
) -> dict[str, Any] | None:
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
            drops[name] = paired_drop(verdicts, [run[name] for run in runs], resamples=10)["drop"]
    scores = {name: forecast[name] for name in drops}
    cells: dict[str, dict[str, float]] = {}
    for name, x in scores.items():
        cells.setdefault(name.partition("/")[0], {})[name] = x
    return {
        "score": scores,
        "drop": drops,
        **score(scores, drops),
        "within_domains": pooled_score([(cell, drops) for cell in cells.values()]),
    }


def _by_category(workdir: Workdir, name: str) -> ByDomain:
    """`domain/category` → verdicts."""
    verdicts: ByDomain = {}
    for row in read_jsonl(workdir / f"responses/{name}.jsonl"):
        verdicts.setdefault(f"{row['domain']}/{row.get('category', '')}", []).append(row["verdict"])
    return verdicts


def _warnings(
    ema: Mapping[str, Any], arms: Mapping[str, Mapping[str, list[list[str]]]]
) -> list[str]:
    del arms
    said: dict[str, list[str]] = {}
    for arm, entries in ema.items():
        for domain, entry in entries.items():
            for flag in entry["flags"]:
                if flag != "ceiling":
                    said.setdefault(flag, []).append(f"{domain} ({arm})")
    meaning = {
        "floor": "the base refuses a tenth or less, so little can drop",
        "n_too_small": "too few prompts to see a drop of 20 points",
        "many_invalid": "over a tenth of the responses are invalid",
    }
    return [f"{meaning.get(flag, flag)}: {', '.join(places)}" for flag, places in said.items()]


def _provenance(workdir: Workdir, config: StudyConfig) -> dict[str, Any]:
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
