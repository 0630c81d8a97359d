"""The folder of a grid of studies, and a worker that runs its units of work.

shared/GROUP/    the stages before `unlearn`, once for all points that agree on them
points/POINT/    the folder of each point's study, with the shared stages linked into it
claims/          leases of the units in progress
finished/        one file per finished unit
sweep.csv        one row per cell, also as sweep.parquet; report/index.html over all of them
"""

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from ema_jax.config import ModelConfig, StudyConfig
from ema_jax.errors import AskedToStopError, RunStoppedError, UserError
from ema_jax.models.hub import ModelSource
from ema_jax.runtime import compilation, files
from ema_jax.runtime.leases import Leases
from ema_jax.study import checks
from ema_jax.study.pipeline import OF_RUNS, SHARED, Study
from ema_jax.study.session import find_model
from ema_jax.study.workdir import Workdir
from ema_jax.sweep import table
from ema_jax.sweep.grid import Cell, Point, cells, points

_SECONDS_BETWEEN_LOOKS = 0.5


class _Unit(NamedTuple):
    name: str
    needs: tuple[str, ...]
    work: Callable[[], None]


class StudyGrid:
    """A grid of studies and the folder that its workers share."""

    def __init__(self, config: StudyConfig, folder: str | Path, *, download: bool = True):
        self.folder = Path(folder)
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise UserError(f"--workdir: {self.folder} is a file; name a folder")
        files.check_folder(self.folder)
        if any((self.folder / name).exists() for name in ("stages", "cells")):
            raise UserError(f"{self.folder}: holds a study or a replication; choose another")
        self.points = points(config)
        self.cells = cells(self.points)
        self._found: dict[ModelConfig, ModelSource | None] = {}
        for point in self.points if download else ():
            checks.check_before_download(point.config)
        for point in self.points:
            model = point.config.model
            if model not in self._found:
                self._found[model] = find_model(model, download=download)
        for point in self.points:
            if self._found[point.config.model] is not None:
                study = self._study(point.config, self._workdir(point))
                study.workdir.check(study.settings())
                study.check_settings()
        if not all(self.finished(cell.name) for cell in self.cells):
            self._check_groups(inputs=not download)

    def _check_groups(self, *, inputs: bool) -> None:
        """Checks what the points of a group have in common: the judges, and on request inputs.

        A worker checks its inputs when it begins: many workers start at once, and to build the
        prompts of every group takes time.
        """
        for point in {point.group: point for point in self.points}.values():
            checks.check_judges(point.config)
            if inputs and self._found[point.config.model] is not None:
                self._study(point.config, self._workdir(point)).check_inputs()

    def model(self, point: Point) -> str:
        """Hub id of a point's model, or the name of its folder."""
        found = self._found[point.config.model]
        return found.id if found else point.config.model.source

    def finished(self, unit: str) -> bool:
        """Whether a unit is done."""
        return (self.folder / "finished" / f"{unit}.json").exists()

    def status(self, unit: str) -> dict[str, Any]:
        """Record of a finished unit: status, message, seconds.

        Raises:
            UserError: the file is something else.
        """
        path = self.folder / "finished" / f"{unit}.json"
        found = files.read_json(path)
        if not isinstance(found, dict) or not {"status", "message", "seconds"} <= found.keys():
            raise UserError(
                f"{path}: not the record of a finished unit; delete it and the unit is run again"
            )
        return found

    def work(self, *, only: int | None = None, expiry: float) -> None:
        """Runs units until all are finished, here or elsewhere; then writes table and report.

        Args:
            only: number of a cell to run alone (with the shared stages it needs), for array jobs.
            expiry: seconds after which the lease of a silent process is void.
        """
        # What one worker compiled serves all of them, and the next run.
        compilation.keep_programs(self.folder / "compiled")
        leases = Leases(self.folder / "claims", expiry)
        units = self._units()
        wanted = list(units)
        if only is not None:
            cell = self.cells[only].name
            wanted = [*units[cell].needs, cell]
        self._work_through(leases, [units[name] for name in wanted])
        if only is not None:  # the last cell of a point also analyses the point
            ready = [u for u in units.values() if all(map(self.finished, u.needs)) and u.needs]
            self._work_through(leases, [u for u in ready if u.name.startswith("point.")])
        if all(map(self.finished, units)):
            table.write(self.folder, [self._finished_cell(cell) for cell in self.cells])

    def _finished_cell(self, cell: Cell) -> table.FinishedCell:
        status = self.status(cell.name)
        return table.FinishedCell(cell, self.model(cell.point), status["status"], status["seconds"])

    def _work_through(self, leases: Leases, units: Sequence[_Unit]) -> None:
        left = list(units)
        while left:
            progress = False
            for unit in left:
                if self.finished(unit.name) or not all(map(self.finished, unit.needs)):
                    continue
                lease = leases.take(unit.name)
                if lease is None:
                    continue
                with lease:
                    # It may have been finished between the check and the lease.
                    if not self.finished(unit.name):
                        self._run_unit(unit)
                progress = True
            left = [unit for unit in left if not self.finished(unit.name)]
            if left and not progress:
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _run_unit(self, unit: _Unit) -> None:
        start = time.monotonic()
        outcome: dict[str, Any] = {"status": "done", "message": None}
        logging.info("%s", unit.name)
        try:
            unit.work()
        except AskedToStopError:
            raise  # it is resumed, here or by another worker
        except RunStoppedError as error:
            # A diverged run is a result: it is not repeated, and the other units continue.
            logging.warning("%s: %s", unit.name, error)
            outcome = {"status": "stopped", "message": str(error)}
        outcome["seconds"] = round(time.monotonic() - start, 3)
        files.write_json(self.folder / "finished" / f"{unit.name}.json", outcome)

    def _units(self) -> dict[str, _Unit]:
        """All units, in the order in which a single worker would run them."""
        units: dict[str, _Unit] = {}

        def add(name: str, needs: Sequence[str], work: Callable[[], None]) -> None:
            units[name] = _Unit(name, tuple(needs), work)

        of_point: dict[str, list[str]] = {}
        for cell in self.cells:
            shared = f"shared.{cell.point.group}"
            if shared not in units:
                add(shared, (), functools.partial(self._run_shared_stages, cell.point))
            add(cell.name, (shared,), functools.partial(self._run_cell, cell))
            of_point.setdefault(cell.point.name, []).append(cell.name)
        for point in self.points:
            analyse = f"point.{point.name}"
            add(analyse, of_point[point.name], functools.partial(self._analyse, point))
        return units

    def _run_shared_stages(self, point: Point) -> None:
        """Runs the stages that all points of a group share."""
        self._study(point.config, Workdir(self.folder / "shared" / point.group, SHARED)).run()

    def _run_cell(self, cell: Cell) -> None:
        """Trains and evaluates one arm with one seed."""
        self._link_shared_stages(cell.point)
        arms = {cell.arm: cell.point.config.arms[cell.arm]}
        config = dataclasses.replace(cell.point.config, arms=arms, seeds=(cell.seed,))
        self._study(config, self._workdir(cell.point, OF_RUNS)).run()

    def _analyse(self, point: Point) -> None:
        """Writes the point's `results.json`, over the arms of which no seed stopped."""
        runs = [cell for cell in self.cells if cell.point.name == point.name]
        stopped = {cell.arm for cell in runs if self.status(cell.name)["status"] != "done"}
        arms = {arm: own for arm, own in point.config.arms.items() if arm not in stopped}
        if not arms:
            raise RunStoppedError("every arm stopped")
        config = dataclasses.replace(point.config, arms=arms)
        self._study(config, self._workdir(point, ("analyse",))).run()

    def _link_shared_stages(self, point: Point) -> None:
        """Links the shared stages into a point's folder, which is then an ordinary study's."""
        source, target = Workdir(self.folder / "shared" / point.group), self._workdir(point)
        for stage in SHARED:
            manifest = source.manifest(stage)
            assert manifest is not None, stage
            for name in manifest["outputs"]:
                _link(source / name, target / name)
            _link(source.manifest_path(stage), target.manifest_path(stage))

    def _workdir(self, point: Point, only: Sequence[str] | None = None) -> Workdir:
        return Workdir(self.folder / "points" / point.name, only)

    def _study(self, config: StudyConfig, workdir: Workdir) -> Study:
        found = self._found[config.model]
        assert found is not None
        return Study(config, workdir, found)


def _link(source: Path, target: Path) -> None:
    """Hard-links a file, or copies it where links are unsupported. Files are never edited."""
    if target.exists():
        return
    with files.atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
