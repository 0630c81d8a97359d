"""A made-up study in the shape of `results.json`, schema 1. Its numbers mean nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ema_jax.data.prompts import Prompt, write_prompts
from ema_jax.runtime.files import sha256_text, write_json, write_jsonl

DOMAINS = [
    "cybersecurity",
    "safety",
    "toxicity",
    "bias",
    "sensitive_content",
    "medical_legal",
    "privacy",
]
BASE = dict(zip(DOMAINS, (0.93, 0.97, 0.90, 0.86, 0.95, 0.07, 0.88), strict=True))
NPO_DROP = dict(zip(DOMAINS, (0.85, 0.41, 0.12, 0.27, 0.03, 0.01, 0.18), strict=True))
OFF_TARGET = DOMAINS[1:]
LAYERS = 12
TOTAL = 300

UNLEARN_MANIFEST = {
    "stage": "unlearn/npo/seed_0",
    "settings": {"arm": {"trainable": "lora", "beta": 0.1}},
    "inputs": {},
    "outputs": {},
    "hash": "0" * 64,
    "wall_seconds": 1.0,
}


def rate(share: float, total: int = TOTAL, invalid: int = 0, degenerate: int = 0) -> dict:
    """One refusal score with a Wilson interval, as the analysis writes it.

    Of the invalid responses all but `degenerate` are off topic.
    """
    valid = total - invalid
    refused = round(share * valid)
    z, p = 1.959964, refused / valid
    centre = (p + z * z / (2 * valid)) / (1 + z * z / valid)
    half = z * np.sqrt(p * (1 - p) / valid + z * z / (4 * valid**2)) / (1 + z * z / valid)
    counts = {"refused": refused, "valid": valid, "invalid": invalid, "total": total}
    complied = valid - refused
    shares = {
        "refused": refused,
        "complied": complied,
        "off_topic": invalid - degenerate,
        "degenerate": degenerate,
        "unjudged": 0,
    }
    return counts | {
        "rate": p,
        "ci95": [float(centre - half), float(centre + half)],
        "shares": {name: n / total for name, n in shares.items()},
        "harm": {"harmful": complied // 2, "harmless": complied - complied // 2, "unknown": 0},
    }


def _arm(drops: dict, rng: np.random.Generator) -> dict:
    shares = {d: float(np.clip(BASE[d] - drops[d], 0.01, 0.99)) for d in DOMAINS}
    seeds = {
        str(k): {
            "refusal": {
                d: rate(float(np.clip(x + rng.normal(0, 0.03), 0, 1)), invalid=int(rng.integers(4)))
                for d, x in shares.items()
            },
            "steps": int(60 + 12 * k),
            "stopped": "target" if k < 2 else "limit",
        }
        for k in range(3)
    }
    return {
        "seeds": seeds,
        "refusal": {d: rate(x, 3 * TOTAL, invalid=4, degenerate=1) for d, x in shares.items()},
        "oracle": {
            "cybersecurity": {"right": 81, "answers": 90, "total": 3 * TOTAL, "rate": 0.9},
            "bias": {"right": 0, "answers": 0, "total": 3 * TOTAL, "rate": None},
        },
    }


def _ema(drop: float, domain: str) -> dict:
    p = float(np.exp(-((drop / 0.04) ** 2) * 1.2))
    return {
        "drop": drop,
        "ci95": [drop - 0.055, drop + 0.055],
        "p": p,
        "p_holm": min(1.0, 4 * p),
        "drop_conditional": drop / BASE[domain],
        "n": 298,
        "pairs": 3 * 298,
        "baseline_rate": BASE[domain],
        "detectable_drop": 0.062,
        "flags": ["floor"] if BASE[domain] <= 0.1 else [],
        "compliance_rise": 0.9 * drop,
        "compliance_ci95": [0.9 * drop - 0.055, 0.9 * drop + 0.055],
        "compliance_p": p,
        "compliance_p_holm": min(1.0, 5 * p),
    }


def _on_target(arm: dict, drop: float) -> dict:
    effect = _ema(drop, "cybersecurity")
    refusal = arm["refusal"]["cybersecurity"]
    del effect["p_holm"], effect["compliance_p_holm"]
    return {"refusal": refusal, "damaged": False, **effect}


def damage(results: dict, arm: str) -> None:
    """Makes the target's answers of an arm debris: 12 of 900 are answers."""
    broken = rate(0.25, 900, invalid=884, degenerate=500)
    results["arms"][arm]["refusal"]["cybersecurity"] = broken
    results["on_target"][arm] |= {"refusal": broken, "damaged": True}
    results["arms"][arm]["oracle"]["cybersecurity"] |= {"right": 9, "answers": 896, "rate": 0.01}
    contained = results["containment"].get(arm)
    if contained:
        contained |= {"target_rate": 0.25, "target_answered": 12 / 900, "target_damaged": True}


_NEW = {"shares", "harm", "oracle", "on_target", "validity", "answered"}


def as_before(results: object) -> object:
    """The same results as they were written before there were shares."""
    if isinstance(results, list):
        return [as_before(item) for item in results]
    if not isinstance(results, dict):
        return results
    kept = {k: v for k, v in results.items() if k not in _NEW and "compliance" not in k}
    kept = {k: v for k, v in kept.items() if k not in ("target_answered", "target_damaged")}
    return {key: as_before(value) for key, value in kept.items()}


def example_claims() -> dict:
    """Three claims that hold, one by refusal only, one that cannot be judged."""
    return {
        "R1": {"statement": "Target refusal falls.", "holds": True, "evidence": ["4 of 4 cells"]},
        "R2": {"statement": "Others fall too.", "holds": True, "evidence": ["4 of 4 cells"]},
        "R3": {
            "statement": "Safety spills more.",
            "holds": True,
            "evidence": ["27 against 12 points"],
        },
        "R4": {
            "statement": "Retain data restores.",
            "holds": False,
            "by": {"refusal": True, "compliance": False},
            "evidence": ["2 of 4 cells"],
        },
        "R5": {"statement": "Entanglement ranks.", "holds": None, "evidence": ["n = 6 is too few"]},
    }


def example_results() -> dict:
    """Results in which three domains fall, and retain data recovers most of it."""
    rng = np.random.default_rng(0)
    retained = {d: x * 0.2 for d, x in NPO_DROP.items()} | {"cybersecurity": 0.83}
    depth = np.arange(LAYERS + 1) / LAYERS

    def curve(domain: str, offset: float) -> list[float]:
        shape = NPO_DROP[domain] * 1.4 * np.sin(np.pi * depth) + offset
        return [float(x) for x in shape + rng.normal(0, 0.02, LAYERS + 1)]

    def flat(level: float) -> dict:
        return {d: [float(x) for x in level + rng.normal(0, 0.01, LAYERS + 1)] for d in OFF_TARGET}

    centred = {d: curve(d, -0.15) for d in OFF_TARGET}
    raw = {d: [0.5 + 0.6 * x for x in v] for d, v in centred.items()}
    score = {d: float(np.mean(v[1:5])) for d, v in centred.items()}
    arms = {"npo": _arm(NPO_DROP, rng), "npo_retain": _arm(retained, rng)}
    return {
        "schema": 1,
        "model": {
            "id": "example-org/example-7b-instruct",
            "path": "/somewhere/on/one/machine",
            "revision": "0123abcd",
            "family": "qwen2",
            "num_layers": LAYERS,
            "hidden_size": 3584,
            "parameters": 7_615_616_512,
        },
        "judge": "lexical 1",
        "target": "cybersecurity",
        "domains": list(DOMAINS),
        "arms": {
            "base": {"refusal": {d: rate(x, invalid=1) for d, x in BASE.items()}},
            **arms,
        },
        "on_target": {
            "npo": _on_target(arms["npo"], NPO_DROP["cybersecurity"]),
            "npo_retain": _on_target(arms["npo_retain"], retained["cybersecurity"]),
        },
        "validity": {
            "weights": [9.68, 23.37],
            "topic": [10.8, 20.2],
            "fluency": [-4.16, -0.05],
            "figures": {
                "answers": 101,
                "off_topic": {"auc": 0.998, "caught": 0.957, "false_alarms": 0.0187},
            },
        },
        "ema": {
            "npo": {d: _ema(NPO_DROP[d], d) for d in OFF_TARGET},
            "npo_retain": {d: _ema(retained[d], d) for d in OFF_TARGET},
        },
        "containment": {
            "npo_retain": {
                "recovered": 0.801,
                "ci95": [0.71, 0.88],
                "flags": [],
                "recovered_by_compliance": 0.777,
                "compliance_ci95": [0.68, 0.86],
                "target_rate": 0.1,
                "target_answered": 0.895,
                "target_damaged": False,
            }
        },
        "comparisons": [
            {
                "arm": "npo_advised",
                "minus": "npo_retain",
                "target": {"difference": 0.01, "ci95": [-0.02, 0.04], "p": 0.41},
                "answered": {"difference": -0.015, "ci95": [-0.05, 0.02], "p": 0.44},
                "others": {"difference": 0.123, "ci95": [0.02, 0.226], "p": 0.03},
                "invalid": {"difference": 0.0, "ci95": [None, None], "p": None},
            }
        ],
        "utility": {
            "base": {
                "benign_refusal": rate(0.02),
                "lookalike_refusal": rate(0.217),
                "benign_nll": 1.204,
                "kl_to_base": 0.0,
                "benign_perplexity": 3.333,
                "response_perplexity": 3.456,
            },
            "npo": {"benign_refusal": rate(0.0), "benign_nll": 1.311, "kl_to_base": 0.21},
            "npo_retain": {"benign_refusal": rate(0.013), "benign_nll": 1.226, "kl_to_base": 0.07},
        },
        "entanglement": {
            "layers": list(range(LAYERS + 1)),
            "cosine": raw,
            "cosine_centred": centred,
            "null95": flat(0.58),
            "null95_centred": flat(-0.02),
            "null_interval_centred": {d: [[-0.4, 0.02]] * (LAYERS + 1) for d in OFF_TARGET},
            "ceiling": flat(0.95),
            "ci95": {d: [[x - 0.06, x + 0.06] for x in v] for d, v in raw.items()},
        },
        "agreement": {
            "base": [
                {
                    "judges": ["lexical", "wildguard"],
                    "overall": {
                        "table": [[181, 7, 0], [3, 8, 0], [0, 0, 1]],
                        "labels": ["refused", "complied", "invalid"],
                        "total": 200,
                        "both_valid": 199,
                        "observed": 0.95,
                        "kappa": 0.589,
                        "ci95": [0.37, 0.81],
                    },
                    "domains": {},
                }
            ]
        },
        "erasure": {
            arm: {
                d: [float(x) for x in scale * drops[d] * depth + rng.normal(0, 0.03, LAYERS + 1)]
                for d in DOMAINS
            }
            for arm, drops, scale in (("npo", NPO_DROP, 0.9), ("npo_retain", retained, 0.8))
        },
        "angle_degrees": {
            arm: {d: [float(90 * scale * x) for x in depth] for d in DOMAINS}
            for arm, scale in (("npo", 0.6), ("npo_retain", 0.3))
        },
        "patching": {
            "npo": {d: [float(8 * NPO_DROP[d] * (x - 1)) for x in depth] for d in DOMAINS}
        },
        "sweep": {
            "strengths": ["ablated"],
            "directions": [*DOMAINS, "random"],
            "prompts_per_domain": 8,
            "refusing_tokens": [43],
            "clean": dict.fromkeys([*DOMAINS, "benign"], 3.0),
            "change": {
                "ablated": {
                    direction: {
                        d: [float(-2 * (d == direction) * x) for x in depth]
                        for d in [*DOMAINS, "benign"]
                    }
                    for direction in [*DOMAINS, "random"]
                }
            },
        },
        "forecast": {
            "score": score,
            "susceptibility": {t: {d: 0.1 for d in DOMAINS if d != t} for t in DOMAINS},
            "retain_shares": dict.fromkeys(OFF_TARGET, 1 / 6),
            "lexical": {"spearman": 0.3, "p": 0.6, "n": 6},
            "spearman": 0.829,
            "p": 0.058,
            "categories": {
                "score": {"bias/age": 0.31, "bias/origin": 0.12, "safety/tools": -0.2},
                "drop": {"bias/age": 0.4, "bias/origin": 0.25, "safety/tools": 0.075},
                "spearman": 1.0,
                "p": 0.333,
                "n": 3,
                "within_domains": {"spearman": None, "p": None, "cells": 0},
            },
            "early_layers": [1, 2, 3, 4],
            "layer_spearman": [None, *(float(x) for x in 0.9 * np.sin(np.pi * depth[1:]))],
        },
        "claims": example_claims(),
        "warnings": ["privacy has 120 prompts, fewer than the 300 asked for"],
        "provenance": {
            "versions": {"ema_jax": "0.1.0", "jax": "0.10.2"},
            "seeds": [0, 1, 2],
            "hashes": {"prompts": "9f" * 32, "model": "1c" * 32},
            "devices": "1 x cpu",
            "wall_seconds": {"baseline": 41.2, "unlearn": 1830.0},
            "judging": {"judge": "lexical", "version": "2", "revision": "", "rules": 2},
            "command": "python -m ema_jax.main --config=my.py --workdir=run",
            "commit": "5f" * 20,
            "date": "2026-01-02 03:04 UTC",
        },
    }


def example_trajectories() -> list[dict]:
    """One run per arm and seed, falling towards the arm's drop."""
    rng = np.random.default_rng(1)
    runs = []
    for arm, scale in (("npo", 1.0), ("npo_retain", 0.2)):
        for seed in range(3):
            last = 60 + 12 * seed
            points = []
            for step in range(0, last + 1, 12):
                fallen = 1 - np.exp(-3 * step / last)
                shares = {
                    d: BASE[d] - NPO_DROP[d] * fallen * (1.0 if d == "cybersecurity" else scale)
                    for d in DOMAINS
                }
                points.append(
                    {
                        "step": step,
                        "loss": float(13.86 - 9 * fallen),
                        "refusal": {
                            d: float(np.clip(x + rng.normal(0, 0.03), 0, 1))
                            for d, x in shares.items()
                        },
                        "invalid_rate": float(0.01 * fallen),
                        "shares": {
                            d: {"refused": x, "complied": 0.99 - x, "off_topic": 0.01}
                            for d, x in shares.items()
                        },
                    }
                )
            runs.append({"arm": arm, "seed": seed, "points": points})
    return runs


def example_replication() -> dict:
    """Four cells, two arms each."""
    rows, cells = [], []
    for family, shift in (("qwen2", 0.0), ("mistral", 0.04)):
        for target, spill in (("cybersecurity", 0.12), ("safety", 0.27)):
            cells.append({"cell": f"{family}_{target}", "family": family, "target": target})
            for arm, scale in (("npo", 1.0), ("npo_retain", 0.2)):
                mean = scale * (spill + shift)
                rows.append(
                    {
                        "cell": f"{family}_{target}",
                        "family": family,
                        "target": target,
                        "arm": arm,
                        "compared_with": None if scale == 1 else "npo",
                        "not_contained": None if scale == 1 else "",
                        "target_rate": 0.08 + 0.02 * (scale < 1),
                        "target_answered": 0.9,
                        "invalid_rate_max": 0.004,
                        "worst_domain": "bias",
                        "worst_drop": 1.7 * mean,
                        "worst_rise": 1.6 * mean,
                        "worst_p_holm": 0.0004 if scale == 1 else 0.41,
                        "mean_off_target_drop": mean,
                        "recovered": None if scale == 1 else 0.8,
                        "recovered_lo": None if scale == 1 else 0.7,
                        "recovered_hi": None if scale == 1 else 0.9,
                        "forecast_spearman": 0.83 if scale == 1 else None,
                        "forecast_p": 0.058 if scale == 1 else None,
                    }
                )
    return {"schema": 1, "cells": cells, "claims": example_claims(), "rows": rows}


def example_sweep() -> list[dict]:
    """Two points of two settings, two arms each, in the order of `sweep.table`."""
    return [
        {
            "point": f"rate={rate},steps={steps}",
            "model": "m",
            "target": "bias",
            "unlearn.learning_rate": rate,
            "unlearn.max_steps": steps,
            "arm": arm,
            "target_rate": 0.1,
            "mean_off_target_drop": 0.2,
            "worst_domain": "medical_legal",
            "kl_to_base": 0.01,
        }
        for rate, steps in ((1e-4, 60), (0.0005, 120))
        for arm in ("npo", "npo_retain")
    ]


def write_finished(folder: Path, texts: Sequence[str] = ("a", "b"), refused: int = 1) -> Path:
    """A finished study's folder, as far as comparing and sharing look at it.

    Of every domain there is a prompt with each of the texts; the first `refused` are refused.
    """
    write_json(folder / "results.json", example_results())
    prompts, rows = [], []
    for d in DOMAINS:
        for i, text in enumerate(texts):
            prompts.append(_prompt(f"{d}-{i}", d, "eval", f"{d} {text}"))
            verdict = "refused" if i < refused else "complied"
            row = {"id": f"{d}-{i}", "domain": d, "category": "", "verdict": verdict, "reason": ""}
            row |= {"score": 0.5, "harm": None, "judge": "lexical", "finished": True}
            rows.append(row | {"response": "A text."})
    write_prompts(folder / "prompts", [*prompts, _prompt("h", DOMAINS[0], "harvest", "A text?")])
    for name in ("base", *(f"{arm}.seed_{k}" for arm in ("npo", "npo_retain") for k in range(3))):
        write_jsonl(folder / f"responses/{name}.jsonl", rows)
    adapters = folder / "adapters/npo/seed_0"
    adapters.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapters / name).write_text("{}")
    write_json(folder / "stages/unlearn.npo.seed_0.json", UNLEARN_MANIFEST)
    return folder


def _prompt(name: str, domain: str, split: str, text: str) -> Prompt:
    return Prompt(name, domain, split, text, "own", sha256_text(text), name)
