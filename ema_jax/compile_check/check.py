"""Compiles a study's programs for devices that are not there and reports whether they fit."""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from ema_jax.compile_check import collectives, kernels, programs, roofline
from ema_jax.compile_check.topology import Topology
from ema_jax.compile_check.workload import Lengths, Workload, resolved
from ema_jax.config import StudyConfig
from ema_jax.errors import UserError
from ema_jax.models.sharding import batch_multiple
from ema_jax.runtime.devices import GIB
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.trainer import check_arm

_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([GMK]) of ([\d.]+)([GMK]) hbm")
_UNITS = {"G": 1.0, "M": 1 / 1024, "K": 1 / 1024**2}
_REMATERIALISED = "nvoluntary full rematerialization"
_BATCH_FACTORS = (1, 2, 4)


def check(
    config: StudyConfig,
    topology: Topology,
    prompt_tokens: int,
    names: tuple[str, ...],
    lengths: Lengths = "full",
) -> dict[str, Any]:
    """Compiles programs of a study for a slice or for GPUs.

    Args:
        config: the study.
        topology: the devices.
        prompt_tokens: length of a rendered prompt.
        names: programs to compile, of `programs.PROGRAMS`.
        lengths: of the training examples.

    Returns:
        The figures of the train step (or of the first program, without a train step), `programs`
        with the figures of each, and `fits` over all of them. Sizes are in GiB per chip.

    Raises:
        UserError: the mesh does not use all devices, the sizes of the model are not known, or
            the trainer would refuse an arm on this mesh (`check_arm`).
    """
    shapes, mesh = Workload.of(config, prompt_tokens, lengths), topology.mesh(config.mesh)
    for name in config.arms:  # as the study does before it loads anything
        check_arm(shapes.model, config.arm(name), mesh.shape, f"arms.{name}")
    work = resolved(shapes, mesh)
    compiled = {name: _figures(p, topology) for name, p in programs.lowered(work, mesh, names)}
    first = dict(compiled[names[0]])
    if "train" in compiled:
        first = compiled["train"] | {
            "remat": work.arm.remat,
            "tokens": roofline.train_tokens(work, batch_multiple(mesh)),
            "bound": _bound(work, topology, mesh, compiled["train"]),
        }
    return {
        "fits": all(figures["fits"] for figures in compiled.values()),
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "capacity_gib": topology.capacity_gib,
        "decode_rows": work.decode_rows,
        **{key: value for key, value in first.items() if key != "fits"},
        "programs": compiled,
    }


def compare_meshes(
    config: StudyConfig, topology: Topology, prompt_tokens: int, lengths: Lengths = "full"
) -> list[dict[str, Any]]:
    """Compiles the train step for every mesh, with one, two and four times the config's batches.

    The arguments are those of `check`.

    Returns:
        A row per mesh and batch size that the trainer accepts: those that fit, by seconds per
        example in the cost model of `ema_jax.compile_check.roofline`, then those that do not.

    Raises:
        UserError: the trainer would refuse every mesh and batch size.
    """
    workload = Workload.of(config, prompt_tokens, lengths)
    rows, refusal = [], None
    for shape in roofline.candidate_meshes(workload, len(topology.devices)):
        mesh = topology.mesh(shape)
        for factor in _BATCH_FACTORS:
            try:
                for name in config.arms:
                    arm = _scaled(config.arm(name), factor)
                    check_arm(workload.model, arm, mesh.shape, f"arms.{name}")
            except UserError as error:
                refusal = error
                logging.info("mesh %s, %d times the batch: refused: %s", shape, factor, error)
                continue
            scaled = dataclasses.replace(workload, arm=_scaled(workload.arm, factor))
            work = resolved(scaled, mesh)
            ((_, program),) = programs.lowered(work, mesh, ("train",))
            figures = _figures(program, topology)
            bound = _bound(work, topology, mesh, figures)
            row = {"mesh": shape, "examples": work.train_rows, **figures, **bound}
            row["seconds_per_example"] = bound["seconds"] / work.train_rows
            rows.append(row)
            logging.info(
                "mesh %s, %d examples: %.2f of %s GiB per chip",
                *(shape, work.train_rows, row["hbm_gib_per_chip"], topology.capacity_gib),
            )
            if not figures["fits"]:
                break  # a larger batch does not fit either
    if not rows and refusal is not None:
        raise refusal
    return sorted(rows, key=lambda row: (not row["fits"], row["seconds_per_example"]))


def _scaled(arm: UnlearnConfig, factor: int) -> UnlearnConfig:
    return dataclasses.replace(
        arm,
        batch_size=factor * arm.batch_size,
        retain_batch_size=factor * arm.retain_batch_size,
    )


def mesh_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `compare_meshes` as text."""
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
    found = {**dataclasses.asdict(bound), "seconds": bound.seconds, "limit": bound.limit}
    return found if known else found | {"communication": None, "limit": "unknown"}


def _figures(program: Any, topology: Topology) -> dict[str, Any]:
    """Compiles a lowered program: memory per chip, collectives, seconds of compilation."""
    devices, compiled, used, limit = topology.devices_per_chip, None, 0.0, 0.0
    start, text = time.monotonic(), None
    with tempfile.TemporaryDirectory() as folder, _captured_stderr() as log:
        try:
            compiled = program.compile(compiler_options=topology.compiler_options(folder))
            seconds = time.monotonic() - start
            text = _text(compiled, Path(folder))
        except Exception as error:
            seconds = time.monotonic() - start
            match = _OUT_OF_MEMORY.search(str(error))
            if match is None:
                raise
            used, limit = (float(match[i]) * _UNITS[match[i + 1]] * devices for i in (1, 3))
    shared = {
        "full_rematerialisations": log[0].count(_REMATERIALISED),
        "compile_seconds": round(seconds, 1),
    }
    if compiled is None:
        figures = {"fits": False, "hbm_gib_per_chip": used, "over_gib": used - limit}
        return figures | {"argument_gib": None, "temp_gib": None, "collectives": None} | shared
    memory = compiled.memory_analysis()
    own_output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held = memory.argument_size_in_bytes + own_output + memory.temp_size_in_bytes
    held += memory.generated_code_size_in_bytes
    found, more = None, {}
    if text is None:
        logging.warning("collectives unknown: the compiler does not print this program")
    else:
        found = collectives.summary(collectives.read(text, len(topology.devices)))
        if topology.card is not None:
            more = {"kernels": roofline.kernel_bound(kernels.read(text), topology.chip)}
    return {
        "fits": held * devices <= topology.capacity_gib * GIB,
        "hbm_gib_per_chip": held * devices / GIB,
        "argument_gib": memory.argument_size_in_bytes * devices / GIB,
        "temp_gib": memory.temp_size_in_bytes * devices / GIB,
        "collectives": found,
        **more,
        **shared,
    }


def _text(compiled: Any, written: Path) -> str | None:
    """The optimised program: as JAX prints it, or else as the compiler wrote it into a folder.

    JAX reads libtpu's program before it prints it, which fails where the embeddings are looked up
    on the sparse cores of a v5p or v6e.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        files = sorted(written.glob("*.after_optimizations.txt"))
        return files[-1].read_text() if files else None


@contextlib.contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Captures stderr of C++ code: XLA reports full rematerialisation in its log alone.

    Yields an empty list, to which the text is appended on exit.
    """
    sys.stderr.flush()
    captured: list[str] = []
    original = os.dup(2)
    with tempfile.TemporaryFile("w+b") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield captured
        finally:
            os.dup2(original, 2)
            os.close(original)
            file.seek(0)
            captured.append(file.read().decode(errors="replace"))
