"""A study measured again from its reproduce.json: `ema-jax reproduce FILE --workdir=DIR`.

Runs the study that the file describes in a new folder and says what differs: versions, model and
prompts, and the refusal counts of every arm. `--config.FIELD=VALUE` replaces a field, for a model
or prompts that lie elsewhere on this machine.
"""

from collections.abc import Sequence

from absl import flags

from ema_jax.errors import UserError
from ema_jax.runtime import cli
from ema_jax.runtime.paths import local_path

KEPT = "the finished stages are kept; the same command resumes from there"


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("config", None, "The reproduce.json; `ema-jax reproduce FILE` is the same.")
    flags.DEFINE_string("workdir", None, "A new folder for the study.")
    flags.DEFINE_bool("dry_run", False, "Validate everything and print the plan; run nothing.")
    cli.require("workdir")


def main(argv: Sequence[str]) -> None:
    """Measures again, and prints the differences."""
    values = flags.FLAGS
    given = [*argv[1:], *([values.config] if values.config else [])]
    if len(given) != 1:
        raise UserError("reproduce: name one file, as in ema-jax reproduce DIR/reproduce.json")
    path, workdir = local_path(given[0], "reproduce"), local_path(values.workdir, "--workdir")
    if path.resolve().parent == workdir.resolve():
        raise UserError(
            f"--workdir={workdir}: the folder of {path.name}, whose study would be compared with "
            "itself; name a new one"
        )
    from ema_jax import config
    from ema_jax.runtime import compilation, distributed
    from ema_jax.study import overrides, reproduction, runner
    from ema_jax.study.workdir import Workdir

    before = reproduction.read(path)
    fields = reproduction.config_of(before)
    for field, text in cli.fields_of("config"):
        overrides.replace_field(fields, field, text)
    study = config.read(fields)
    if not values.dry_run:
        compilation.compile_quickly()
        distributed.initialise(study.heartbeat_seconds)
        cli.keep_compiled_programs()
    runner.run(study, workdir, dry_run=values.dry_run)
    if values.dry_run:
        return
    found = list(reproduction.differences(before, reproduction.describe(study, Workdir(workdir))))
    counts = [line for line in found if " refused then" in line or "not measured" in line]
    print("\n".join(found))
    print(
        f"{path}: {len(counts)} refusal counts differ"
        if counts
        else f"{path}: every refusal count is the same"
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main, kept=KEPT, positional=True)
