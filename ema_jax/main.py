"""The whole study: `python -m ema_jax.main --config=configs/tiny.py --workdir=DIR`."""

from collections.abc import Sequence

from absl import flags

from ema_jax.runtime import cli
from ema_jax.runtime.paths import local_path
from ema_jax.study.flags import define_config_flag, read_config

KEPT = (
    "the finished stages are kept, and so is what the unfinished one left (responses, training "
    "state); the same command resumes from there"
)

STAGES = (
    "prompts",
    "baseline",
    "concepts",
    "forecast",
    "harvest",
    "dose",
    "unlearn",
    "evaluate",
    "analyse",
    "report",
)
"""Names of `ema_jax.study.pipeline.STAGES`, which is not imported before the flags are read."""


def define_flags() -> None:
    """Declares the command's flags."""
    define_config_flag("The study: a Python file with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the study's artifacts.")
    flags.DEFINE_list("stage", None, f"Run only these stages, of {', '.join(STAGES)}.")
    flags.DEFINE_string("from", None, "Copy from this study's folder the stages that are the same.")
    flags.DEFINE_bool("dry_run", False, "Validate everything and print the plan; run nothing.")
    cli.require("config", "workdir")


def main(argv: Sequence[str]) -> None:
    """Runs the study that the flags describe."""
    del argv
    # Imported after the flags are read: a mistyped one should not wait for JAX.
    from ema_jax.runtime import compilation, distributed
    from ema_jax.study import runner

    values = flags.FLAGS
    workdir = local_path(values.workdir, "--workdir")
    study = read_config()
    if not values.dry_run:
        compilation.compile_quickly()
        distributed.initialise(study.heartbeat_seconds)
        cli.keep_compiled_programs()
    start = flags.FLAGS["from"].value
    start = None if start is None else local_path(start, "--from")
    runner.run(study, workdir, only=values.stage, dry_run=values.dry_run, start=start)


if __name__ == "__main__":
    define_flags()
    cli.run(main, kept=KEPT)
