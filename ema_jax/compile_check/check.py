"""Compiles a study's programs for a TPU slice and says whether they fit."""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from ema_jax.compile_check import collectives, programs, roofline
from ema_jax.compile_check.programs import Workload
from ema_jax.compile_check.topology import GIB, Topology
from ema_jax.config import StudyConfig
from ema_jax.unlearning.trainer import check_arm

_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([GMK]) of ([\d.]+)([GMK]) hbm")
_UNITS = {"G": 1.0, "M": 1 / 1024, "K": 1 / 1024**2}
_REMATERIALISED = "nvoluntary full rematerialization"


def check(
    config: StudyConfig, topology: Topology, prompt_tokens: int, names: tuple[str, ...]
) -> dict[str, Any]:
    """Whether a study fits a slice.

    Args:
        config: the study.
        topology: the slice.
        prompt_tokens: length of a rendered prompt.
        names: of the programs to compile.

    Returns:
        The figures of the train step (of the first program, where that is left out), `programs`
        with those of each, and `fits` over all of them. Sizes are GiB on one chip.

    Raises:
        UserError: a mesh that does not use the slice, a model whose sizes are not known, or an arm
            that the trainer would refuse on this mesh.
    """
    work, mesh = Workload.of(config, prompt_tokens), topology.mesh(config.mesh)
    if "train" in names:
        for name in config.arms:  # as the study does before it loads anything
            check_arm(work.model, config.arm(name), mesh.shape, f"arms.{name}")
    made = {name: _figures(p, topology) for name, p in programs.lowered(work, mesh, names)}
    first = dict(made[names[0]])
    if "train" in made:
        first |= {"bound": _bound(work, topology, mesh, made["train"])}
    return {
        "fits": all(figures["fits"] for figures in made.values()),
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "capacity_gib": topology.chip.hbm_gib,
        **{key: value for key, value in first.items() if key != "fits"},
        "programs": made,
    }


def sweep(config: StudyConfig, topology: Topology, prompt_tokens: int) -> list[dict[str, Any]]:
    """Train steps over meshes and batch sizes (one, two and four times the config's).

    Returns:
        Those that fit, the fewest seconds an example first by the cost model of
        `ema_jax.compile_check.roofline`; then those that do not.
    """
    shared = Workload.of(config, prompt_tokens)
    rows = []
    for shape in roofline.meshes(shared, len(topology.devices)):
        mesh, sizes = topology.mesh(shape), set()
        for factor in (1, 2, 4):
            arm = dataclasses.replace(
                shared.arm,
                batch_size=factor * shared.arm.batch_size,
                retain_batch_size=factor * shared.arm.retain_batch_size,
            )
            work = dataclasses.replace(shared, arm=arm)
            examples = work.train_rows(mesh)
            if examples in sizes:
                continue
            sizes.add(examples)
            (program,) = programs.lowered(work, mesh, ("train",))
            figures = _figures(program[1], topology)
            bound = _bound(work, topology, mesh, figures)
            row = {"mesh": shape, "examples": examples, **figures, **bound}
            row["seconds_per_example"] = bound["seconds"] / examples
            rows.append(row)
            logging.info("mesh %s, %d examples: %s", shape, examples, _verdict(row, topology))
            if not figures["fits"]:
                break  # nor will a larger batch
    return sorted(rows, key=lambda row: (not row["fits"], row["seconds_per_example"]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The sweep as text."""
    lines = [
        "data fsdp tensor  examples  GiB/chip  fits  step ≥ ms  µs/example  limit          remat"
    ]
    for row in rows:
        data, fsdp, tensor = row["mesh"]
        lines.append(
            f"{data:4} {fsdp:4} {tensor:6}  {row['examples']:8}  {row['hbm_gib_per_chip']:8.2f}  "
            f"{'yes' if row['fits'] else 'NO':4}  {1e3 * row['seconds']:9.1f}  "
            f"{1e6 * row['seconds_per_example']:10.0f}  {row['limit']:13}  "
            f"{row['full_rematerialisations']:5}"
        )
    return "\n".join(lines)


def _bound(
    work: Workload, topology: Topology, mesh: Mesh, figures: dict[str, Any]
) -> dict[str, Any]:
    known = figures["collectives"] is not None
    sent = sum(kind["sent_bytes"] for kind in (figures["collectives"] or {}).values())
    bound = roofline.train_bound(work, topology, mesh, sent)
    made = {**dataclasses.asdict(bound), "seconds": bound.seconds, "limit": bound.limit}
    return made if known else made | {"communication": None, "limit": "unknown"}


def _verdict(row: dict[str, Any], topology: Topology) -> str:
    return f"{row['hbm_gib_per_chip']:.2f} of {topology.chip.hbm_gib} GiB a chip"


def _figures(program: Any, topology: Topology) -> dict[str, Any]:
    """Compiles a lowered program: its memory on one chip, its collectives, its seconds."""
    apart, compiled, used, limit = topology.devices_per_chip, None, 0.0, 0.0
    start = time.monotonic()
    with _stderr() as said:
        try:
            compiled = program.compile()
        except Exception as error:
            match = _OUT_OF_MEMORY.search(str(error))
            if match is None:
                raise
            used, limit = (float(match[i]) * _UNITS[match[i + 1]] * apart for i in (1, 3))
    shared = {
        "full_rematerialisations": said[0].count(_REMATERIALISED),
        "compile_seconds": round(time.monotonic() - start, 1),
    }
    if compiled is None:
        figures = {"fits": False, "hbm_gib_per_chip": used, "over_gib": used - limit}
        return figures | {"argument_gib": None, "temp_gib": None, "collectives": None} | shared
    memory = compiled.memory_analysis()
    own_output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held = memory.argument_size_in_bytes + own_output + memory.temp_size_in_bytes
    held += memory.generated_code_size_in_bytes
    try:
        found = collectives.summary(collectives.read(compiled.as_text(), len(topology.devices)))
    except jax.errors.JaxRuntimeError as error:  # libtpu cannot print some programs
        logging.warning("collectives unknown: %s", str(error).strip().splitlines()[0][:200])
        found = None
    return {
        "fits": held * apart <= topology.chip.hbm_gib * GIB,
        "hbm_gib_per_chip": held * apart / GIB,
        "argument_gib": memory.argument_size_in_bytes * apart / GIB,
        "temp_gib": memory.temp_size_in_bytes * apart / GIB,
        "collectives": found,
    } | shared


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """Keeps what C++ code writes to stderr: XLA tells of rematerialising in its log alone.

    Yields a list that holds the text once the block is left.
    """
    sys.stderr.flush()
    said: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+b") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
