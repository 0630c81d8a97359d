"""Sharing a study: `python -m ema_jax.share --workdir=DIR --to=table --output=FILE.csv`."""

from collections.abc import Sequence

from absl import flags

from ema_jax.errors import UserError
from ema_jax.runtime import cli, files
from ema_jax.runtime.paths import local_path


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_enum(
        "to", None, ["table", "inspect", "hub"], "A table, a log for Inspect, or the Hub."
    )
    flags.DEFINE_string("workdir", None, "The study's folder.")
    flags.DEFINE_string("output", None, "File to write: .csv, .parquet, or .eval for Inspect.")
    flags.DEFINE_string("run", "base", "Responses for Inspect: base, or ARM.seed_K.")
    flags.DEFINE_string("arm", None, "The arm whose adapters go to the Hub.")
    flags.DEFINE_integer("seed", 0, "Its seed.")
    flags.DEFINE_string("repository", None, "USER/NAME on the Hub; made private.")
    flags.mark_flags_as_required(["to", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Writes or uploads what the flags name, and prints where it is."""
    del argv
    # Imported after the flags are read: a mistyped one should not wait for them.
    from ema_jax.share import hub, inspect_log, tables
    from ema_jax.study.finished import read_results

    values = flags.FLAGS
    workdir = local_path(values.workdir, "--workdir")
    results = read_results(workdir)
    if values.to == "hub":
        arm, repository = _given("arm"), _given("repository")
        print(hub.push(workdir, arm, values.seed, repository))
        return
    output = local_path(_given("output"), "--output")
    files.check_writable(output)
    if values.to == "inspect":
        count = inspect_log.write(workdir, values.run, output)
        print(f"{output}: {count} responses of {values.run}")
    else:
        tables.write(results, output)
        print(output)


def _given(flag: str) -> str:
    value = getattr(flags.FLAGS, flag)
    if not value:
        raise UserError(f"--{flag} is missing; --to={flags.FLAGS.to} needs it")
    return value


if __name__ == "__main__":
    define_flags()
    cli.run(main)
