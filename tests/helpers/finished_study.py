"""What a finished study's folder holds, without running one."""

from pathlib import Path

from small_study import small_config

from ema_jax import config as ema
from ema_jax.models.hub import ModelSource
from ema_jax.study.stage_bodies import Study
from ema_jax.study.workdir import Workdir


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


class Sketch(Study):
    """The study with its stages reduced to their names."""

    def __init__(self, config, workdir, found):
        super().__init__(config, workdir, found)
        self.done: list[str] = []

    def check(self, shape) -> None:
        """There is no model to check the arms against."""

    def _note(self, name: str) -> list[Path]:
        self.done.append(name)
        path = self.workdir / "out" / name.replace("/", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        return [path]

    def unlearn(self, arm, seed):
        return self._note(f"unlearn/{arm}/seed_{seed}")

    def evaluate(self, arm, seed):
        return self._note(f"evaluate/{arm}/seed_{seed}")


for _method, _stage in {
    "make_prompts": "prompts",
    "ask_base": "baseline",
    "find_concepts": "concepts",
    "make_forecast": "forecast",
    "harvest_refusals": "harvest",
    "analyse": "analyse",
    "report": "report",
}.items():
    setattr(Sketch, _method, lambda self, stage=_stage: self._note(stage))


def sketch(folder: Path, only=None, **changes) -> list[str]:
    """Runs the sketch of a study with changes to its config; the stages that ran, in order."""
    config = small_config()
    model = ModelSource("x", folder, None, changes.pop("fingerprint", "f"))
    config.arms = changes.pop("arms", config.arms.to_dict())
    config.update(changes)
    made = Sketch(ema.read(config), Workdir(folder, only), model)
    made.run()
    return made.done
