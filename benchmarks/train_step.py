"""The train step against transformers + PEFT, and many adapters against one after another.

python benchmarks/train_step.py --part=step      # one decoder, the same losses, the same cores
python benchmarks/train_step.py --part=together  # 8 adapters at once on the embedded model
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import peft
import torch
import transformers

from ema_jax.data import corpus
from ema_jax.data.chat import Chat, TokenExample
from ema_jax.models import checkpoint, lora
from ema_jax.models.sharding import make_mesh
from ema_jax.organism import CHECKPOINTS
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.unlearning import train_step as steps
from ema_jax.unlearning.batches import Data
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.reference import reference_log_probs
from ema_jax.unlearning.together import Member, unlearn_together
from ema_jax.unlearning.trainer import unlearn

BETA, RATE, LENGTH, ROWS = 0.1, 1e-4, 128, 8  # 8 forget + 8 retain rows: a batch of 16
LORA = lora.LoRAConfig(rank=16, alpha=32.0)
NPO = UnlearnConfig(
    lora=LORA,
    beta=BETA,
    retain_weight=1.0,
    learning_rate=RATE,
    batch_size=ROWS,
    retain_batch_size=ROWS,
)
# The same tokens through plain fine-tuning: cross-entropy on both halves.
SFT = UnlearnConfig(**{**vars(NPO), "objective": "sft"})


def write_model(folder: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "mistral",
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=None,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def examples(seed: int) -> list[TokenExample]:
    rng = np.random.default_rng(seed)
    draw = rng.integers(32_000, size=(ROWS, LENGTH))
    return [TokenExample(tuple(row[:32].tolist()), tuple(row[32:].tolist())) for row in draw]


def ours(folder: Path, config: UnlearnConfig) -> Callable[[], float]:
    base, mesh = checkpoint.load(folder), make_mesh()
    forget, retain = examples(1), examples(2)
    data = Data(forget, reference_log_probs(base, forget, ROWS), retain, forget)
    setup = steps.prepare(base, config, 0, mesh)
    state, count = steps.init_state(setup), iter(range(10_000))

    def step() -> float:
        nonlocal state
        batch = data.host_batch(config, 0, next(count)).placed(mesh)
        state, metrics = steps.train_step(setup, state, batch)
        return float(metrics["loss"])

    return step


def theirs(folder: Path, *, live_reference: bool) -> Callable[[], float]:
    """The same step in PyTorch; the reference as numbers too, or by a forward pass each step."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(lora.TARGETS)
    )
    model = peft.get_peft_model(base, settings).train()
    rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    forget, retain = (
        torch.tensor([item.prompt + item.response for item in examples(seed)]) for seed in (1, 2)
    )

    def log_probs(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, ids[:, 1:, None])[:, 31:, 0]

    def reference() -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            return log_probs(forget).sum(-1)

    numbers = reference()

    def step() -> float:
        kept = reference() if live_reference else numbers
        ratio = log_probs(forget).sum(-1) - kept
        loss = -2 / BETA * torch.nn.functional.logsigmoid(-BETA * ratio).mean()
        loss = loss - log_probs(retain).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad()
        return float(loss)

    return step


PROGRAMS: dict[str, Callable[[Path], Callable[[], float]]] = {
    "ema_jax, NPO + retain CE": lambda folder: ours(folder, NPO),
    "ema_jax, SFT on the same tokens": lambda folder: ours(folder, SFT),
    "PEFT, reference as numbers": lambda folder: theirs(folder, live_reference=False),
    "PEFT, reference by a forward pass": lambda folder: theirs(folder, live_reference=True),
}


def timed(step: Callable[[], float], number: int) -> dict[str, Any]:
    """Seconds of each step after two, and processor seconds and page faults a step."""
    first = step()
    step()
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(number):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "first_loss": first,
        "seconds": seconds,
        "user": (after.ru_utime - before.ru_utime) / number,
        "system": (after.ru_stime - before.ru_stime) / number,
        "page_faults": (after.ru_minflt - before.ru_minflt) / number,
    }


def step_part(number: int, rounds: int) -> dict[str, Any]:
    """Every program in a process of its own, in turn, some rounds of it.

    In one process they slow each other.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch))
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{scratch}/programs"}
        for turn in range(rounds):
            for name in PROGRAMS:
                print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr)
                command = [sys.executable, __file__, f"--program={name}", f"--folder={scratch}"]
                command.append(f"--steps={number}")
                out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
                found[name].append(json.loads(out.stdout))
    return {
        name: summary(runs, found["PEFT, reference as numbers"]) for name, runs in found.items()
    }


def summary(runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Quartiles over all steps, and how many times as fast as `baseline` in each round."""
    medians = [statistics.median(run["seconds"]) for run in runs]
    others = [statistics.median(run["seconds"]) for run in baseline]
    seconds = np.quantile([x for run in runs for x in run["seconds"]], (0.25, 0.5, 0.75))
    means = {
        key: statistics.mean(r[key] for r in runs) for key in ("user", "system", "page_faults")
    }
    return {
        "first_loss": round(runs[0]["first_loss"], 5),
        "seconds_a_step": [round(x, 2) for x in seconds.tolist()],
        "tokens_per_second": round(2 * ROWS * LENGTH / float(seconds[1])),
        "times_as_fast": [round(b / a, 2) for a, b in zip(medians, others, strict=True)],
        **{key: round(value, 2) for key, value in means.items()},
    }


def together_part(number: int, runs: int = 8) -> dict[str, Any]:
    """Adapters of `runs` seeds on the embedded model: at once, and one after the other."""
    folder = CHECKPOINTS / "qwen2"
    chat, base = Chat.load(folder), checkpoint.load(folder)
    drawn = [item for item in corpus.training_examples(9, 1500) if item.refusal]
    forget = [chat.example(item.prompt, item.refusal) for item in drawn[:200]]
    retain = [chat.example(item.prompt, item.refusal) for item in drawn[200:400]]
    reference = reference_log_probs(base, forget, 64)
    data = Data(forget, reference, retain)
    result: dict[str, Any] = {}
    for name, batch in {"a batch of 16 + 32": (16, 32), "a batch of 4 + 4": (4, 4)}.items():
        config = UnlearnConfig(
            retain_weight=4.0,
            max_steps=number,
            eval_every=number,
            batch_size=batch[0],
            retain_batch_size=batch[1],
        )

        def never(model: Any) -> Evaluation:
            return Evaluation({"t": 1.0}, 0.0)

        def alone(seed: int, config: UnlearnConfig = config) -> None:
            unlearn(base, forget, retain, reference, config, seed=seed, target="t", evaluate=never)

        def at_once(config: UnlearnConfig = config) -> None:
            members = [Member(seed) for seed in range(runs)]
            unlearn_together(base, data, config, members, target="t", evaluate=never)

        def seconds(job: Callable[[], Any]) -> float:
            start = time.perf_counter()
            job()
            return time.perf_counter() - start

        alone(99), at_once()  # compile both
        turns = seconds(lambda alone=alone: [alone(seed) for seed in range(runs)])
        stacked = seconds(at_once)
        result[name] = {
            "in_turn": round(turns, 2),
            "at_once": round(stacked, 2),
            "share": stacked / turns,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("step", "together"), default="step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--program", choices=PROGRAMS, help="one program alone, for --part=step")
    parser.add_argument("--folder", type=Path, help="the model of --program")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if arguments.program:
        step = PROGRAMS[arguments.program](arguments.folder)
        print(json.dumps(timed(step, arguments.steps)))
        return
    if arguments.part == "step":
        result = step_part(arguments.steps, arguments.rounds)
    else:
        result = together_part(arguments.steps)
    versions = {m.__name__: m.__version__ for m in (jax, torch, transformers, peft)}
    print(json.dumps({"cores": os.cpu_count(), **versions, **result}, indent=2))


if __name__ == "__main__":
    main()
