"""What `adapter_config.json` of PEFT says, where it describes plain LoRA and nothing else."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ema_jax.errors import UserError
from ema_jax.models import folder_links
from ema_jax.runtime.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

MAX_RANK = 1 << 16
"""No model is wider, and no rank exceeds the width."""

# Fields that are read here, and those that change nothing in a trained adapter. Any other field,
# of today's PEFT or of a later one, may hold nothing but its empty value.
_READ = {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules"}
_READ |= {"exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias"}
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# Those that leave the base's weights as they are. PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and
# similar ones train against a changed base, which the adapter does not hold.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """A plain LoRA adapter: its size, and the modules that have one.

    Attributes:
        rank: of every module's factors.
        alpha: numerator of the scale.
        rslora: whether the scale is `alpha / √rank`.
        modules: names, or ends of names, of adapted modules; None for what the tensors name (PEFT
            takes a regular expression too).
        excluded: names, or ends of names, of modules left out.
        layers: the adapted layers; None for all.
    """

    rank: int
    alpha: float
    rslora: bool
    modules: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None

    def adapts(self, name: str, stored: Collection[str]) -> bool:
        """Whether the adapter has factors for a module.

        Args:
            name: of the module, as in the adapter's tensors.
            stored: all modules that the tensors name.
        """
        if self.modules is None:
            return name in stored
        if _matches(name, self.excluded) or not _matches(name, self.modules):
            return False
        # PEFT looks at no layer of a module that is named in full.
        in_full = name.removeprefix("base_model.model.") in self.modules
        layer = int(name.partition(".layers.")[2].partition(".")[0])
        return in_full or self.layers is None or layer in self.layers


def _matches(name: str, ends: tuple[str, ...]) -> bool:
    return any(name.endswith(f".{end}") for end in ends)


def read(folder: str | Path) -> PeftConfig:
    """Reads the description of an adapter, and makes sure that its tensors are there.

    Raises:
        UserError: the folder holds something else, or the adapter is no plain LoRA.
    """
    folder = Path(folder)
    path = folder / ADAPTER_CONFIG
    folder_links.check(folder)
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{folder}: {_what_else(folder)}")
    found = read_json(path)
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is not LORA")
    _refuse_others(found, path)
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        raise UserError(f"{path}: r is missing or no whole number from 1 to {MAX_RANK}")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:  # type: ignore[operator]
        raise UserError(f"{path}: lora_alpha is missing or no number above 0")
    rslora = found.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise UserError(f"{path}: use_rslora is {rslora!r}, expected true or false")
    layers = found.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers and not (isinstance(layers, list) and all(type(i) is int for i in layers)):
        raise UserError(f"{path}: layers_to_transform is {layers!r}, expected numbers of layers")
    excluded = found.get("exclude_modules") or []
    by_name = all(_are_names(found.get(key)) for key in ("target_modules", "exclude_modules"))
    modules = found.get("target_modules") if by_name else None
    return PeftConfig(
        rank,
        float(alpha),  # type: ignore[arg-type]
        rslora,
        tuple(modules) if modules else None,
        tuple(excluded) if by_name else (),
        tuple(layers) if layers else None,
    )


def _are_names(value: Any) -> bool:
    return not value or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _refuse_others(found: Mapping[str, Any], path: Path) -> None:
    wrong: dict[str, Any] = {}
    # 0 and 1 equal False and True, and are no names of an initialisation.
    start = found.get("init_lora_weights")
    if start not in _INITIALISATIONS or type(start) is int:
        wrong["init_lora_weights"] = start
    for key, value in found.items():
        if key not in _READ | _HARMLESS and value not in (None, False, "", [], {}):
            wrong[key] = value
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        wrong["task_type"] = found["task_type"]
    if found.get("bias") not in (None, "none"):
        wrong["bias"] = found["bias"]
    if found.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        wrong["layers_pattern"] = found["layers_pattern"]
    if wrong:
        key, value = next(iter(wrong.items()))
        raise UserError(
            f"{path}: {key} = {repr(value)[:80]} is not supported: only plain LoRA on an "
            "unchanged base is; merge it with PEFT (merge_and_unload) and load the result"
        )


def _what_else(folder: Path) -> str:
    """Says what stands in place of an adapter's tensors, and what to do."""
    if not folder.is_dir():
        return "no such folder of an adapter"
    pickled = next((p.name for p in sorted(folder.glob("adapter_model*.bin"))), None)
    if pickled is not None:
        return (
            f"holds {pickled}, which is pickled, and no {WEIGHTS}; load it with PEFT and save it "
            "again (save_pretrained)"
        )
    if (other := next(iter(sorted(folder.glob("adapter*.safetensors"))), None)) is not None:
        return f"holds {other.name} and no {WEIGHTS}; save it again under that name"
    if (folder / ADAPTER_CONFIG).exists():
        return f"holds {ADAPTER_CONFIG} without {WEIGHTS}; is the download complete?"
    if (folder / "config.json").exists():
        return "a model (config.json) and no adapter; name it as the source"
    return f"no adapter: neither {ADAPTER_CONFIG} nor {WEIGHTS}"
