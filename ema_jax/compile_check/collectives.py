"""Collectives of a compiled program, read from its HLO text; loops are multiplied out."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+)\s*\(.*\)\s*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")
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


def read(hlo: str, devices: int) -> list[Collective]:
    """Reads the collectives of an optimised HLO module.

    A loop counts as many trips as its condition allows, if that contains a number. The fusions of
    an asynchronous collective share its channel and count once in each loop: another loop may have
    the same channel for a collective of its own.

    Args:
        hlo: `compiled.as_text()`.
        devices: how many take part in an instruction without groups.
    """
    bodies = dict(_computations(hlo))
    times, homes = _executions(bodies)
    found: dict[object, Collective] = {}
    for name, lines in bodies.items():
        for line in lines:
            match = _INSTRUCTION.match(line)
            kind = match[2].removesuffix("-start") if match else ""
            if match is None or kind not in KINDS or name not in times:
                continue
            size = _result_bytes(match[1], kind, match[2].endswith("-start"))
            channel = _CHANNEL.search(line)
            key = (kind, channel[1], size, homes[name]) if channel else len(found)
            one = Collective(kind, size, _group(line, devices), times[name])
            if key not in found or found[key].times < one.times:
                found[key] = one
    return list(found.values())


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


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in hlo.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            name, lines = ("ENTRY" if line.startswith("ENTRY") else match[1]), []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _executions(bodies: dict[str, list[str]]) -> tuple[dict[str, int], dict[str, str]]:
    """Number of runs of each computation that the entry reaches, and the loop that it is of."""
    times: dict[str, int] = {}
    homes: dict[str, str] = {}

    def visit(name: str, count: int, home: str) -> None:
        times[name] = times.get(name, 0) + count
        homes[name] = home
        for line in bodies.get(name, ()):
            loop = _CONDITION.search(line)
            for called in _CALLED.findall(line):
                visit(called, count * _trips(line, bodies), called if loop else home)
            for branches in _BRANCHES.findall(line):
                for branch in branches.split(","):
                    visit(branch.strip().removeprefix("%"), count, home)

    visit("ENTRY", 1, "ENTRY")
    return times, homes


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Trips of a loop: as noted by the compiler, or the limit in its condition."""
    condition = _CONDITION.search(line)
    if condition is None:
        return 1
    if known := _TRIPS.search(line):
        return int(known[1])
    waiting, limits = [condition[1]], [1]
    while waiting:
        for inner in bodies.get(waiting.pop(), ()):
            limits += [int(number) for number in _CONSTANT.findall(inner)]
            waiting += _CALLED.findall(inner)
    return max(limits)


def _result_bytes(shape: str, kind: str, started: bool) -> int:
    sizes = [_bytes(*array) for array in _ARRAY.findall(shape)]
    if not started or len(sizes) == 1:
        return sum(sizes)
    # An asynchronous start returns (operands, results, …): the result is the largest of these, or
    # the smallest for a reduce-scatter.
    return min(s for s in sizes if s) if kind == "reduce-scatter" else max(sizes)


def _bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8


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
