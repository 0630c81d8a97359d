"""Command: any finished studies on one page and in one table.

python -m ema_jax.compare DIR DIR … --output=FILE.html

Writes the page, its chart in FILE_figures/, and the table of arms as FILE.csv. Where studies asked
the same prompts and have the same judge, the differences from the first one are paired prompt by
prompt.
"""

from collections.abc import Sequence

from absl import flags, logging

from ema_jax.errors import UserError
from ema_jax.runtime import cli
from ema_jax.runtime.paths import local_path


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("output", "comparison.html", "The page to write.")


def main(argv: Sequence[str]) -> None:
    """Compares the studies whose folders the command names."""
    # Imported after the flags are read: a mistyped one should not wait for JAX.
    from ema_jax.report.compare import write_comparison
    from ema_jax.runtime import files
    from ema_jax.study.comparison import compare

    folders = [local_path(word, "compare") for word in argv[1:]]
    output = local_path(flags.FLAGS.output, "--output")
    if output.suffix != ".html":
        raise UserError(f"--output={output}: give the name of a page, as in comparison.html")
    table = output.with_suffix(".csv")
    for path in (output, table):
        files.check_writable(path)
    found = compare(folders)
    write_comparison(output, found, folders)
    files.write_csv(table, found["rows"])
    logging.info("comparison: %s", output)


if __name__ == "__main__":
    define_flags()
    cli.run(main, positional=True)
