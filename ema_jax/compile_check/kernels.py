"""Kernels of a compiled GPU program: operations and bytes, read from its HLO text.

XLA's own `cost_analysis` takes a loop's body once; here loops are multiplied out. Of a kernel the
products are counted, and the arrays that it reads and writes: of an array that it takes a slice of
or changes in place, the slice.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ema_jax.compile_check.hlo import Module, array_bytes, called_by, dimensions, operands

_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d",]*)[\]}]')
# What runs no kernel of its own, or one that is counted where it starts.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier", "domain"),
    *("async-start", "async-update", "async-done", "copy-done", "fusion-done"),
}
_COLLECTIVE = re.compile(r"all-|reduce-scatter|collective-|send|recv")
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or several that the compiler wrote as one instruction.

    Attributes:
        name: of the instruction.
        flops: of its products, per execution; of float32 factors twice as many, as the units that
            multiply bfloat16 take twice as long for these.
        bytes: read and written, per execution.
        times: executions per run of the program.
    """

    name: str
    flops: float
    bytes: int
    times: int


class _Line(NamedTuple):
    """An instruction."""

    root: bool
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    rest: str  # operands and attributes as they are written


def read(hlo: str) -> list[Kernel]:
    """The kernels of an optimised HLO module (`compiled.as_text()`)."""
    module = Module.of(hlo)
    bodies = {name: list(_lines(lines)) for name, lines in module.bodies.items()}
    inside = {
        called
        for body in bodies.values()
        for line in body
        if line.operation not in ("call", "while", "conditional", "async-start")
        for called in called_by(line.rest)
    }
    return [
        Kernel(line.name, _flops(line, shapes, bodies), _bytes(line, shapes, bodies), times)
        for name, times in module.times.items()
        if name not in inside
        for shapes in [{line.name: line.shape for line in bodies.get(name, ())}]
        for line in bodies.get(name, ())
        if line.operation not in _FREE and not _COLLECTIVE.match(line.operation)
    ]


def _lines(lines: Sequence[str]) -> Iterator[_Line]:
    for text in lines:
        match = _INSTRUCTION.match(text)
        if match:
            names = tuple(operands(match[5]))
            yield _Line(bool(match[1]), match[2], match[3], match[4], names, match[5])


def _flops(line: _Line, shapes: Mapping[str, str], bodies: Mapping[str, Sequence[_Line]]) -> float:
    """Operations of the products of an instruction and of what it calls."""
    if line.operation not in ("dot", "custom-call"):
        return sum(
            _flops(inner, {one.name: one.shape for one in bodies[called]}, bodies)
            for called in called_by(line.rest)
            for inner in bodies.get(called, ())
        )
    contracted = _CONTRACTED.search(line.rest)
    left = shapes.get(line.operands[0], "") if line.operands else ""
    if contracted is None or not dimensions(left):
        return 0.0
    sizes = dimensions(left)
    summed = math.prod(sizes[int(n)] for n in contracted[1].replace('"', "").split(",") if n)
    wide = 2 if left.startswith("f32") else 1
    return 2.0 * wide * summed * math.prod(dimensions(line.shape))


def _bytes(line: _Line, shapes: Mapping[str, str], bodies: Mapping[str, Sequence[_Line]]) -> int:
    """Bytes that an instruction reads and writes."""
    if line.operation in ("fusion", "fusion-start") and (called := called_by(line.rest)):
        return _fusion_bytes(bodies.get(called[0], ()))
    written = array_bytes(line.shape)
    if line.operation in _SLICES:
        return 2 * sum(written)
    if line.operation == "dynamic-update-slice":
        return 2 * sum(array_bytes(shapes.get(line.operands[1], "")))
    if line.operation in ("custom-call", "copy-start"):
        written = written[:1]  # what follows is the kernel's scratch space
    return sum(written) + sum(sum(array_bytes(shapes.get(one, ""))) for one in line.operands)


def _fusion_bytes(body: Sequence[_Line]) -> int:
    """Bytes that a fused computation reads of its parameters and writes of its results."""
    lines = {line.name: line for line in body}
    users: dict[str, list[_Line]] = {}
    for line in body:
        for operand in line.operands:
            users.setdefault(operand, []).append(line)
    read = sum(_read_of(line, users) for line in body if line.operation == "parameter")
    return read + sum(_written(line, lines) for line in body if line.root)


def _read_of(value: _Line, users: Mapping[str, Sequence[_Line]]) -> int:
    """Bytes that are read of a parameter: of its slices, where nothing else takes it."""
    total = 0
    for user in users.get(value.name, ()):
        first = user.operands[0] == value.name
        if user.operation == "bitcast":
            total += _read_of(user, users)
        elif user.operation in _SLICES and first:
            total += sum(array_bytes(user.shape))
        elif not (user.operation == "dynamic-update-slice" and first):
            return sum(array_bytes(value.shape))
    return min(total, sum(array_bytes(value.shape)))


def _written(line: _Line, lines: Mapping[str, _Line]) -> int:
    """Bytes of a result: of the slice, where an array is changed in place."""
    if line.operation == "bitcast" and line.operands[0] in lines:
        return _written(lines[line.operands[0]], lines)
    if line.operation == "tuple":
        return sum(_written(lines[one], lines) for one in line.operands if one in lines)
    if line.operation == "dynamic-update-slice" and line.operands[1] in lines:
        return sum(array_bytes(lines[line.operands[1]].shape))
    return sum(array_bytes(line.shape))
