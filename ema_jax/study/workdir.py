"""Stages: pure functions from artifacts to artifacts, skipped where theirs are up to date.

A stage leaves a manifest in `DIR/stages/` once all its files are written. It is skipped when the
manifest's settings and inputs are unchanged and its files are there, so a killed study resumes
where it stopped, and a folder is never silently turned into another study. Files that were changed
after their stage wrote them are refused (`manifest.verify`).
"""

import ctypes
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from ema_jax.errors import AskedToStopError, UserError
from ema_jax.runtime import distributed
from ema_jax.runtime.files import (
    atomic_path,
    json_safe,
    sha256_file,
    sha256_json,
    write_json,
)
from ema_jax.study.manifest import Manifest, read_manifest, stamp, verify


@dataclasses.dataclass(frozen=True)
class StageContext:
    """Settings, inputs and private folder of a running stage, for its resumption after a kill.

    Attributes:
        settings: those it runs with, as its manifest will record them.
        inputs: stage that it reads from → hash of what that one left.
        partial: a folder for files to find again; it belongs to these settings and inputs, and is
            removed once the stage is done.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    partial: Path

    def journal(self, name: str) -> Path:
        """Where responses are written as they come, under a name of the stage's own."""
        return self.partial / f"{name}.jsonl"


class Workdir:
    """A study's folder, and the stages that were run in it.

    Args:
        path: the folder.
        only: names of the stages that are wanted; all by default.
        start: another study's folder, which is only read: stages that were finished there with the
            same settings and inputs are copied and not run.
    """

    def __init__(
        self, path: str | Path, only: Sequence[str] | None = None, start: Path | None = None
    ):
        self.path = Path(path)
        self._only = only
        self._start = None if start is None else Workdir(start)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def manifest_path(self, stage: str) -> Path:
        """Where a stage's manifest is, or will be."""
        return self.path / "stages" / (stage.replace("/", ".") + ".json")

    def manifest(self, stage: str) -> Manifest | None:
        """The record that a stage left when it finished, or None."""
        path = self.manifest_path(stage)
        return read_manifest(path) if path.exists() else None

    def _verify(self, stage: str, manifest: Manifest) -> None:
        verify(self.path, self.manifest_path(stage), manifest)

    def check(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuses a folder in which a finished stage was run with other settings.

        Args:
            settings: stage → the settings that it would now be run with.
        """
        for stage, wanted in settings.items():
            manifest = self.manifest(stage)
            if manifest is None:
                continue
            changes = list(_differences(manifest["settings"], json_safe(wanted)))
            if changes:
                field, before, now = changes[0]
                raise UserError(
                    f"{self.path}: holds another study: its stage {stage} was run with {field} = "
                    f"{before!r}, and the config now says {now!r}; choose another --workdir"
                )

    def wanted(self, stage: str) -> bool:
        """Whether `--stage` asks for this stage."""
        return self._only is None or stage.split("/")[0] in self._only

    def run(
        self,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Iterable[str],
        function: Callable[[StageContext], Iterable[Path]],
        *,
        begin: Callable[[], None] | None = None,
        of_another: bool = True,
    ) -> float | None:
        """Runs a stage unless it is done, here or in the study that this one starts from.

        Args:
            stage: its name, `/` between its parts.
            settings: everything of the config that it depends on, as JSON.
            inputs: the stages that it reads from.
            function: does the work and returns the files or folders that it wrote.
            begin: called when the work starts; by default the stage's name is logged.
            of_another: whether what another study made of the same settings and inputs is as good.

        Returns:
            Seconds that the work took; None where it was done before.

        Raises:
            UserError: an input was never made and `--stage` leaves it out, or a file of an input
                or of this stage was changed since.
        """
        hashes = {}
        for name in inputs:
            upstream = self.manifest(name)
            if upstream is None:
                raise UserError(
                    f"{self.path}: stage {stage} needs the stage {name}, which was never run here; "
                    f"add it to --stage"
                )
            self._verify(name, upstream)
            hashes[name] = upstream["hash"]
        settings = json_safe(settings)
        manifest = self.manifest(stage)
        if manifest is not None and manifest["settings"] == settings:
            there = all((self.path / name).exists() for name in manifest["outputs"])
            if manifest["inputs"] == hashes and there:
                self._verify(stage, manifest)
                return None
        if manifest is None and of_another and self._taken(stage, settings, hashes):
            return None
        if distributed.stop_requested():
            raise AskedToStopError(
                f"{self.path}: asked to stop (SIGTERM or Ctrl-C) before the stage {stage}; the "
                "stages before it are kept, and the same command resumes from there"
            )
        if begin is None:
            logging.info("%s", stage)
        else:
            begin()
        if manifest is not None:  # an older record is not of the files that are written now
            distributed.barrier(stage)  # every process has read it
            if distributed.is_first():
                self.manifest_path(stage).unlink(missing_ok=True)
        start = time.monotonic()
        unfinished = self.path / ".partial" / stage.replace("/", ".")
        partial = unfinished / sha256_json([settings, hashes])[:16]
        outputs: dict[str, str] = {}
        for path in function(StageContext(settings, hashes, partial)):
            files = _files(path) if path.is_dir() else [path]
            outputs |= {str(p.relative_to(self.path)): sha256_file(p) for p in files}
        seconds = round(time.monotonic() - start, 3)
        write_json(
            self.manifest_path(stage),
            {
                "stage": stage,
                "settings": settings,
                "inputs": hashes,
                "outputs": outputs,
                "stamps": {name: stamp(self.path / name) for name in outputs},
                "hash": sha256_json([settings, hashes, outputs]),
                "wall_seconds": seconds,
            },
        )
        if distributed.is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
        _release_memory()
        return seconds

    def _taken(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """Copies a stage from the study that this one starts from; False if it has another."""
        found = None if self._start is None else self._start.manifest(stage)
        if self._start is None or found is None:
            return False
        if found["settings"] != settings or found["inputs"] != inputs:
            return False
        files = {name: self._start / name for name in found["outputs"]}
        if not all(file.exists() for file in files.values()):
            return False
        for name, file in files.items():
            if sha256_file(file) != found["outputs"][name]:
                raise UserError(
                    f"{file}: was changed after the stage {stage} wrote it; bring back the old "
                    "file, or leave out --from"
                )
        logging.info("%s: copied from %s", stage, self._start.path)
        for name, file in files.items():
            with atomic_path(self.path / name) as temporary:
                shutil.copyfile(file, temporary)
        stamps = {name: stamp(self.path / name) for name in files}
        write_json(self.manifest_path(stage), found | {"stamps": stamps})
        return True


def manifests(folder: Path) -> list[Manifest]:
    """The records of all stages that are finished in a study's folder, by name of their files."""
    return [read_manifest(path) for path in sorted((folder / "stages").glob("*.json"))]


def _release_memory() -> None:
    """Returns to the system the memory that a stage has freed, of which glibc keeps a good part.

    Compilation leaves much of it; the next stage's peak would come on top.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _files(folder: Path) -> list[Path]:
    """All files below, but for the temporary ones that a killed process left half-written."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


_UNSET = "(not set)"  # apart from null, which is a value


def _differences(before: Any, now: Any, path: str = "") -> Iterable[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{path}.{key}" if path else key
            yield from _differences(before.get(key, _UNSET), now.get(key, _UNSET), inner)
    elif before != now:
        yield path, before, now
