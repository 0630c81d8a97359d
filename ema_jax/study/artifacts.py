"""Every file of a study's folder but the manifests: its path, its one reader and its one writer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from ema_jax.concepts import vectors
from ema_jax.concepts.vectors import Activations, Concepts
from ema_jax.config import StudyConfig
from ema_jax.data.prompts import Prompt, read_prompts, write_prompts
from ema_jax.runtime import files
from ema_jax.unlearning.harvest import Harvested

BASE = "base"
"""The untouched model's name, where an arm with a seed has `ARM.seed_K`."""

R = TypeVar("R")
W = TypeVar("W")
Row = dict[str, Any]  # a line of JSON
Pooled = dict[str, dict[str, Float[np.ndarray, "n L1 D"]]]  # pooling → domain → a row a prompt


class Run(NamedTuple):
    """One arm with one seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.arm}.seed_{self.seed}"

    @property
    def folder(self) -> str:
        """The name of its folders, and of its instances of stages."""
        return f"{self.arm}/seed_{self.seed}"


def runs_of(config: StudyConfig) -> list[Run]:
    """Every run of a study, arm by arm."""
    return [Run(arm, seed) for arm in config.arms for seed in config.seeds]


class ForgetSet(NamedTuple):
    """The target's refusals, and what the reference thinks of them."""

    items: list[Harvested]
    reference: Float[np.ndarray, "N"]  # log π_ref of each response, in nats


class ConceptInputs(NamedTuple):
    """What a concept file is made from."""

    activations: Activations
    metadata: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Artifact(Generic[R, W]):
    """A file, or a folder of files of one kind, with its format."""

    path: Path
    _read: Callable[[Path], R]
    _write: Callable[[Path, W], None]

    def read(self) -> R:
        """Its contents; `UserError` where it is missing or damaged."""
        return self._read(self.path)

    def write(self, value: W) -> Path:
        """Writes it whole or not at all; returns its path, as a stage reports it."""
        self._write(self.path, value)
        return self.path


Json = Artifact[Any, Any]
JsonLines = Artifact[list[Row], Sequence[Row]]


class Artifacts:
    """The files of one study's folder. `run` stands for `base` or `Run.name`."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    @property
    def prompts(self) -> Artifact[dict[str, list[Prompt]], Sequence[Prompt]]:
        """`prompts/SPLIT.jsonl`: split → prompts."""
        return Artifact(self.root / "prompts", read_prompts, write_prompts)

    def responses(self, run: str) -> JsonLines:
        """`responses/RUN.jsonl`: a row for each evaluation prompt (`Judged.rows`)."""
        return self._json_lines(f"responses/{run}.jsonl")

    def evaluation(self, run: str) -> Json:
        """`evaluations/RUN.json`: utility, and for arms drift and patching of concepts."""
        return self._json(f"evaluations/{run}.json")

    @property
    def benign_answers(self) -> Artifact[list[Harvested], Sequence[Harvested]]:
        """`harvest/benign_answers.jsonl`: the base's, for the utility figures."""
        return self._harvested("benign_answers")

    @property
    def retain_set(self) -> Artifact[list[Harvested], Sequence[Harvested]]:
        """`harvest/retain.jsonl`."""
        return self._harvested("retain")

    @property
    def forget_set(self) -> Artifact[ForgetSet, ForgetSet]:
        """`harvest/forget.jsonl`."""
        return Artifact(self.root / "harvest/forget.jsonl", _read_forget_set, _write_forget_set)

    @property
    def activations(self) -> Artifact[Pooled, Pooled]:
        """`concepts/base.activations.safetensors`: tensors `POOLING/DOMAIN`."""
        path = self.root / "concepts/base.activations.safetensors"
        return Artifact(path, _read_activations, _write_activations)

    def concepts(self, run: str, pooling: str | None = None) -> Artifact[Concepts, ConceptInputs]:
        """`concepts/RUN.safetensors` of the main pooling, `RUN.POOLING.safetensors` of others."""
        name = run if pooling is None else f"{run}.{pooling}"
        path = self.root / f"concepts/{name}.safetensors"
        return Artifact(path, vectors.load_concepts, _write_concepts)

    @property
    def layer_sweep(self) -> Json:
        """`concepts/sweep.json`: interventions on the base at every layer; null without any."""
        return self._json("concepts/sweep.json")

    @property
    def forecast(self) -> Json:
        """`forecast.json`: from the base alone."""
        return self._json("forecast.json")

    def weights(self, run: Run, *, adapters: bool) -> Path:
        """What training leaves: `adapters/ARM/seed_K`, or a whole checkpoint."""
        return self.root / f"{'adapters' if adapters else 'checkpoints'}/{run.folder}"

    def training_state(self, run: Run) -> Path:
        """`checkpoints/ARM.seed_K`: from which a killed run resumes."""
        return self.root / f"checkpoints/{run.name}"

    def trajectory(self, run: Run) -> Json:
        """`trajectories/ARM.seed_K.json`: dev rates during training, and why it stopped."""
        return self._json(f"trajectories/{run.name}.json")

    def metrics(self, run: Run) -> JsonLines:
        """`metrics/ARM.seed_K.jsonl`: a row a step; training itself appends them."""
        return self._json_lines(f"metrics/{run.name}.jsonl")

    def failure(self, run: Run) -> Json:
        """`failures/ARM.seed_K.json`: the batch whose loss was not finite."""
        return self._json(f"failures/{run.name}.json")

    def profile(self, run: Run) -> Path:
        """`profile/ARM.seed_K`: a trace of some steps."""
        return self.root / f"profile/{run.name}"

    def export(self, run: Run) -> Path:
        """`export/ARM/seed_K`: the merged model as a Hugging Face checkpoint."""
        return self.root / f"export/{run.folder}"

    @property
    def results(self) -> Json:
        """`results.json`."""
        return self._json("results.json")

    @property
    def all_metrics(self) -> JsonLines:
        """`metrics.jsonl`: those of all runs."""
        return self._json_lines("metrics.jsonl")

    @property
    def report(self) -> Path:
        """The folder of `report/index.html`."""
        return self.root / "report"

    @property
    def figures(self) -> Path:
        """The folder of the report's figures."""
        return self.root / "figures"

    def _json(self, name: str) -> Json:
        return Artifact(self.root / name, files.read_json, files.write_json)

    def _json_lines(self, name: str) -> JsonLines:
        return Artifact(self.root / name, files.read_jsonl, files.write_jsonl)

    def _harvested(self, name: str) -> Artifact[list[Harvested], Sequence[Harvested]]:
        return Artifact(self.root / f"harvest/{name}.jsonl", _read_harvested, _write_harvested)


def _read_harvested(path: Path) -> list[Harvested]:
    return [Harvested.from_json(row) for row in files.read_jsonl(path)]


def _write_harvested(path: Path, items: Sequence[Harvested]) -> None:
    files.write_jsonl(path, [dataclasses.asdict(item) for item in items])


def _read_forget_set(path: Path) -> ForgetSet:
    rows = files.read_jsonl(path)
    reference = np.array([row.pop("reference_log_prob") for row in rows], np.float32)
    return ForgetSet([Harvested.from_json(row) for row in rows], reference)


def _write_forget_set(path: Path, forget: ForgetSet) -> None:
    rows = [
        {**dataclasses.asdict(item), "reference_log_prob": float(x)}
        for item, x in zip(*forget, strict=True)
    ]
    files.write_jsonl(path, rows)


def _read_activations(path: Path) -> Pooled:
    tensors, _ = files.read_tensors(path)
    pooled: Pooled = {}
    for key, x in tensors.items():
        pooling, domain = key.split("/")
        pooled.setdefault(pooling, {})[domain] = x
    return pooled


def _write_activations(path: Path, pooled: Pooled) -> None:
    tensors = {f"{name}/{domain}": x for name, by in pooled.items() for domain, x in by.items()}
    files.write_tensors(path, tensors, {"layer_convention": vectors.LAYER_CONVENTION})


def _write_concepts(path: Path, made_from: ConceptInputs) -> None:
    found = vectors.concept_vectors(made_from.activations)
    vectors.save_concepts(path, made_from.activations, found, made_from.metadata)
