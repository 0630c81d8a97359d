"""The grid of a sweep: points in the space of settings, and cells, one run of one arm each."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ema_jax.config import StudyConfig, replaced
from ema_jax.errors import UserError
from ema_jax.runtime.files import sha256_json

# What a point may change without another baseline, other concepts or another harvest.
_OWN = ("unlearn", "arms", "seeds", "export")


class Point(NamedTuple):
    """One choice of a value on every axis: an ordinary study."""

    name: str
    values: Mapping[str, Any]  # axis, as in `unlearn.learning_rate` → value
    config: StudyConfig
    group: str  # points of one group share every stage before `unlearn`


class Cell(NamedTuple):
    """One arm with one seed at one point: the unit of work."""

    number: int
    point: Point
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Unique in the sweep, and the same when the grid grows."""
        return f"{self.point.name}.{self.arm}.seed_{self.seed}"


def points(config: StudyConfig) -> list[Point]:
    """Every point of `config.grid`.

    Raises:
        UserError: an axis without values, one that no study has, or a value that makes no sense.
    """
    axes = list(_axes(config.grid))
    found = []
    for chosen in itertools.product(*(values for _, values in axes)):
        changes: dict[str, Any] = {}
        values = {}
        for (path, _), value in zip(axes, chosen, strict=True):
            _put(changes, path, value)
            values[".".join(path)] = value
        study = replaced(config, changes, f"grid {values}")
        words = [Path(str(value)).name for value in chosen] or ["study"]
        shared = {k: v for k, v in dataclasses.asdict(study).items() if k not in _OWN}
        group = _name([Path(study.model.source).name, study.target], shared)
        found.append(Point(_name(words, values), values, study, group))
    names = [point.name for point in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config: grid: a value is given twice (point {name})")
    return found


def cells(found: list[Point]) -> list[Cell]:
    """Every cell, those of a group and of a point together."""
    order = {group: i for i, group in enumerate(dict.fromkeys(p.group for p in found))}
    runs = (
        (point, arm, seed)
        for point in sorted(found, key=lambda point: order[point.group])
        for arm in point.config.arms
        for seed in point.config.seeds
    )
    return [Cell(i, *run) for i, run in enumerate(runs)]


def _axes(
    grid: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    for key, value in grid.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            yield from _axes(value, here)
        elif isinstance(value, list | tuple) and value:
            yield here, list(value)
        else:
            raise UserError(
                f"config: grid.{'.'.join(here)} = {value!r}: an axis needs a tuple of values, as "
                "in grid.unlearn.beta = (0.1, 0.2)"
            )


def _put(changes: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        changes = changes.setdefault(key, {})
    changes[path[-1]] = value


def _name(words: list[str], value: Any) -> str:
    """A readable name for a file, unique by a hash of what it stands for."""
    return f"{re.sub(r'[^a-zA-Z0-9]+', '_', '-'.join(words))[:60]}-{sha256_json(value)[:8]}"
