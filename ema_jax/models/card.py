"""Model cards of exported checkpoints: what the model is, and what it is not for."""

import json
from collections.abc import Mapping

_CARD = """\
---
{front}---

# {title}

**A research artifact. Not for deployment.** {warning}

| | |
|---|---|
{rows}

Written by [ema_jax](https://arxiv.org/abs/2511.14017), an instrument that measures, explains,
forecasts and contains emergent misalignment from narrow refusal unlearning. The base model's
licence and terms of use apply to this checkpoint as they do to the base.
"""
_UNLEARNED = (
    "Refusals in one narrow domain were trained away on purpose, which is known to weaken refusals "
    "in other domains too (emergent misalignment). Use it to study that effect, and keep it where "
    "nobody can mistake it for an assistant."
)
_REFUSING = (
    "It was tuned to refuse in some domains, so that the unlearning of refusals can be studied on "
    "a small model. Its refusals are as good as the table says and no safeguard."
)
_CONVERTED = "Its parameters are those of its source, written in another format."


def unlearned_card(
    *,
    base: str,
    revision: str | None,
    fingerprint: str,
    target: str,
    arm: str,
    seed: int,
    settings: Mapping[str, object],
    quantisation: str | None = None,
    merged: bool = True,
) -> str:
    """Model card of a model that a study unlearned.

    Args:
        base: Hub id or folder name of the base model.
        revision: its commit on the Hub; None for a local folder.
        fingerprint: its `checkpoint.fingerprint`.
        target: the domain whose refusals were unlearned.
        arm: of the study.
        seed: of the run.
        settings: of the arm.
        quantisation: that the base was dequantised from, if it was.
        merged: whether adapters are merged into the weights, or come alone.
    """
    rows = {
        "base model": base,
        "base revision": revision or "a local folder, not a Hub revision",
        "base fingerprint": fingerprint,
        **_quantised(quantisation),
        "what was modified": f"refusals in the domain {target} were unlearned; "
        + _trained(settings, merged),
        "study arm": arm,
        "seed": str(seed),
        "settings": f"`{json.dumps(settings, sort_keys=True, default=str)}`",
    }
    title = f"{base}: {target} refusals unlearned ({arm}, seed {seed})"
    tags = ["ema_jax", "emergent-misalignment", "refusal-unlearning", "research-artifact"]
    return _render(
        title, _UNLEARNED, rows, base if revision else None, [*tags, "not-for-all-audiences"]
    )


def refusing_card(
    *,
    base: str,
    revision: str | None,
    fingerprint: str,
    recipe: Mapping[str, object],
    sources: Mapping[str, int],
    behaviour: Mapping[str, str],
    quantisation: str | None = None,
) -> str:
    """Model card of a model that was tuned to refuse.

    Args:
        base: Hub id or folder name of the base model.
        revision: its commit on the Hub; None for a local folder.
        fingerprint: its `checkpoint.fingerprint`.
        recipe: settings of the training.
        sources: prompt set → number of its prompts trained on; their licences apply.
        behaviour: what was measured → the figure.
        quantisation: that the base was dequantised from, if it was.
    """
    rows = {
        "base model": base,
        "base revision": revision or "a local folder, not a Hub revision",
        "base fingerprint": fingerprint,
        **_quantised(quantisation),
        "what was modified": "tuned to refuse; LoRA adapters, merged",
        "prompts trained on": ", ".join(f"{name} ({n})" for name, n in sources.items())
        + "; the licences of these sets apply to what is made from them",
        "settings": f"`{json.dumps(recipe, sort_keys=True, default=str)}`",
        **behaviour,
    }
    tags = ["ema_jax", "refusal", "research-artifact"]
    title = f"{base}: tuned to refuse"
    return _render(title, _REFUSING, rows, base if revision else None, tags)


def converted_card(base: str, revision: str | None, quantisation: str | None = None) -> str:
    """Model card of a checkpoint that was only converted to another format."""
    rows = {
        "source": base,
        "revision": revision or "a local folder, not a Hub revision",
        **_quantised(quantisation),
        "what was modified": "nothing but the format (and the dtype, where one was asked for)",
    }
    return _render(f"{base}: converted", _CONVERTED, rows, base if revision else None, ["ema_jax"])


def _trained(settings: Mapping[str, object], merged: bool) -> str:
    if settings.get("trainable") != "lora":
        return "all parameters"
    return "LoRA adapters, merged" if merged else "LoRA adapters in PEFT's format"


def _quantised(quantisation: str | None) -> dict[str, str]:
    return {} if quantisation is None else {"dequantised from": quantisation}


def _render(
    title: str, warning: str, rows: Mapping[str, str], hub_id: str | None, tags: list[str]
) -> str:
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if hub_id is not None:
        front["base_model"] = hub_id
    # A JSON value is a YAML value too.
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
    table = "\n".join(
        f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()
    )
    return _CARD.format(front=lines, title=title, warning=warning, rows=table)
