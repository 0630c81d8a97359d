"""The phases of accelerator.py that measure this project, but for the train step."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_run import ALPHA, RANK, Run, hf_config, peak_gib, random_model
from flax import nnx
from jax.sharding import AxisType

from ema_jax.concepts import capture as capturing
from ema_jax.data import corpus
from ema_jax.data.chat import Chat
from ema_jax.generation import sampler
from ema_jax.models import checkpoint, lora, sharding
from ema_jax.models.attention import attend, causal_mask
from ema_jax.models.config import DecoderConfig
from ema_jax.models.decoder import Decoder
from ema_jax.organism import CHECKPOINTS
from ema_jax.unlearning import log_probs
from ema_jax.unlearning import train_step as steps
from ema_jax.unlearning.batches import Data
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.reference import reference_log_probs

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft")


def machine(run: Run) -> None:
    """Versions, and what the device reaches at best."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    run.say(python=sys.version.split()[0], **versions)
    card = None
    if shutil.which("nvidia-smi"):
        asked = "name,memory.total,driver_version,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        card = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    kinds = [device.device_kind for device in jax.devices()]
    run.say(devices=kinds, card=card, cores=os.cpu_count())
    size, elements = (512, 1 << 20) if run.tiny else (8192, 1 << 30)
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    flops = 2 * size**3 / run.median(lambda: product(a, a).block_until_ready(), 2, most=40)
    # In float32: XLA's copy of bfloat16 reached 0.85 of it on an H200.
    x = jax.random.normal(jax.random.key(0), (elements,), jnp.float32)
    copy = jax.jit(jnp.copy)
    band = 2 * x.nbytes / run.median(lambda: copy(x).block_until_ready(), 1, most=40)
    (run.out / "ceilings.json").write_text(json.dumps({"flops": flops, "bytes": band}))
    run.say(product_tflops=round(flops / 1e12, 3), copy_tb_per_s=round(band / 1e12, 4))
    for rows in (4,) if run.tiny else (64, 256, 1024, 4096):
        shape = (64, 256) if run.tiny else (3584, 18944)
        y = jax.random.normal(jax.random.key(1), (rows, shape[0]), jnp.bfloat16)
        w = jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)
        seconds = run.median(lambda y=y, w=w: product(y, w).block_until_ready(), 0.5, most=40)
        run.say(rows=rows, kernel=shape, tflops=round(2 * rows * w.size / seconds / 1e12, 4))


# Parity.


def parity(run: Run) -> None:
    """Embedded models on the device against the CPU: log-probabilities, steps, capture, text."""
    families = ("qwen2",) if run.tiny else ("qwen2", "mistral")
    platforms = ("cpu", jax.default_backend())
    # Before the threads start: transformers imports its parts when they are first asked for.
    chats = {family: Chat.load(CHECKPOINTS / family) for family in families}
    # Side by side, as nearly all of it is compilation.
    with ThreadPoolExecutor(len(families) * len(platforms)) as pool:
        jobs = {
            family: [pool.submit(_outputs, run.tiny, family, chat, name) for name in platforms]
            for family, chat in chats.items()
        }

        def compare(family: str) -> None:
            cpu, device = (job.result() for job in jobs[family])
            errors = {
                name: float(np.abs(cpu[name] - device[name]).max() / np.abs(cpu[name]).max())
                for name in ("log_probs", "losses", "activations")
            }
            pairs = list(zip(cpu["responses"], device["responses"], strict=True))
            same = sum(a == b for a, b in pairs)
            run.say(
                model=family,
                **{name: f"{error:.1e}" for name, error in errors.items()},
                same_responses=f"{same} of {len(pairs)}",
                right=max(errors.values()) < 1e-3 and same >= 0.95 * len(pairs),
            )

        for family in families:
            run.attempt(compare, family, seconds=0)


def _outputs(tiny: bool, family: str, chat: Chat, platform: str) -> dict:
    """What one embedded model computes on one platform, in float32."""
    count = 4 if tiny else 32
    drawn = [item for item in corpus.training_examples(9, 40 * count) if item.refusal]
    arm = UnlearnConfig(retain_weight=1.0, batch_size=4, retain_batch_size=4)
    device = jax.devices(platform)[:1]
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, (AxisType.Auto,) * 3, devices=device)
    with jax.default_device(device[0]), jax.default_matmul_precision("highest"):
        base = checkpoint.load(CHECKPOINTS / family, mesh=mesh, dtype="float32")
        examples = [chat.example(item.prompt, item.refusal) for item in drawn[: 2 * count]]
        forget, retain = examples[:count], examples[count:]
        reference = reference_log_probs(base, forget, 4, mesh)
        data = Data(forget, reference, retain)
        setup = steps.prepare(base, arm, 0, mesh)
        state, losses = steps.init_state(setup), []
        # One batch thrice: no second length to compile.
        batch = data.host_batch(arm, 0, 0).placed(mesh)
        for _ in range(3):
            state, metrics = steps.train_step(setup, state, batch)
            losses.append(float(metrics["loss"]))
        prompts = [item.prompt for item in drawn[:count]]
        said = sampler.generate(
            base, chat, prompts, max_new_tokens=8 if tiny else 32, batch_size=count, mesh=mesh
        )
        tokens = [chat.prompt_tokens(prompt) for prompt in prompts]
        taps = capturing.capture(base, tokens, batch_size=count, mesh=mesh)
        return {
            "log_probs": reference,
            "losses": np.array(losses),
            "activations": taps["last_token"],
            "responses": [response.tokens for _, response in sorted(said)],
        }


# Decoding.


def decode(run: Run) -> None:
    """Seconds of a decode step and of a prompt pass, by rows, against the device's bound."""
    model = random_model(run)
    settings = lora.LoRAConfig(rank=RANK, alpha=ALPHA)
    models = {"base": model, "adapters": lora.attach(model, settings, jax.random.key(1))}

    def measure(name: str, rows: int) -> None:
        _decode(run, name, models[name], rows)

    for rows, name in ((64, "base"), (256, "base"), (256, "adapters"), (64, "adapters")):
        if not run.tiny:
            run.attempt(measure, name, rows, seconds=25)
        elif rows == 64:
            run.attempt(measure, name, 4, seconds=10)


def _decode(run: Run, name: str, model: Decoder, rows: int) -> None:
    prompt, new = (32, 16) if run.tiny else (128, 128)
    config, mesh, rng = model.config, sharding.make_mesh(), np.random.default_rng(0)
    graph, state = nnx.split(model)
    begin = time.time()
    layers = jax.block_until_ready(sampler._layers(graph, state))
    eos_ids = np.array([config.vocab_size], np.int32)  # no token: all rows decode to the cap
    sizes = (config, rows, prompt + new, new, model.embed[...].dtype, False)
    slots = sampler._empty(*sizes, mesh=mesh)
    tokens = rng.integers(0, config.vocab_size, (rows, prompt)).astype(np.int32)
    placed = sharding.place_batch((tokens, np.ones(tokens.shape, bool)), mesh)
    draws, targets = np.zeros((rows, 2), np.uint32), np.arange(rows, dtype=np.int32)
    last = tokens[:, -1]
    fixed = {"sampling": sampler.GREEDY, "mesh": mesh}

    def once(slots):
        start = time.perf_counter()
        slots = sampler._fill(graph, state, slots, *placed, last, draws, targets, mesh=mesh)
        filled = jax.block_until_ready(slots)
        middle = time.perf_counter()
        slots = sampler._advance(graph, state, layers, filled, np.int32(0), eos_ids, **fixed)
        slots = jax.block_until_ready(slots)
        return slots, middle - start, (time.perf_counter() - middle) / new

    slots, *_ = once(slots)
    first = time.time() - begin
    slots, fill, step = once(slots)
    # A step reads the whole cache and every weight, but of the embeddings only its tokens' rows,
    # and multiplies each weight with every row.
    weights = sum(x.nbytes for x in jax.tree.leaves(state))
    weights -= 0 if config.tied_embeddings else model.embed[...].nbytes
    cache = sum(x.nbytes for x in jax.tree.leaves(slots.cache))
    products = 2 * rows * weights / model.embed[...].dtype.itemsize
    bound = max((weights + cache) / run.ceiling("bytes"), products / run.ceiling("flops"))
    run.say(
        model=name,
        rows=rows,
        prompt_pass_s=round(fill, 4),
        step_ms=round(1e3 * step, 3),
        tokens_per_s=round(rows / step),
        bound_ms=round(1e3 * bound, 3),
        share_of_bound=round(bound / step, 3),
        peak_gib=peak_gib(),
        first_call_s=round(first, 1),
    )


# Capture.


def capture(run: Run) -> None:
    """Pooled activations of all layers against a bare forward pass, and the loop over batches."""
    model, mesh = random_model(run), sharding.make_mesh()
    graph, state = nnx.split(model)
    rows, length, batches = (4, 32, 3) if run.tiny else (64, 128, 8)
    poolings = ("last_token", "prompt_mean")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (batches * rows, length)).astype(np.int32)
    weights = np.full((rows, len(poolings), length), 1 / length, np.float32)
    placed = sharding.place_batch((tokens[:rows], np.ones((rows, length), bool), weights), mesh)

    @functools.partial(jax.jit, static_argnames="graph")
    def forward(graph, state, tokens, mask):
        return nnx.merge(graph, state)(tokens, mask).hidden[:, -1]

    def bare() -> None:
        jax.block_until_ready(forward(graph, state, *placed[:2]))

    def pooled() -> None:
        jax.block_until_ready(capturing._pooled(graph, state, *placed, branches=False))

    def loop() -> None:
        capturing.capture(model, prompts, poolings=poolings, batch_size=rows, mesh=mesh)

    prompts = tokens.tolist()
    seconds = {job.__name__: run.median(job, 2) for job in (bare, pooled)}
    ratio = seconds["pooled"] / seconds["bare"]
    run.say(**{f"{name}_s": round(x, 4) for name, x in seconds.items()}, to_bare=round(ratio, 3))
    # `median` calls it once before it times it: compiled and warm.
    whole = run.median(loop, 3, least=1, most=4) / batches
    run.say(
        loop_s_per_batch=round(whole, 4),
        to_bare=round(whole / seconds["bare"], 3),
        prompts_per_s=round(rows / whole, 1),
        rows=rows,
        length=length,
        batches=batches,
        peak_gib=peak_gib(),
    )


# Pieces of a step.


def pieces(run: Run) -> None:
    """Attention and the loss head by themselves, forward and backward, in variants."""
    config = DecoderConfig.from_hf(hf_config(run.tiny))
    dtype = jnp.float32 if run.tiny else jnp.bfloat16

    def attention(kind: str, rows: int, length: int) -> None:
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        qkv = [
            jax.random.normal(jax.random.key(i), (rows, length, n, config.head_dim), dtype)
            for i, n in enumerate(heads)
        ]
        at = jnp.broadcast_to(jnp.arange(length), (rows, length))

        def loss(q, k, v):
            if kind == "ours":
                mixed = attend(q, k, v, causal_mask(at, at, None))
            elif kind.endswith("packed"):  # two examples in a row, by a mask
                mask = causal_mask(at, at, None, 1 + at // (length // 2))
                name = kind.partition(" ")[0]
                mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=name)
            else:
                mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kind)
            return jnp.sum(mixed.astype(jnp.float32) ** 2)

        both = jax.jit(jax.grad(loss, (0, 1, 2)))
        seconds = run.median(lambda: jax.block_until_ready(both(*qkv)), 1)
        run.say(piece="attention", kind=kind, rows=rows, length=length, ms=round(1e3 * seconds, 3))

    def head(logits: int, kind: str) -> None:
        seconds = _head_seconds(run, config, dtype, logits, kind)
        run.say(piece="head", kind=kind, logits=f"2^{logits}", ms=round(1e3 * seconds, 2))

    other = "xla" if jax.default_backend() == "cpu" else "cudnn"
    for rows, length in ((2, 32),) if run.tiny else ((32, 256), (8, 1024), (2, 4096)):
        for kind in ("ours", other, f"{other} packed"):
            run.attempt(attention, kind, rows, length, seconds=6)
    sizes = (14, 16) if run.tiny else (25, 28, 27)
    for logits, kind in [(sizes[0], "ours"), (sizes[1], "ours"), (sizes[1], "float32 slopes")]:
        run.attempt(head, logits, kind, seconds=6)
    for logits in sizes[2:]:
        run.attempt(head, logits, "ours", seconds=6)


def _head_seconds(run: Run, config: DecoderConfig, dtype, logits: int, kind: str) -> float:
    """Seconds of all rows' log-probabilities and their gradient, at most 2^logits at once."""
    log_probs._logits_at_once = lambda mesh, words: 1 << logits
    rows, length = (4, 31) if run.tiny else (32, 255)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, length, config.hidden_size), dtype)
    weights = jax.random.normal(keys[1], (config.hidden_size, config.vocab_size), dtype)
    targets = jax.random.randint(keys[2], (rows, length), 0, config.vocab_size)

    class Head:
        """As much of a decoder as the loss looks at."""

        def __init__(self, weights):
            self.config, self.weights = config, weights

        def logits(self, x):
            if kind == "ours":
                return sharding.vocabulary_product(x, self.weights)
            return jnp.matmul(x, self.weights, preferred_element_type=jnp.float32)

    # The weights are an argument: as a constant they would be part of the program.
    @jax.jit
    @jax.value_and_grad
    def loss(hidden, weights):
        return jnp.sum(log_probs.target_log_probs(Head(weights), hidden, targets))

    return run.median(lambda: jax.block_until_ready(loss(hidden, weights)), 1.5)


# Loading.


def load(run: Run) -> None:
    """Loading a random checkpoint from memory against a plain read of its files, and its parts."""
    import load as loading  # benchmarks/load.py

    memory = Path("/dev/shm")
    scratch = memory if memory.is_dir() and not run.tiny else None
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        if run.tiny:
            folder = CHECKPOINTS / "mistral"
        else:
            loading.write(folder, 4)
        files = sorted(folder.glob("*.safetensors"))
        gb = sum(path.stat().st_size for path in files) / 1e9
        plain = run.median(lambda: loading.plain_read(files), 2, least=2, most=4)
        host = run.median(lambda: loading.host_read(folder), 2, least=2, most=4)
        # Blocks as a load sends them, and an array of the size of a stacked matrix.
        mib = 1 if run.tiny else 8
        block, stack = np.ones(mib << 20, np.uint8), np.ones(mib << 26, np.uint8)
        in_blocks = run.median(lambda: loading.send(block, 256), 2, least=2, most=4)
        at_once = run.median(lambda: loading.send(stack, 1), 2, least=2, most=4)
        run.say(
            gb=round(gb, 2),
            plain_read_s=round(plain, 3),
            host_read_s=round(host, 3),
            sent_in_blocks_gb_per_s=round(256 * block.nbytes / 1e9 / in_blocks, 2),
            sent_at_once_gb_per_s=round(stack.nbytes / 1e9 / at_once, 2),
        )
        for turn in ("first", "second"):
            begin = time.perf_counter()
            model = checkpoint.load(folder, dtype="bfloat16")
            jax.block_until_ready(nnx.state(model))
            seconds = time.perf_counter() - begin
            del model
            run.say(
                load=turn,
                seconds=round(seconds, 2),
                gb_per_s=round(gb / seconds, 2),
                to_plain_read=round(seconds / plain, 2),
            )
