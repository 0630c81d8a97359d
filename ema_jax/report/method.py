"""How a study was made: a paragraph, its settings as tables, and the words that the page uses."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ema_jax.report.drawing import label
from ema_jax.report.tables import MISSING, Row, Table

GLOSSARY = {
    "Arm": "one way to unlearn, run once per seed; base is the untouched model.",
    "AUROC": "area under the receiver operating characteristic curve; 0.5 is chance, 1 is perfect.",
    "Benign prompts": "harmless prompts, the contrast for concepts and the test for over-refusal.",
    "CE": "cross-entropy: here, training on the model's own responses to the retain set.",
    "CI": "confidence interval, 95 % everywhere on this page.",
    "Compliance": "a response that answers its prompt; by compliance: its rise over all responses.",
    "Concept vector": "mean activation on a domain's prompts minus the mean on benign prompts.",
    "Containment": "the share of EMA that an arm with retain data takes back, at a target that "
    "is still refused as seldom.",
    "Damaged": "an arm whose target responses are mostly neither refusals nor answers.",
    "EMA": "emergent misalignment: refusal lost in a domain that was not unlearned, against the "
    "base and paired prompt by prompt; positive is worse.",
    "Entanglement": "similarity of two domains' concept vectors at a layer.",
    "Erasure": "how much of a base concept vector the unlearned model lost.",
    "Forget set": "the model's own refusals in the target domain, which unlearning makes unlikely.",
    "Holm p": "p-value adjusted for the number of domains tested in an arm (Holm); of these runs, "
    "where the interval is also over other seeds.",
    "KL": "Kullback–Leibler divergence from the base, in nats per token.",
    "LoRA": "low-rank adaptation: small trainable matrices beside frozen weights.",
    "NLL": "negative log-likelihood, in nats per token.",
    "NPO": "negative preference optimisation, the objective on the forget set; β is its inverse "
    "temperature.",
    "Null": "what the figure would be if the domains' labels meant nothing: from permuted labels.",
    "Off topic, degenerate": "readable text that does not answer; empty, repeated or no language.",
    "Refusal rate": "refused / (refused + complied) responses; invalid ones are counted apart.",
    "Retain set": "the model's own responses in other domains, which unlearning should keep.",
    "Spearman ρ": "correlation of ranks, between −1 and 1.",
    "Target": "the domain whose refusals are unlearned.",
}


def paragraph(results: Mapping[str, Any]) -> str:
    """The method in a few sentences; "" where the study's settings were not recorded."""
    made = results.get("provenance", {}).get("settings")
    if not made:
        return ""
    prompts, asked = made["prompts"], made["generation"]
    counts = prompts["counts"]
    text = (
        f"{results['model']['id']} answered {counts['eval']} prompts per domain (source "
        f"{prompts['source']}), greedily and in at most {asked['max_new_tokens']} tokens; the "
        f"{made['judge']} judge sorted the responses. "
    )
    arms = [arm for arm in results["arms"] if arm in made["arms"]]
    if not arms:
        return text + "No arm was unlearned."
    draws = made["harvest"]["samples"]
    text += (
        f"Its own refusals to {counts['harvest']} further target prompts "
        f"({draws} response{'s' if draws != 1 else ''} each) are the forget set, its responses to "
        f"{counts['retain']} prompts of every other domain the retain set. "
    )
    text += " ".join(_arm(name, made["arms"][name]) for name in arms)
    seeds = made["seeds"]
    return text + (
        f" Each arm ran with {len(seeds)} seed{'s' if len(seeds) != 1 else ''}. Changes are paired "
        "with the base prompt by prompt; intervals are 95 %, and p-values within an arm are "
        "adjusted by Holm's method. Concept vectors are differences in means over "
        f"{counts['concept']} prompts per domain ({made['concepts']['poolings'][0]} pooling)"
        f"{_early(results)}."
    )


def _arm(name: str, arm: Mapping[str, Any]) -> str:
    if arm["trainable"] == "ablation":
        return f"{name}: the target's refusal direction projected out of the weights, no training."
    trained = f"LoRA of rank {arm['lora']['rank']}" if arm["trainable"] == "lora" else "parameters"
    text = (
        f"{name}: {arm['objective'].upper()} (β {arm['beta']:g}) on {trained}, "
        f"{arm['optimizer']} at rate {arm['learning_rate']:g}, at most {arm['max_steps']} steps of "
        f"{arm['batch_size']} examples"
    )
    if arm["retain_weight"]:
        text += f", with {arm['retain_objective'].upper()} at weight {arm['retain_weight']:g} on "
        text += "the retain set"
    stop = f"{100 * arm['stop_at']:g} %"
    return f"{text}; stopped once the target's dev refusal was at most {stop}."


def _early(results: Mapping[str, Any]) -> str:
    layers = results.get("forecast", {}).get("early_layers")
    return f"; the forecast reads layers {min(layers)} to {max(layers)}" if layers else ""


def arm_settings(results: Mapping[str, Any]) -> Table | None:
    """Table of every setting of every arm; bold where the arms differ. None if not recorded."""
    arms = results.get("provenance", {}).get("settings", {}).get("arms")
    if not arms:
        return None
    flat = {name: dict(_flattened(arm)) for name, arm in arms.items()}
    fields = list(dict.fromkeys(field for arm in flat.values() for field in arm))
    groups = []
    for field in fields:
        cells = tuple(_shown(arm.get(field)) for arm in flat.values())
        groups.append((field, (Row(cells, strong=len(set(cells)) > 1),)))
    return Table(
        "Settings of the arms; bold where they differ.",
        ("Setting", *flat),
        tuple(groups),
        tuple(range(len(flat) + 1)),
    )


def study_settings(results: Mapping[str, Any]) -> Table | None:
    """Table of every other setting of the study; None if they were not recorded."""
    settings = results.get("provenance", {}).get("settings")
    if not settings:
        return None
    parts: dict[str, list[Row]] = {}
    for name, value in settings.items():
        if name == "arms":
            continue
        nested = isinstance(value, Mapping) and value
        items = _flattened(value) if nested else [(name, value)]
        rows = parts.setdefault(label(name) if nested else "Study", [])
        rows += [Row((field, _shown(x))) for field, x in items]
    return Table(
        "Settings of the study, as its config says them.",
        ("Part", "Setting", "Value"),
        tuple((name, tuple(rows)) for name, rows in parts.items()),
        (0, 1, 2),
    )


def _flattened(value: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    made = []
    for key, inner in value.items():
        name = f"{above}{key}"
        made += _flattened(inner, f"{name}.") if _nested(inner) else [(name, inner)]
    return made


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _shown(value: Any) -> str:
    """A setting as text; of a folder of the machine only its name."""
    if value is None or value == "" or (isinstance(value, Sequence | Mapping) and not value):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return f"…/{PurePath(value).name}" if value.startswith(("/", "~")) else value
    if isinstance(value, Sequence):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
