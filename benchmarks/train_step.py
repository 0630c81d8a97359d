"""The train step against transformers + PEFT: one decoder, the same losses, the same cores.

python benchmarks/train_step.py                  # full rows of 128 tokens
python benchmarks/train_step.py --lengths=drawn  # a median response of a fifth of the longest row
python benchmarks/train_step.py --model=FOLDER   # a checkpoint in place of a random small model
"""

import argparse
import functools
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
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import peft
import torch
import transformers

from ema_jax.data.chat import TokenExample
from ema_jax.models import checkpoint, lora
from ema_jax.models.sharding import make_mesh
from ema_jax.unlearning import train_step as steps
from ema_jax.unlearning.batches import Data, batch_indices
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.reference import reference_log_probs

BETA, RATE = 0.1, 1e-4
FULL, DRAWN = 128, 256  # tokens of a full row, and of the longest of drawn lengths
LORA = lora.LoRAConfig(rank=16, alpha=32.0)


class Work(NamedTuple):
    """Rows of a forget and of a retain batch, and their lengths."""

    rows: int = 8
    length: int = FULL
    lengths: str = "full"  # or drawn

    def examples(self, seed: int) -> list[TokenExample]:
        rng = np.random.default_rng(seed)
        number = self.rows if self.lengths == "full" else 8 * self.rows
        prompts = np.full(number, self.length // 4)
        responses = self.length - prompts
        if self.lengths == "drawn":
            prompts = rng.integers(self.length // 12, self.length // 4, number)
            median = np.log(self.length / 5)
            responses = rng.lognormal(median, 0.8, number).astype(int)
            responses = np.clip(responses, 5, self.length - prompts)

        def ids(size: int) -> tuple[int, ...]:
            return tuple(rng.integers(32_000, size=size).tolist())

        sizes = zip(prompts.tolist(), responses.tolist(), strict=True)
        return [TokenExample(ids(p), ids(r)) for p, r in sizes]

    def arm(self, objective: str = "npo") -> UnlearnConfig:
        """NPO with retain cross-entropy; for sft, the same tokens through plain fine-tuning."""
        return UnlearnConfig(
            lora=LORA,
            objective=objective,
            beta=BETA,
            retain_weight=1.0,
            learning_rate=RATE,
            batch_size=self.rows,
            retain_batch_size=self.rows,
        )

    def chosen(self, step: int) -> tuple[list[int], list[int]]:
        """Indices of a step's forget and retain examples, the same for both sides."""
        number = self.rows if self.lengths == "full" else 8 * self.rows
        sides = (batch_indices(number, self.rows, seed, step) for seed in (0, 1))
        forget, retain = (indices.tolist() for indices in sides)
        return forget, retain


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


def ours(folder: Path, work: Work, objective: str = "npo") -> Callable[[], tuple[float, int]]:
    base, mesh, config = checkpoint.load(folder), make_mesh(), work.arm(objective)
    forget, retain = work.examples(1), work.examples(2)
    data = Data(forget, reference_log_probs(base, forget, work.rows), retain, forget)
    setup = steps.prepare(base, config, 0, mesh)
    state, count = steps.init_state(setup), iter(range(10_000))

    def step() -> tuple[float, int]:
        nonlocal state
        batch = data.host_batch(config, 0, next(count))
        state, metrics = steps.train_step(setup, state, batch.placed(mesh))
        return float(metrics["loss"]), np.count_nonzero(batch.rows.segments)

    return step


def theirs(
    folder: Path, work: Work, *, live_reference: bool = False, micro: int = 0
) -> Callable[[], tuple[float, int]]:
    """The same step in PyTorch, each micro-batch padded to its longest example.

    The reference as numbers, too, or by a forward pass each step.
    """
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(lora.TARGETS)
    )
    model = peft.get_peft_model(base, settings).train()
    rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    size, count = micro or work.rows, iter(range(10_000))
    padded = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)

    def log_probs(examples: list[TokenExample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the targets, and which of them are of a response."""
        ids = [torch.tensor(x.prompt + x.response) for x in examples]
        labels = [torch.tensor((-100,) * len(x.prompt) + x.response) for x in examples]
        rows = padded(ids)
        response = padded(labels, padding_value=-100)[:, 1:] >= 0
        mask = padded([torch.ones_like(x) for x in ids])
        logits = model(rows, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        chosen = logits.gather(-1, rows[:, 1:, None])[..., 0]
        return torch.where(response, chosen, 0.0), response

    def reference(examples: list[TokenExample]) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            return log_probs(examples)[0].sum(-1)

    forget, retain = work.examples(1), work.examples(2)
    at = range(0, len(forget), work.rows)
    parts = [] if live_reference else [reference(forget[i : i + work.rows]) for i in at]
    numbers = torch.cat(parts) if parts else None

    def step() -> tuple[float, int]:
        chosen, others = work.chosen(next(count))
        total, found = sum(len(retain[i].response) for i in others), 0.0
        for i in range(0, work.rows, size):
            own = [forget[k] for k in chosen[i : i + size]]
            base = reference(own) if numbers is None else numbers[chosen[i : i + size]]
            ratio = log_probs(own)[0].sum(-1) - base
            loss = -2 / BETA * torch.nn.functional.logsigmoid(-BETA * ratio).sum() / work.rows
            kept = log_probs([retain[k] for k in others[i : i + size]])[0]
            loss = loss - kept.sum() / total
            loss.backward()
            found += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad()
        used = [forget[i].size for i in chosen] + [retain[i].size for i in others]
        return found, sum(used)

    return step


PROGRAMS: dict[str, Callable[[Path, Work], Callable[[], tuple[float, int]]]] = {
    "ema_jax, NPO + retain CE": ours,
    "ema_jax, SFT on the same tokens": lambda folder, work: ours(folder, work, "sft"),
    "PEFT, reference as numbers": theirs,
    "PEFT, reference by a forward pass": lambda folder, work: theirs(
        folder, work, live_reference=True
    ),
    "PEFT, half a batch at a time": lambda folder, work: theirs(
        folder, work, micro=max(work.rows // 2, 1)
    ),
    "PEFT, a quarter at a time": lambda folder, work: theirs(
        folder, work, micro=max(work.rows // 4, 1)
    ),
}
FULL_ONLY = ("ema_jax, SFT on the same tokens", "PEFT, reference by a forward pass")


def timed(step: Callable[[], tuple[float, int]], number: int, warm: int) -> dict[str, Any]:
    """Seconds and real tokens of each step after some, and processor seconds and page faults."""
    first = step()[0]
    for _ in range(warm):
        step()
    seconds, tokens, before = [], 0, resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(number):
        start = time.perf_counter()
        tokens += step()[1]
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "first_loss": first,
        "seconds": seconds,
        "tokens": tokens / number,
        "user": (after.ru_utime - before.ru_utime) / number,
        "system": (after.ru_stime - before.ru_stime) / number,
        "page_faults": (after.ru_minflt - before.ru_minflt) / number,
    }


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every program in a process of its own, in turn, some rounds of it.

    In one process they slow each other.
    """
    names = arguments.only or [
        name for name in PROGRAMS if (name in FULL_ONLY) <= (arguments.lengths == "full")
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{scratch}/programs"}
        for turn in range(arguments.rounds):
            for name in names:
                print(f"round {turn + 1} of {arguments.rounds}: {name}", file=sys.stderr)
                command = [sys.executable, __file__, f"--program={name}", f"--model={folder}"]
                for flag in ("steps", "rows", "length", "lengths"):
                    command.append(f"--{flag}={getattr(arguments, flag)}")
                out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
                found[name].append(json.loads(out.stdout))
                print(json.dumps(found[name][-1]), file=sys.stderr)
    best = max(
        (name for name in names if name.startswith("PEFT")),
        key=lambda name: statistics.median(_rates(found[name])),
    )
    return {name: summary(runs, found[best]) for name, runs in found.items()} | {"baseline": best}


def _rates(runs: list[dict[str, Any]]) -> list[float]:
    """Real tokens per second of each round."""
    return [run["tokens"] * len(run["seconds"]) / sum(run["seconds"]) for run in runs]


def summary(runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Quartiles over all steps, and how many times as fast as `baseline` in each round."""
    seconds = np.quantile([x for run in runs for x in run["seconds"]], (0.25, 0.5, 0.75))
    keys = ("tokens", "user", "system", "page_faults")
    means = {key: statistics.mean(r[key] for r in runs) for key in keys}
    processor = means["tokens"] / (means["user"] + means["system"])
    theirs = [run["tokens"] / (run["user"] + run["system"]) for run in baseline]
    return {
        "first_loss": round(runs[0]["first_loss"], 5),
        "seconds_a_step": [round(x, 2) for x in seconds.tolist()],
        "tokens_per_second": round(statistics.median(_rates(runs))),
        "times_as_fast": [
            round(a / b, 2) for a, b in zip(_rates(runs), _rates(baseline), strict=True)
        ],
        "by_processor_time": round(processor / statistics.mean(theirs), 2),
        **{key: round(value, 2) for key, value in means.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", choices=("full", "drawn"), default="full")
    parser.add_argument("--length", type=int, help="of a full row, or the longest that is drawn")
    parser.add_argument("--rows", type=int, default=8, help="of a forget and of a retain batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; else a small random model")
    parser.add_argument("--only", nargs="*", choices=PROGRAMS)
    parser.add_argument("--program", choices=PROGRAMS, help="one program, in this process")
    arguments = parser.parse_args()
    arguments.length = arguments.length or (FULL if arguments.lengths == "full" else DRAWN)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if arguments.program:
        work = Work(arguments.rows, arguments.length, arguments.lengths)
        step = PROGRAMS[arguments.program](arguments.model, work)
        # Drawn lengths have a few programs, most of them compiled in the first epoch.
        warm = 1 if arguments.lengths == "full" else 8
        print(json.dumps(timed(step, arguments.steps, warm)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model is None:
            write_model(Path(scratch))
        result = compare(arguments.model or Path(scratch), arguments)
    versions = {m.__name__: m.__version__ for m in (jax, torch, transformers, peft)}
    print(json.dumps({"cores": len(os.sched_getaffinity(0)), **versions, **result}, indent=2))


if __name__ == "__main__":
    main()
