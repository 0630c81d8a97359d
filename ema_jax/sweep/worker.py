"""A sweep in its folder: which units of work there are, and a worker that takes them.

shared/GROUP/    the stages before `unlearn`, once for all points that agree on them
points/POINT/    an ordinary study's folder for every point, the shared stages linked into it
claims/          who is at what
finished/        one file a unit that is done
sweep.csv        one row a cell, sweep.parquet the same; report/index.html over all of them
"""

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from ema_jax.config import ModelConfig, StudyConfig
from ema_jax.errors import RunStoppedError, UserError
from ema_jax.runtime import files
from ema_jax.study.pipeline import OF_RUNS, SHARED, Study
from ema_jax.study.session import ModelSource
from ema_jax.study.workdir import Workdir
from ema_jax.sweep import table
from ema_jax.sweep.grid import Cell, Point, cells, points
from ema_jax.sweep.leases import Claims

_SECONDS_BETWEEN_LOOKS = 0.5


class _Unit(NamedTuple):
    name: str
    needs: tuple[str, ...]
    work: Callable[[], None]


class Sweep:
    """A grid of studies and its folder."""

    def __init__(self, config: StudyConfig, folder: str | Path, *, download: bool = True):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--workdir: {self.folder} is a file; name a folder")
        if any((self.folder / name).exists() for name in ("stages", "cells")):
            raise UserError(f"{self.folder}: holds a study or a replication; choose another")
        self.points = points(config)
        self.cells = cells(self.points)
        self._found: dict[ModelConfig, ModelSource | None] = {}
        for point in self.points:
            model = point.config.model
            if model not in self._found:
                self._found[model] = ModelSource.find(model, download=download)
        for point in self.points:
            if self._found[point.config.model] is not None:
                study = self._study(point.config, self._place(point))
                study.workdir.check(study.settings())

    def model(self, point: Point) -> str:
        """The model's Hub id or its folder's name."""
        found = self._found[point.config.model]
        return found.id if found else point.config.model.source

    def finished(self, unit: str) -> bool:
        """Whether a unit is done."""
        return (self.folder / "finished" / f"{unit}.json").exists()

    def status(self, unit: str) -> dict[str, Any]:
        """What a finished unit left: status, message, seconds."""
        return files.read_json(self.folder / "finished" / f"{unit}.json")

    def work(self, *, only: int | None = None, expiry: float) -> None:
        """Takes units until all are done, whoever does them; then writes table and report.

        Args:
            only: take one cell (and the shared stages that it needs), for array jobs.
            expiry: seconds after which the claim of a silent process is void.
        """
        # A program that one worker compiled is compiled for all of them, and for the next run.
        jax.config.update("jax_compilation_cache_dir", str(self.folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        claims = Claims(self.folder / "claims", expiry)
        units = self._units()
        wanted = list(units)
        if only is not None:
            cell = self.cells[only].name
            wanted = [*units[cell].needs, cell]
        self._take(claims, [units[name] for name in wanted])
        if only is not None:  # the last one of its point also analyses the point
            ready = [u for u in units.values() if all(map(self.finished, u.needs)) and u.needs]
            self._take(claims, [u for u in ready if u.name.startswith("point.")])
        if all(map(self.finished, units)):
            table.write(self)

    def _take(self, claims: Claims, units: Sequence[_Unit]) -> None:
        left = list(units)
        while left:
            moved = False
            for unit in left:
                if self.finished(unit.name) or not all(map(self.finished, unit.needs)):
                    continue
                claim = claims.take(unit.name)
                if claim is None:
                    continue
                with claim:
                    # It may have been finished between the look and the claim.
                    if not self.finished(unit.name):
                        self._do(unit)
                moved = True
            left = [unit for unit in left if not self.finished(unit.name)]
            if left and not moved:
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _do(self, unit: _Unit) -> None:
        start = time.monotonic()
        made: dict[str, Any] = {"status": "done", "message": None}
        logging.info("%s", unit.name)
        try:
            unit.work()
        except RunStoppedError as error:
            # A diverged run is a result: the others go on, and it is not tried again.
            logging.warning("%s: %s", unit.name, error)
            made = {"status": "stopped", "message": str(error)}
        made["seconds"] = round(time.monotonic() - start, 3)
        files.write_json(self.folder / "finished" / f"{unit.name}.json", made)

    def _units(self) -> dict[str, _Unit]:
        """Every unit in the order in which one worker would do them."""
        units: dict[str, _Unit] = {}

        def add(name: str, needs: Sequence[str], work: Callable[[], None]) -> None:
            units[name] = _Unit(name, tuple(needs), work)

        of_point: dict[str, list[str]] = {}
        for cell in self.cells:
            shared = f"shared.{cell.point.group}"
            if shared not in units:
                add(shared, (), functools.partial(self._share, cell.point))
            add(cell.name, (shared,), functools.partial(self._run, cell))
            of_point.setdefault(cell.point.name, []).append(cell.name)
        for point in self.points:
            analyse = f"point.{point.name}"
            add(analyse, of_point[point.name], functools.partial(self._analyse, point))
        return units

    def _share(self, point: Point) -> None:
        """The stages that all points of a group share."""
        self._study(point.config, Workdir(self.folder / "shared" / point.group, SHARED)).run()

    def _run(self, cell: Cell) -> None:
        """One arm with one seed."""
        self._adopt(cell.point)
        arms = {cell.arm: cell.point.config.arms[cell.arm]}
        config = dataclasses.replace(cell.point.config, arms=arms, seeds=(cell.seed,))
        self._study(config, self._place(cell.point, OF_RUNS)).run()

    def _analyse(self, point: Point) -> None:
        """The point's `results.json`, over the arms of which every seed went through."""
        runs = [cell for cell in self.cells if cell.point.name == point.name]
        stopped = {cell.arm for cell in runs if self.status(cell.name)["status"] != "done"}
        arms = {arm: own for arm, own in point.config.arms.items() if arm not in stopped}
        if not arms:
            raise RunStoppedError("every arm stopped")
        config = dataclasses.replace(point.config, arms=arms)
        self._study(config, self._place(point, ("analyse",))).run()

    def _adopt(self, point: Point) -> None:
        """Links the shared stages into a point's folder: it is then a study like any other."""
        source, target = Workdir(self.folder / "shared" / point.group), self._place(point)
        for stage in SHARED:
            manifest = source.manifest(stage)
            assert manifest is not None, stage
            for name in manifest["outputs"]:
                _link(source / name, target / name)
            _link(source.manifest_path(stage), target.manifest_path(stage))

    def _place(self, point: Point, only: Sequence[str] | None = None) -> Workdir:
        return Workdir(self.folder / "points" / point.name, only)

    def _study(self, config: StudyConfig, place: Workdir) -> Study:
        found = self._found[config.model]
        assert found is not None
        return Study(config, place, found)


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where there are none. Files are replaced whole, never changed."""
    if target.exists():
        return
    with files.atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
