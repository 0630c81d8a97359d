"""Train one arm on what a study harvested: the data, the checkpoints, the record of a failure."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from ema_jax.data.chat import Chat, TokenExample
from ema_jax.errors import RunStoppedError
from ema_jax.models.decoder import Decoder
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.runtime import files
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.harvest import Harvested, retained
from ema_jax.unlearning.metrics import MetricsWriter, Profile
from ema_jax.unlearning.objectives import FORGET
from ema_jax.unlearning.preferred import preferred_responses
from ema_jax.unlearning.run_checkpoints import Checkpoints, NonFiniteError
from ema_jax.unlearning.trainer import Trained, unlearn


def train_arm(
    workdir: Path,
    arm: str,
    seed: int,
    config: UnlearnConfig,
    *,
    base: Decoder,
    chat: Chat,
    target: str,
    evaluate: Callable[[Decoder], Evaluation],
    mesh: Mesh,
    checkpoints: Checkpoints,
    profile: int = 0,
) -> Trained:
    """Trains an arm with one seed, or goes on where it was stopped.

    Args:
        workdir: the study's folder, with its `harvest/`.
        arm: its name.
        seed: of adapters and batches.
        config: its settings.
        base: the untouched model.
        chat: its tokenizer and template.
        target: the domain whose refusals are unlearned.
        evaluate: dev rates of a model.
        mesh: what the base lies on.
        checkpoints: of this run.
        profile: steps of which a trace is written.

    Raises:
        UserError: retain or preferred examples that are asked for and not there.
        RunStoppedError: see `unlearn`; of what is not finite, the batch is in `failures/`.
    """
    name = f"{arm}.seed_{seed}"
    rows = files.read_jsonl(workdir / "harvest/forget.jsonl")
    reference = np.array([row.pop("reference_log_prob") for row in rows], np.float32)
    forget = [Harvested.from_json(row) for row in rows]
    retain = [
        Harvested.from_json(row) for row in files.read_jsonl(workdir / "harvest/retain.jsonl")
    ]
    retain = retained(retain, config.retain_counts)
    with MetricsWriter(workdir, arm, seed) as metrics, checkpoints:
        try:
            return unlearn(
                base,
                [item.example(chat) for item in forget],
                [item.example(chat) for item in retain],
                reference,
                config,
                seed=seed,
                target=target,
                evaluate=evaluate,
                preferred=_preferred(config, forget, chat),
                mesh=mesh,
                log=metrics,
                checkpoints=checkpoints,
                profile=Profile(workdir / "profile" / name, profile) if profile else None,
            )
        except NonFiniteError as error:
            path = workdir / f"failures/{name}.json"
            ids = {
                "forget": [forget[i].id for i in error.forget],
                "retain": [retain[i].id for i in error.retain],
            }
            files.write_json(path, {"step": error.step, "error": str(error), **ids})
            raise RunStoppedError(f"{error}; its batch is in {path}") from None


def _preferred(
    config: UnlearnConfig, forget: Sequence[Harvested], chat: Chat
) -> list[TokenExample]:
    """What the objective wants to be said to the forget prompts, if it wants anything."""
    if not FORGET[config.objective].preferred:
        return []
    prompts = [item.prompt for item in forget]
    said = preferred_responses(config.preferred, prompts)
    return [chat.example(a, b) for a, b in zip(prompts, said, strict=True)]
