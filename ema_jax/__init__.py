"""ema_jax: measure, explain, forecast and contain emergent misalignment from refusal unlearning.

The pieces by their plain names, each usable alone in a notebook. They are imported when first
used, so that `import ema_jax` is quick and touches no device.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_HOME = {
    "Chat": "ema_jax.data.chat",
    "Decoder": "ema_jax.models.decoder",
    "DecoderConfig": "ema_jax.models.config",
    "LoRAConfig": "ema_jax.models.lora",
    "UnlearnConfig": "ema_jax.unlearning.config",
    "all_pairs": "ema_jax.concepts.entanglement",
    "attach_lora": "ema_jax.models.lora:attach",
    "capture": "ema_jax.concepts.capture",
    "cka": "ema_jax.concepts.cka",
    "concept_vectors": "ema_jax.concepts.vectors",
    "containment": "ema_jax.refusal.paired",
    "entanglement": "ema_jax.concepts.entanglement",
    "erasure": "ema_jax.concepts.erasure",
    "export": "ema_jax.models.checkpoint",
    "forecast": "ema_jax.concepts.forecast",
    "generate": "ema_jax.generation.sampler",
    "get_judge": "ema_jax.refusal.judges",
    "intervene": "ema_jax.concepts.interventions",
    "load": "ema_jax.models.checkpoint",
    "load_peft": "ema_jax.models.lora",
    "make_mesh": "ema_jax.models.sharding",
    "merge_lora": "ema_jax.models.lora:merge",
    "npo_loss": "ema_jax.unlearning.objectives",
    "paired_drop": "ema_jax.refusal.paired",
    "plot_entanglement": "ema_jax.plots",
    "plot_layers": "ema_jax.plots",
    "plot_sweep": "ema_jax.plots",
    "reference_log_probs": "ema_jax.unlearning.reference",
    "refusal_rate": "ema_jax.refusal.scores",
    "respond": "ema_jax.generation.sampler",
    "save_peft": "ema_jax.models.lora",
    "unlearn": "ema_jax.unlearning.trainer",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ema_jax' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
