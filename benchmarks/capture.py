"""Cost of capture, layer sweeps and entanglement: `python benchmarks/capture.py`.

A random Qwen2 of 12 layers, width 512, float32; 256 prompts of 64 random tokens. Variants run in
turn and ratios are computed batch by batch, because machines are shared.
nnsight and TransformerLens are timed where they are installed. `--parts` runs some parts only;
`--ours` leaves out the other libraries and compares processor time, which other work disturbs less.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from ema_jax.concepts import interventions
from ema_jax.concepts.capture import _pooled, capture, pooling
from ema_jax.concepts.entanglement import all_pairs
from ema_jax.data.domains import BENIGN, DOMAINS
from ema_jax.models import checkpoint, streaming

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROMPTS, LENGTH, BATCH = 256, 64, 32
AGAINST = ("ours, forward", "transformers, forward", "transformers, pooling hooks")
PARTS = ("capture", "memory", "sweep", "entanglement")


def write_model(folder: Path) -> None:
    """Writes a random checkpoint."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 8192, (count, LENGTH)).astype(np.int32)


def ours(folder: Path) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Our forward pass without pooling and with it; both end in a host array."""
    graph, state = nnx.split(checkpoint.load(folder))

    @functools.partial(jax.jit, static_argnames="graph")
    def forward(graph, state, ids, mask):
        return nnx.merge(graph, state)(ids, mask).hidden[:, -1]

    mask = np.ones((BATCH, LENGTH), bool)
    weights = np.tile(pooling("prompt_mean")(LENGTH, 0), (BATCH, 1, 1))

    def pooled(ids: np.ndarray) -> np.ndarray:
        return np.asarray(_pooled(graph, state, ids, mask, weights, branches=False)[0])[:, :, 0]

    return {
        "ours, forward": lambda ids: np.asarray(forward(graph, state, ids, mask)),
        "ours, capture": pooled,
    }


def theirs(folder: Path) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """transformers without and with pooling hooks; nnsight and TransformerLens where installed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    inner, layers = model.model, len(model.model.layers)

    def forward(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            hidden = inner(torch.from_numpy(ids).long(), use_cache=False)[0]
        return hidden[:, -1].numpy()

    def hooks(ids: np.ndarray) -> np.ndarray:
        kept: list[torch.Tensor] = []

        def before(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            kept.append(hidden[:, 1:].mean(1))

        handles = [
            layer.register_forward_pre_hook(before, with_kwargs=True) for layer in inner.layers
        ]
        last = inner.layers[-1].register_forward_hook(
            lambda _, args, out: kept.append(
                (out if torch.is_tensor(out) else out[0])[:, 1:].mean(1)
            )
        )
        forward(ids)
        for handle in (*handles, last):
            handle.remove()
        return torch.stack(kept).numpy()

    variants = {"transformers, forward": forward, "transformers, pooling hooks": hooks}
    try:
        import nnsight
    except ImportError as error:
        print(f"nnsight: not installed ({error})")
    else:
        traced = nnsight.NNsight(inner)

        def in_trace(ids: np.ndarray) -> np.ndarray:
            kept = []
            with torch.inference_mode(), traced.trace(torch.from_numpy(ids).long()):
                for layer in range(layers):
                    out = traced.layers[layer].output
                    hidden = out if torch.is_tensor(out) else out[0]
                    kept.append(hidden[:, 1:].mean(1).save())
            return torch.stack(kept).numpy()

        variants["nnsight, pooled in the trace"] = in_trace
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        print(f"TransformerLens: not installed ({error})")
    else:
        bridge = TransformerBridge.boot_transformers(str(folder), hf_model=model)
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]

        def with_hooks(ids: np.ndarray) -> np.ndarray:
            kept: list[torch.Tensor] = []
            with torch.inference_mode():
                bridge.run_with_hooks(
                    torch.from_numpy(ids).long(),
                    return_type=None,
                    fwd_hooks=[(n, lambda x, hook: kept.append(x[:, 1:].mean(1))) for n in names],
                )
            return torch.stack(kept).numpy()

        variants["TransformerLens, run_with_hooks"] = with_hooks
    return variants


def time_capture(folder: Path, repetitions: int, alone: bool) -> None:
    """Prints seconds for 256 prompts, and ratios batch by batch."""
    variants = ours(folder) | ({} if alone else theirs(folder))
    clock = time.process_time if alone else time.perf_counter
    batches = np.split(tokens(PROMPTS), PROMPTS // BATCH)
    for name, run in list(variants.items()):
        try:
            run(batches[0])
        except Exception as error:  # another library that does not run here is no reason to stop
            print(f"{name}: does not run ({type(error).__name__}: {str(error)[:90]})")
            del variants[name]
    if not alone:
        found, expected = (
            variants[n](batches[0]) for n in ("ours, capture", "transformers, pooling hooks")
        )
        print(f"largest difference from transformers: {np.abs(found - expected).max():.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for number, ids in enumerate(batches * repetitions):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            start = clock()
            variants[name](ids)
            seconds[name].append(clock() - start)
    for name, values in seconds.items():
        line = f"{name:33} {len(batches) * statistics.median(values):6.2f} s"
        for against in AGAINST[:1] if alone else AGAINST:
            ratios = [a / b for a, b in zip(values, seconds[against], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            line += f"  {middle:.3f} [{low:.3f}-{high:.3f}]"
        print(line)
    print(
        "medians and quartiles over batches of the ratios to our forward, to transformers' "
        "forward, to transformers with pooling hooks"
    )


def measure_memory(folder: Path, count: int) -> None:
    """Prints the peak resident memory of a capture into a store; needs a process of its own."""
    model = checkpoint.load(folder)
    prompts = tokens(count).tolist()
    # The first batch allocates programs, buffers and weights; they do not count.
    capture(model, prompts[:BATCH], batch_size=BATCH)
    before = streaming.peak_bytes()
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        capture(model, prompts, batch_size=BATCH, store=Path(place) / "kept.safetensors")
        spent = time.perf_counter() - start
    grown = (streaming.peak_bytes() - before) / 2**20
    size = count * 13 * 512 * 4 / 2**20
    print(f"{count:5} prompts: peak grew by {grown:6.1f} MiB; {size:.1f} MiB kept; {spent:.1f} s")


def time_sweep(folder: Path) -> None:
    """Times a sweep of 13 layers × 9 strengths × 4 directions and as many plain forward passes."""
    model = checkpoint.load(folder)
    rng = np.random.default_rng(0)
    directions = {n: rng.normal(size=(13, SIZES["hidden_size"])).astype(np.float32) for n in "abcd"}
    wanted = interventions.grid(directions, (-4, -2, -1, -0.5, 0.5, 1, 2, 4))
    count = wanted.candidates.add.shape[1]
    prompts = tokens(rows := 8, seed=1).tolist()
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="graph")
    def forward(graph, state, ids, mask):
        model = nnx.merge(graph, state)
        return model.logits(model(ids, mask).hidden[:, -1])

    ids, mask = np.array(prompts, np.int32), np.ones((len(prompts), LENGTH), bool)

    def plain(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            forward(graph, state, ids, mask).block_until_ready()
        return (time.perf_counter() - start) / times

    plain(2)
    one = [plain(10)]
    start = time.perf_counter()
    interventions.sweep(model, prompts, wanted.candidates, range(5), batch_size=rows)
    spent = time.perf_counter() - start
    one.append(plain(10))
    forwards = 13 * count
    naive = [forwards * seconds for seconds in one]
    print(
        f"sweep of 13 layers x {count} candidates, {len(prompts)} prompts: {spent:.1f} s with its "
        f"compilation, {interventions._sweep._cache_size()} program; as many forward passes, from "
        f"ten before and ten after: {naive[0]:.1f} and {naive[1]:.1f} s; ratio "
        f"{spent / max(naive):.3f} to {spent / min(naive):.3f}"
    )


def time_entanglement(prompts: int) -> None:
    """Times all pairs of seven domains at 33 layers of width 4,096."""
    rng = np.random.default_rng(0)
    shape = (prompts, 33, 4096)
    acts = {d: rng.standard_normal(shape, np.float32) for d in (*DOMAINS, BENIGN)}
    start = time.perf_counter()
    all_pairs(acts, DOMAINS, permutations=1000, bootstraps=1000)
    spent = time.perf_counter() - start
    print(
        f"entanglement, 33 layers x 4,096, 7 domains and contrast of {prompts} prompts, all "
        f"pairs, all measures, 1,000 permutations and bootstraps: {spent:.1f} s"
    )


def main() -> None:
    """Runs the parts and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--prompts", type=int, default=64, help="per domain, for entanglement")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.memory:
        measure_memory(options.folder, options.memory)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(folder)
        parts = options.parts.split(",")
        if "capture" in parts:
            time_capture(folder, options.repetitions, options.ours)
        if "memory" in parts:
            for count in (256, 4096):
                command = [sys.executable, __file__, f"--memory={count}", f"--folder={folder}"]
                subprocess.run(command, check=True)
        if "sweep" in parts:
            time_sweep(folder)
        if "entanglement" in parts:
            time_entanglement(options.prompts)


if __name__ == "__main__":
    main()
