"""Collectives of a compiled program, read from its HLO text; loops are multiplied out."""

import dataclasses
import math
import re
from collections.abc import Sequence

from ema_jax.compile_check.hlo import Module, array_bytes, operands

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\((.*)$")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Replica groups are written in one of three ways.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: one of `KINDS`.
        bytes: size of its result on one device, per execution.
        group: number of devices that take part.
        times: executions per run of the program: the trips of the loops around it.
    """

    kind: str
    bytes: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all executions, by the ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.group - 1.0,  # its result is 1/group of its operand
            "all-to-all": share,
            "collective-permute": 1.0,
        }[self.kind]
        return factor * self.bytes * self.times


def by_loop(hlo: str, devices: int) -> dict[str, list[Collective]]:
    """Loop → the collectives in it; `ENTRY` for those in none.

    The fusions of an asynchronous collective share its channel and count once in each loop:
    another loop may have the same channel for a collective of its own.

    Args:
        hlo: `compiled.as_text()`.
        devices: how many take part in an instruction without groups.
    """
    module = Module.of(hlo)
    found: dict[str, dict[object, Collective]] = {}
    for name, times in module.times.items():
        here = found.setdefault(module.homes[name], {})
        for line in module.bodies.get(name, ()):
            match = _INSTRUCTION.match(line)
            kind = match[2].removesuffix("-start") if match else ""
            if match is None or kind not in KINDS:
                continue
            size = _result_bytes(match[1], max(len(operands(match[3])), 1))
            channel = _CHANNEL.search(line)
            key = (kind, channel[1], size) if channel else (name, len(here))
            one = Collective(kind, size, _group(line, devices), times)
            if key not in here or here[key].times < one.times:
                here[key] = one
    return {loop: list(here.values()) for loop, here in found.items() if here}


def read(hlo: str, devices: int) -> list[Collective]:
    """Reads the collectives of an optimised HLO module; see `by_loop`."""
    return [one for loop in by_loop(hlo, devices).values() for one in loop]


def summary(collectives: Sequence[Collective]) -> dict[str, dict[str, int]]:
    """Kind → executions, bytes of results and bytes sent, on one device per run."""
    result = {}
    for kind in KINDS:
        of_kind = [c for c in collectives if c.kind == kind]
        if of_kind:
            result[kind] = {
                "count": sum(c.times for c in of_kind),
                "bytes": sum(c.bytes * c.times for c in of_kind),
                "sent_bytes": round(sum(c.sent for c in of_kind)),
            }
    return result


def _result_bytes(shape: str, count: int) -> int:
    """Bytes of the results, as many as there are operands: compilers combine collectives.

    An asynchronous start returns them alone, or (operands, results, …).
    """
    sizes = array_bytes(shape)
    return sum(sizes[count : 2 * count] if len(sizes) >= 2 * count else sizes)


def _group(line: str, devices: int) -> int:
    if match := _IOTA.search(line):
        return int(match[2])
    if match := _MESH.search(line):
        sizes = dict(re.findall(r"('[^']*')=(\d+)", match[1]))
        # An axis is written as 'axis', or as 'axis':(before)size where it is split.
        axes = re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if match := _LISTED.search(line):
        return len(match[1].split(",")) if match[1] else devices
    return devices
