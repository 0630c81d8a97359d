"""What a finished study's folder holds, without running one."""

import dataclasses
import functools
from pathlib import Path

from small_study import small_config

from ema_jax import config as ema
from ema_jax.organism import CHECKPOINTS
from ema_jax.study.pipeline import STAGES, Instance, Stage, Study
from ema_jax.study.session import ModelSource
from ema_jax.study.workdir import Workdir


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def sketch(folder: Path, only=None, killed: str | None = None, **changes) -> list[str]:
    """Runs a study whose stages write a file each and run no model; returns those that ran.

    Args:
        folder: the study's.
        only: as `--stage`.
        killed: the instance of a stage in which the process dies.
        changes: to the config; `fingerprint`, `weights_fingerprint`, `token_files` and `revision`
            to those of the model.
    """
    done: list[str] = []

    def noting(stage: Stage, session, artifacts, context, run=None) -> list[Path]:
        name = Instance(stage, run).name
        if name == killed:
            raise KeyboardInterrupt
        done.append(name)
        path = folder / "out" / name.replace("/", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        return [path]

    config = small_config()
    source = ModelSource(
        "x",
        CHECKPOINTS / "qwen2",
        changes.pop("revision", None),
        changes.pop("fingerprint", "f"),
        changes.pop("weights_fingerprint", "w"),
        changes.pop("token_files", {"tokenizer.json": "t"}),
    )
    config.arms = changes.pop("arms", config.arms.to_dict())
    config.update(changes)
    stages = [dataclasses.replace(s, run=functools.partial(noting, s)) for s in STAGES]
    Study(ema.read(config), Workdir(folder, only), source, stages).run()
    return done
