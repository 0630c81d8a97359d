"""Decoding speed compared with transformers' `generate`: `python benchmarks/generate.py`.

Greedy, float32, the same prompts and the same cores in one run: 256 prompts of mixed length (one to
four prompts of the embedded corpus, joined), at most 64 new tokens. `--model=embedded` is the
embedded Qwen2 model, whose responses end by themselves; `random` has the same vocabulary, 12 layers
of width 512, random weights and no end-of-sequence token; a folder is that of a Hugging Face
checkpoint. Both sides run with prompts sorted by length, at each of `--batch_sizes`, and the best
speed of each counts, by the clock and by processor time, which other work on the machine disturbs
less. Also printed: for how many prompts both give the same response. `--prompts` and `--tokens`
make it smaller.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from ema_jax.data.chat import Chat
from ema_jax.data.corpus import study_prompts
from ema_jax.generation import sampler
from ema_jax.models import checkpoint
from ema_jax.organism import CHECKPOINTS
from ema_jax.runtime import cli
from ema_jax.runtime.files import read_json

Tokens = tuple[int, ...]
RANDOM = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@dataclasses.dataclass(frozen=True)
class Ids:
    """A chat whose prompts are already rendered; `generate` is given their indices as text."""

    rendered: Sequence[Tokens]
    eos_ids: tuple[int, ...]
    pad_id: int = 0

    def prompt_tokens(self, prompt: str) -> Tokens:
        return self.rendered[int(prompt)]

    def decode(self, tokens: Sequence[int]) -> str:
        return ""


def random_checkpoint(folder: Path) -> Path:
    config = read_json(CHECKPOINTS / "qwen2/config.json") | RANDOM
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**config, initializer_range=0.05)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


def prompts(chat: Chat, number: int) -> list[Tokens]:
    counts = {"harvest": 0, "retain": 0, "dev": 0, "eval": 100, "concept": 0}
    texts = [row["prompt"] for row in study_prompts(0, counts)]
    rng = np.random.default_rng(0)
    return [
        chat.prompt_tokens(" ".join(rng.choice(texts, rng.integers(1, 5)))) for _ in range(number)
    ]


def by_transformers(model, rows: Sequence[Tokens], eos_ids, cap: int, size: int) -> list[Tokens]:
    said: list[Tokens] = [()] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        width = len(rows[chosen[0]])
        tokens = torch.zeros((len(chosen), width), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for place, i in enumerate(chosen):
            tokens[place, width - len(rows[i]) :] = torch.tensor(rows[i])
            mask[place, width - len(rows[i]) :] = 1
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=cap,
            do_sample=False,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=0,
        )
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            ends = [place for place, token in enumerate(row) if token in eos_ids]
            said[i] = tuple(row[: ends[0] + 1] if ends else row)
    return said


def by_us(model, rows: Sequence[Tokens], eos_ids, cap: int, size: int) -> list[Tokens]:
    chat = Ids(rows, tuple(eos_ids) or (model.config.vocab_size,))
    names = [str(i) for i in range(len(rows))]
    found = dict(sampler.generate(model, chat, names, max_new_tokens=cap, batch_size=size))
    return [found[i].tokens for i in range(len(rows))]


def measure(name: str, run: Callable[[int], list[Tokens]], sizes, repeat: int) -> tuple:
    """The best speeds over batch sizes, each timed after a run that compiles and warms up.

    Tokens a second and a processor second, and the responses of the last batch size.
    """
    best = np.zeros(2)
    for size in sizes:
        start = time.monotonic()
        said = run(size)
        first, taken = time.monotonic() - start, []
        for _ in range(repeat):
            start = time.monotonic(), time.process_time()
            said = run(size)
            taken.append((time.monotonic() - start[0], time.process_time() - start[1]))
        speeds = sum(map(len, said)) / np.min(taken, axis=0)
        print(
            f"{name:12s} batch {size:3d}: {speeds[0]:7.0f} tokens/s, {speeds[1]:7.0f} a processor "
            f"second (first run {first:.1f} s)"
        )
        best = np.maximum(best, speeds)
    return best, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    cli.log_to_stderr()
    transformers.logging.set_verbosity_error()
    named = {"embedded": CHECKPOINTS / "qwen2", "random": CHECKPOINTS / "qwen2"}
    given = named.get(options.model, Path(options.model))
    chat = Chat.load(given)
    with tempfile.TemporaryDirectory() as temporary:
        random = options.model == "random"
        folder = random_checkpoint(Path(temporary)) if random else given
        eos_ids = () if random else chat.eos_ids
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ours = checkpoint.load(folder, dtype="float32")
    rows = prompts(chat, options.prompts)
    settings = (rows, eos_ids, options.tokens)
    speeds, said = zip(
        measure(
            "ema_jax", lambda n: by_us(ours, *settings, n), options.batch_sizes, options.repeat
        ),
        measure(
            "transformers",
            lambda n: by_transformers(theirs.eval(), *settings, n),
            options.batch_sizes,
            options.repeat,
        ),
        strict=True,
    )
    lengths = [len(row) for row in rows]
    same = sum(a == b for a, b in zip(*said, strict=True))
    ratio = speeds[0] / speeds[1]
    print(
        f"{options.model}: {len(rows)} prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{np.mean([len(x) for x in said[0]]):.1f} new tokens a prompt; "
        f"{ratio[0]:.2f} times transformers at its best, {ratio[1]:.2f} by processor time; "
        f"{same} of {len(rows)} responses are the same; {torch.get_num_threads()} threads, "
        f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main()
