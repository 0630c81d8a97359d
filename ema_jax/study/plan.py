"""The plan that a dry run prints: stages, work, memory, disk, time, and what it needs to have."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from ema_jax.config import StudyConfig
from ema_jax.data.prompts import DEFAULT_COUNTS, path_of, public_sets
from ema_jax.data.public_sets import is_cached, is_published
from ema_jax.data.sources import SOURCES
from ema_jax.models import checkpoint
from ema_jax.models.config import DecoderConfig
from ema_jax.models.hub import ModelSource
from ema_jax.runtime.cli import compiled_programs
from ema_jax.runtime.devices import GPUS, find_accelerator
from ema_jax.runtime.files import read_json
from ema_jax.runtime.hardware import at_hand, cores
from ema_jax.study.pipeline import Study, names
from ema_jax.study.programs import programs
from ema_jax.study.watching import duration
from ema_jax.study.workload import CPU_CORE, H100, H200, Rates, Work, work

_SHAPES = Path(checkpoint.__file__).parent / "shapes"
_MEASURED = "docs/one-gpu.md"
_LONG = 24 * 3600  # seconds, beyond which a CPU will not do
_BYTES = {"float32": 4, "bfloat16": 2}
_STAGES = ("baseline", "concepts", "harvest")
_RUN_STAGES = ("unlearn", "evaluate")


def text(
    name: str,
    config: StudyConfig,
    source: ModelSource | None,
    study: Study | None,
    away: Iterable[str],
) -> str:
    """The plan of a study, or of one cell of a replication.

    Args:
        name: of the cell; "" for a study.
        config: its config.
        source: its model, None for a Hub id that is not in the local cache.
        study: what was done of it; None where the model is not known.
        away: Hub ids of judging models that are not in the local cache.
    """
    where = (
        f"{source.folder}, revision {source.revision or 'none'}"
        if source
        else "a Hub id, not in the local cache; it is checked when it is downloaded"
    )
    lines = [
        f"study {name or 'of'} {config.model.source} ({where})",
        f"  target {config.target}, domains {', '.join(config.domains)}",
        f"  prompts from {config.prompts.source}, judged by {config.judge}",
        *(
            f"  judging model {model}, not in the local cache; checked when downloaded"
            for model in away
        ),
        f"  arms {', '.join(config.arms)}, seeds {', '.join(map(str, config.seeds))}",
        *_needs(config, source),
        *_work(config, source),
    ]
    # Of a model that is not here no stage can be recognised as done.
    stages = study.plan() if study is not None else ((name, False) for name in names(config))
    lines += [f"  {'done' if done else 'to do':5}  {stage}" for stage, done in stages]
    return "\n".join(lines)


def _needs(config: StudyConfig, source: ModelSource | None) -> Iterator[str]:
    """Downloads and licences."""
    if source is None:
        yield (
            f"  to download: {config.model.source}; read its licence at "
            f"https://huggingface.co/{config.model.source} (where it asks for agreement, accept it "
            "there and set HF_TOKEN)"
        )
    for name in dict.fromkeys(public_sets(config.prompts)):
        found, path = SOURCES[name], path_of(config.prompts, name)
        if is_published(name, path):
            place = f"here, in {path}"
        elif is_cached(name):
            place = "here, in the local cache"
        elif found.gated:
            place = "to download; gated: accept its terms there and set HF_TOKEN"
        else:
            place = "to download"
        yield f"  prompt set {name}: {found.hub_id or found.file}, licence {found.licence}, {place}"


class Size(NamedTuple):
    """Parameters, layers and width of a model."""

    parameters: int
    layers: int
    width: int


@functools.lru_cache(8)
def _size_of(folder: Path | None, given: str) -> Size | None:
    """The size of a model; of one that is not here where its shape comes with the package."""
    shape = _SHAPES / f"{given.replace('/', '--')}.json"
    if folder is not None:
        decoder = DecoderConfig.from_folder(folder)
    elif shape.exists():
        decoder = DecoderConfig.from_hf(read_json(shape))
    else:
        return None
    state = nnx.state(checkpoint.abstract_decoder(decoder))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state))
    return Size(parameters, decoder.num_layers, decoder.hidden_size)


def _work(config: StudyConfig, source: ModelSource | None) -> Iterator[str]:
    """Responses, tokens and steps, then memory, disk and time where the model's size is known."""
    total = functools.reduce(Work.plus, (work(config, stage) for stage in _STAGES))
    for arm in config.arms:
        for stage in _RUN_STAGES:
            for _ in config.seeds:
                total = total.plus(work(config, stage, arm))
    yield (
        f"  work, at most: {total.responses:,} responses with {_millions(total.response_tokens)} "
        f"tokens, {total.steps:,} steps of training with {_millions(total.train_tokens)} tokens"
    )
    size = _size_of(source.folder if source else None, config.model.source)
    if size is None:
        yield "  memory, disk and time: not known before the model is here"
        return
    dtype = config.model.dtype or ("float32" if at_hand() == "cpu" else "bfloat16")
    yield (
        f"  memory: {_bytes(size.parameters * _BYTES[dtype])} of weights in {dtype}, about twice "
        "that while it generates (an estimate; docs/one-gpu.md, python -m ema_jax.compile_check)"
    )
    kinds = programs(config, folded=dtype == "float32")
    yield (
        f"  programs: {sum(kinds.values())} with the model in them, compiled at first, a shape of "
        f"each ({', '.join(f'{name} {number}' for name, number in kinds.items())})"
    )
    runs = len(config.arms) * len(config.seeds)
    yield f"  disk: about {_bytes(_disk(config, size, runs))} in --workdir (an estimate)"
    yield from _time(total, size.parameters)


def _time(total: Work, parameters: int) -> Iterator[str]:
    """How long it may take on the device at hand, and what of it is compiled already."""
    device = at_hand()
    if device == "cpu":
        number = cores()
        seconds = total.seconds(CPU_CORE.on(number, number), parameters)
        on = f"on the {number} processor cores here" if number > 1 else "on the one core here"
        if seconds > _LONG:
            on += f", or {duration(total.seconds(H100, parameters))} on one H100"
        compiling, source = CPU_CORE.programs_seconds, "SmolLM2-135M's rates on an AMD EPYC core"
    else:
        rates, on, source = _accelerator(device)
        seconds, compiling = total.seconds(rates, parameters), rates.programs_seconds
    yield (
        f"  time: at most {duration(seconds)} {on}, and some {duration(compiling)} to compile at "
        f"first (an estimate from {source}; no device was touched)"
    )
    yield f"  compiled programs: {_compiled(compiled_programs())}"


def _compiled(folder: Path | None) -> str:
    """What is kept of earlier runs. Which of it serves this one only compiling shows."""
    if folder is None:
        return "not kept (JAX_COMPILATION_CACHE_DIR is empty)"
    found = sum(1 for _ in folder.glob("*-cache"))  # beside them are times of access and locks
    if not found:
        return f"none yet in {folder}"
    return f"{found} in {folder}, which serve again for the same model, settings and shapes"


def _accelerator(device: str) -> tuple[Rates, str, str]:
    """Rates for an accelerator, the words for it, and where the figures come from."""
    measured, found = GPUS["h100"], find_accelerator(device)
    for name, rates in (("h100", H100), ("h200", H200)):
        if found is GPUS[name]:
            return rates, f"on one {device}", f"rates measured on an {name.upper()}, {_MEASURED}"
    if found is None:
        on = f"on one H100 (for what is here, {device}, no figures are known)"
        return H100, on, f"rates measured on an H100, {_MEASURED}"
    # A token is decoded as fast as weights are read; the rest is multiplication.
    rates = H100.on(found.hbm_bandwidth / measured.hbm_bandwidth, found.flops / measured.flops)
    return rates, f"on one {device}", "an H100's measured rates and both data sheets"


def _disk(config: StudyConfig, size: Size, runs: int) -> int:
    counts = DEFAULT_COUNTS | dict(config.prompts.counts)
    captured = counts["concept"] * (len(config.domains) + 1)
    # The base's, and those of the arm that is being evaluated; its rewrites' and both together.
    copies = 2 if config.concepts.contrast == "shared" else 4
    activations = 4 * captured * (size.layers + 1) * size.width * len(config.concepts.poolings)
    # Seven projections of a layer, each between two widths of which the wider is some four times.
    rank = config.unlearn.lora.rank
    adapters = 4 * rank * size.layers * size.width * 7 * 3
    whole = 2 * size.parameters
    trained = sum(
        adapters if config.arm(arm).trainable == "lora" else whole for arm in config.arms
    ) * len(config.seeds)
    exported = runs * whole if config.export else 0
    # Of the run in training, its newest checkpoints with the optimizer's state.
    checkpoints = 3 * config.checkpoints.keep * (trained // max(runs, 1))
    return copies * activations + trained + checkpoints + exported


def _bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number > 2**29 else f"{number / 2**20:.0f} MiB"


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.1f} million" if tokens >= 1e5 else f"{tokens:,}"
