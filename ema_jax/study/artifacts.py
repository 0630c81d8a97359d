"""Every file of a study's folder but the manifests: its path, its one reader and its one writer."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from ema_jax.concepts import vectors
from ema_jax.concepts.store import map_activations
from ema_jax.concepts.vectors import Activations, Concepts
from ema_jax.config import StudyConfig
from ema_jax.data.prompts import read_prompts, write_prompts
from ema_jax.runtime import distributed, files
from ema_jax.unlearning.harvest import Harvested

BASE = "base"
"""The untouched model's name, where an arm with a seed has `ARM.seed_K`."""

ACTIVATIONS = "activations.safetensors"
"""A captured model's file in the folder of a running stage, tensors `POOLING/DOMAIN`."""

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
    """Activations and metadata that a concept file is made from."""

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
JsonLines = Artifact[list[Row], Iterable[Row]]


class Artifacts:
    """The files of one study's folder. `run` stands for `base` or `Run.name`.

    Attributes:
        root: the folder.
        prompts: `prompts/SPLIT.jsonl`, split → prompts.
        benign_answers: the base's, for the utility figures.
        forget_set: refusals of the target.
        retain_set: refusals of the other domains, answers of the contrast.
        activations: the base's pooled residual streams, tensors `POOLING/DOMAIN`, read as a
            memory map; written by moving such a file there.
        layer_sweep: interventions on the base at every layer; null without any.
        forecast: of the drops, from the base alone.
        results: `results.json`.
        all_metrics: those of all runs.
        report: the folder of the page, `report/index.html`.
        figures: the folder of its figures.
    """

    def __init__(self, root: str | Path):
        self.root = root = Path(root)
        harvested = _read_harvested, _write_harvested
        self.prompts = Artifact(root / "prompts", read_prompts, write_prompts)
        self.benign_answers = Artifact(root / "harvest/benign_answers.jsonl", *harvested)
        self.forget_set = Artifact(
            root / "harvest/forget.jsonl", _read_forget_set, _write_forget_set
        )
        self.retain_set = Artifact(root / "harvest/retain.jsonl", *harvested)
        self.activations = Artifact(
            root / "concepts/base.activations.safetensors", _read_activations, _move
        )
        self.layer_sweep = self._json("concepts/sweep.json")
        self.forecast = self._json("forecast.json")
        self.results = self._json("results.json")
        self.all_metrics = self._json_lines("metrics.jsonl")
        self.report, self.figures = root / "report", root / "figures"

    def responses(self, run: str) -> JsonLines:
        """Verdicts on the responses to the evaluation prompts (`Judged.rows`)."""
        return self._json_lines(f"responses/{run}.jsonl")

    def evaluation(self, run: str) -> Json:
        """Utility; of the base also its screen, of arms drift and patching of concepts."""
        return self._json(f"evaluations/{run}.json")

    def concepts(self, run: str, pooling: str | None = None) -> Artifact[Concepts, ConceptInputs]:
        """Means and vectors of every domain; `pooling` names one other than the main one."""
        name = run if pooling is None else f"{run}.{pooling}"
        path = self.root / f"concepts/{name}.safetensors"
        return Artifact(path, vectors.load_concepts, _write_concepts)

    def weights(self, run: Run, *, adapters: bool) -> Path:
        """The folder of a trained model: PEFT adapters, or a whole checkpoint."""
        return self.root / f"{'adapters' if adapters else 'checkpoints'}/{run.folder}"

    def training_state(self, run: Run) -> Path:
        """The folder from which a killed run resumes."""
        return self.root / f"checkpoints/{run.name}"

    def dose(self, arm: str) -> Json:
        """The arm's learning rate and the trials that it was chosen from."""
        return self._json(f"doses/{arm}.json")

    def trajectory(self, run: Run) -> Json:
        """Dev rates during training, and why it stopped."""
        return self._json(f"trajectories/{run.name}.json")

    def metrics(self, run: Run) -> JsonLines:
        """A row a step; training itself appends them (`MetricsWriter`)."""
        return self._json_lines(f"metrics/{run.name}.jsonl")

    def failure(self, run: Run) -> Json:
        """The batch whose loss was not finite."""
        return self._json(f"failures/{run.name}.json")

    def profile(self, run: Run) -> Path:
        """The folder of a trace of some steps."""
        return self.root / f"profile/{run.name}"

    def export(self, run: Run) -> Path:
        """The folder of the merged model, a Hugging Face checkpoint."""
        return self.root / f"export/{run.folder}"

    def _json(self, name: str) -> Json:
        return Artifact(self.root / name, files.read_json, files.write_json)

    def _json_lines(self, name: str) -> JsonLines:
        return Artifact(self.root / name, files.read_jsonl, files.write_jsonl)


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


def by_pooling(tensors: Mapping[str, np.ndarray]) -> Pooled:
    """Tensors `POOLING/DOMAIN`, nested."""
    pooled: Pooled = {}
    for key, x in tensors.items():
        pooling, domain = key.split("/")
        pooled.setdefault(pooling, {})[domain] = x
    return pooled


def _read_activations(path: Path) -> Pooled:
    return by_pooling(map_activations(path))


def _move(path: Path, source: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    distributed.first_only(functools.partial(os.replace, source, path), f"moving {path.name}")


def _write_concepts(path: Path, made_from: ConceptInputs) -> None:
    found = vectors.concept_vectors(made_from.activations)
    vectors.save_concepts(path, made_from.activations, found, made_from.metadata)
