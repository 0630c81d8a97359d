"""Runs what a config describes: one study, or with `cells` several in one folder."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from ema_jax import config as config_lib
from ema_jax.config import ModelConfig, StudyConfig
from ema_jax.data.prompts import build_prompts, known_offline
from ema_jax.errors import UserError, did_you_mean
from ema_jax.models.hub import ModelSource
from ema_jax.report import write_replication_report
from ema_jax.runtime import distributed, files
from ema_jax.runtime.compilation import watch_compilation
from ema_jax.runtime.leases import locked
from ema_jax.study import checks, plan, watching
from ema_jax.study.pipeline import NAMES, Study
from ema_jax.study.replication import summarise, unfinished
from ema_jax.study.session import find_model
from ema_jax.study.workdir import Workdir

Sources = Mapping[ModelConfig, ModelSource | None]


def run(
    config: StudyConfig,
    workdir: str | Path,
    *,
    only: Sequence[str] | None = None,
    dry_run: bool,
    start: str | Path | None = None,
) -> None:
    """Runs what the config describes.

    Args:
        config: a study, or a replication if it has `cells`.
        workdir: its folder; finished stages in it are skipped.
        only: names of the stages to run; all by default.
        dry_run: validate everything and print the plan; neither runs nor writes anything.
        start: another study's folder, whose finished stages are copied where they are the same.

    Raises:
        UserError: before any expensive work, for whatever is wrong with config, model or folder.
    """
    unknown = [name for name in only or () if name not in NAMES]
    if unknown:
        known = f"{', '.join(NAMES)}{did_you_mean(unknown[0], NAMES)}"
        raise UserError(f"--stage: {unknown[0]!r} is none of {known}")
    if only is not None and "report" in only:
        only = [*only, "analyse"]  # what the page shows; made again only where something changed
    if config.grid:
        raise UserError("config: grid: this is a sweep; run it with python -m ema_jax.sweep")
    root = Path(workdir)
    if os.path.lexists(root) and not os.path.isdir(root):
        raise UserError(f"--workdir: {root} is a file; name a folder")
    files.check_folder(root)
    cells = {name: config_lib.cell(config, name) for name in config.cells} or {"": config}
    if bool(config.cells) != (root / "cells").is_dir() and any(root.glob("[!.]*")):
        kind = "a single study" if config.cells else "a replication"
        raise UserError(f"{root}: holds {kind}; choose another --workdir")
    if start is not None:
        _check_start(Path(start), root)
    if not dry_run:  # which downloads nothing
        for cell in cells.values():
            checks.check_before_download(cell, judges=only is None)
    sources = {
        model: find_model(model, download=not dry_run)
        for model in dict.fromkeys(cell.model for cell in cells.values())
    }
    studies = {}
    for name, cell in cells.items():
        source = sources[cell.model]
        if source is not None:
            place = root / "cells" / name if name else root
            studies[name] = Study(cell, Workdir(place, only, _start_of(start, name)), source)
            studies[name].workdir.check(studies[name].settings())
    if dry_run:
        _dry_run(cells, sources, studies)
        return
    for study in studies.values():  # all of them, before the first one takes hours
        study.check()
    watch_compilation()
    with locked(root):
        for name in list(studies):
            if name:
                logging.info("cell %s", name)
            study = studies.pop(name)
            ran, artifacts = study.run(), study.artifacts
            del study  # it holds its model as long as it lives
            watching.close(artifacts, ran=ran)
        if config.cells and (only is None or "report" in only):
            _write_replication(root, cells)


def _check_start(start: Path, root: Path) -> None:
    if not any((start / name).is_dir() for name in ("stages", "cells")):
        raise UserError(f"--from={start}: not a study's folder: it has no finished stages")
    if start.resolve() == root.resolve():
        raise UserError(f"--from={start}: is the --workdir itself; leave it out to resume")


def _start_of(start: str | Path | None, cell: str) -> Path | None:
    """The folder that a cell starts from: its namesake's, or the one study that there is."""
    if start is None:
        return None
    own = Path(start) / "cells" / cell
    return own if cell and own.is_dir() else Path(start)


def _dry_run(
    cells: Mapping[str, StudyConfig], sources: Sources, studies: Mapping[str, Study]
) -> None:
    """Validates what needs no device, then prints the plan."""
    away: dict[str, list[str]] = {}
    for name, cell in cells.items():
        study = studies.get(name)
        if study is None:
            away[name] = checks.check_without_model(cell)
            continue
        study.check_settings()
        if study.asks_models:
            away[name] = checks.check_judges(cell)
            study.check_inputs()
        elif known_offline(cell.prompts):
            build_prompts(cell.prompts, cell.domains, cell.target)
    for name, cell in cells.items():
        print(plan.text(name, cell, sources[cell.model], studies.get(name), away.get(name, ())))


def _write_replication(root: Path, cells: Mapping[str, StudyConfig]) -> None:
    left = unfinished(root, cells)
    if left:
        logging.warning(
            "no report of the replication yet: cells %s are unfinished", ", ".join(left)
        )
        return
    made = summarise(root, cells)
    files.write_json(root / "replication.json", made)
    files.write_csv(root / "replication.csv", made["rows"])
    write = functools.partial(write_replication_report, root, made)
    distributed.first_only(write, "report")
    logging.info("report: %s", root / "report/index.html")
