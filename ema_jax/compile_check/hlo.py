"""The text of a compiled program: its computations, and how often each of them runs."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+)\s*\(.*\)\s*->.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"get-tuple-element\(.*\), index=(\d+)")
_ROOT_TUPLE = re.compile(r"ROOT \S+ = .* tuple\((.*?)\)")
_ADDITION = re.compile(r" add\((?:.* )?%?([\w.-]+), (?:.* )?%?([\w.-]+)\)")
_OPERAND = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Module:
    """An optimised HLO module, loops multiplied out.

    A loop counts as many trips as the compiler notes, or else as its condition allows, if that
    contains a number, for a counter from zero in steps that its body shows.

    Attributes:
        bodies: computation → its lines, of all that the module has; `ENTRY` is the entry.
        times: computation → runs in one run of the program, of those that the entry reaches.
        homes: the same → the loop that it is of; `ENTRY` where it is of none.
    """

    bodies: Mapping[str, Sequence[str]]
    times: Mapping[str, int]
    homes: Mapping[str, str]

    @classmethod
    def of(cls, text: str) -> "Module":
        """From `compiled.as_text()`."""
        bodies = dict(_computations(text))
        times: dict[str, int] = {}
        homes: dict[str, str] = {}

        def visit(name: str, count: int, home: str) -> None:
            times[name] = times.get(name, 0) + count
            homes[name] = home
            for line in bodies.get(name, ()):
                loop = _CONDITION.search(line)
                for called in called_by(line):
                    visit(called, count * _trips(line, bodies), called if loop else home)
                for branches in _BRANCHES.findall(line):
                    for branch in branches.split(","):
                        visit(branch.strip().removeprefix("%"), count, home)

        visit("ENTRY", 1, "ENTRY")
        return cls(bodies, times, homes)


def called_by(line: str) -> list[str]:
    """Computations that an instruction runs: a fusion's, or the body of a loop."""
    return _CALLED.findall(line)


def operands(text: str) -> list[str]:
    """Names of an instruction's operands, from what follows the parenthesis that opens them."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return _OPERAND.findall(text[:i])
    return _OPERAND.findall(text)


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array of a shape as HLO writes it, as in `(f32[6,5]{1,0}, pred[])`."""
    return [_bytes(*array) for array in _ARRAY.findall(shape)]


def dimensions(shape: str) -> tuple[int, ...]:
    """Sizes of a shape's first array; `()` for a scalar."""
    match = _ARRAY.search(shape)
    return tuple(int(n) for n in match[2].split(",") if n) if match else ()


def _bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in sizes.split(",") if n) * bits // 8


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            name, lines = ("ENTRY" if line.startswith("ENTRY") else match[1]), []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _trips(line: str, bodies: Mapping[str, Sequence[str]]) -> int:
    """Trips of a loop: as noted by the compiler, or the limit in its condition over the step."""
    condition = _CONDITION.search(line)
    if condition is None:
        return 1
    if known := _TRIPS.search(line):
        return int(known[1])
    waiting, limits = [condition[1]], [1]
    while waiting:
        for inner in bodies.get(waiting.pop(), ()):
            limits += [int(number) for number in _CONSTANT.findall(inner)]
            waiting += called_by(inner)
    counters = [found[1] for x in bodies.get(condition[1], ()) if (found := _ELEMENT.search(x))]
    (body,) = called_by(line)[:1] or [""]
    step = _step(bodies.get(body, ()), int(counters[0])) if len(counters) == 1 else 1
    return -(-max(limits) // step)


def _step(body: Sequence[str], counter: int) -> int:
    """What a loop's body adds to the counter, which is so many in its tuple; 1 if it is not seen.

    TPU programs multiply while the parts of a kernel go around the mesh, two parts in a trip.
    """
    lines = {words[0].lstrip("%"): x for x in body if (words := x.replace("ROOT ", "").split())}
    after = next((found[1] for x in body if (found := _ROOT_TUPLE.search(x))), "")
    names = re.findall(r"%?([\w.-]+)(?:,|$)", re.sub(r"/\*.*?\*/", "", after))
    addition = _ADDITION.search(lines.get(names[counter], "")) if counter < len(names) else None
    for name in addition.groups() if addition else ():
        if number := _CONSTANT.search(lines.get(name, "")):
            return max(int(number[1]), 1)
    return 1
