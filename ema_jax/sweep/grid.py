"""The points of a grid of settings, one study each, and its cells, one run of one arm each."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ema_jax.config import StudyConfig, replaced
from ema_jax.errors import UserError
from ema_jax.runtime.files import sha256_json

# Fields that may differ between points that share their baseline, concepts and harvest.
_AFTER_HARVEST = ("unlearn", "arms", "seeds", "export")


class Point(NamedTuple):
    """A study: one value on every axis of the grid."""

    name: str
    values: Mapping[str, Any]  # axis, as in `unlearn.learning_rate` → value
    config: StudyConfig
    group: str  # points of a group share all stages before `unlearn`


class Cell(NamedTuple):
    """One arm with one seed at one point."""

    number: int
    point: Point
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Unique in the grid, and unchanged when the grid grows."""
        return f"{self.point.name}.{self.arm}.seed_{self.seed}"


def points(config: StudyConfig) -> list[Point]:
    """All points of `config.grid`.

    Raises:
        UserError: an axis without values, an unknown field, or a value that the field refuses.
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
        shared = {k: v for k, v in dataclasses.asdict(study).items() if k not in _AFTER_HARVEST}
        group = _name([Path(study.model.source).name, study.target], shared)
        found.append(Point(_name(words, values), values, study, group))
    names = [point.name for point in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config: grid: a value is given twice (point {name})")
    return found


def cells(found: list[Point]) -> list[Cell]:
    """All cells, grouped by group and point."""
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
    """A readable file name, made unique by a hash of the value that it stands for."""
    return f"{re.sub(r'[^a-zA-Z0-9]+', '_', '-'.join(words))[:60]}-{sha256_json(value)[:8]}"
