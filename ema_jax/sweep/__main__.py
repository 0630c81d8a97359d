"""A grid of studies: `python -m ema_jax.sweep --config=configs/tiny_sweep.py --workdir=DIR`.

Start one process per device, on any machines that share the folder: each takes cells that no other
process holds. With `--cell=I` it runs that cell alone (`$SLURM_ARRAY_TASK_ID`).
"""

from collections.abc import Sequence

from absl import flags

from ema_jax.errors import UserError
from ema_jax.runtime import cli
from ema_jax.runtime.paths import local_path
from ema_jax.study.flags import define_config_flag, read_config

KEPT = "the finished cells are kept; the same command resumes from there"


def define_flags() -> None:
    """Declares the command's flags."""
    define_config_flag("The sweep: a Python file with get_config().")
    flags.DEFINE_string("workdir", None, "Folder of the sweep, shared by its workers.")
    flags.DEFINE_integer("cell", None, "Take this cell only, counted from 0.", lower_bound=0)
    flags.DEFINE_float(
        "expiry_seconds", 120, "A silent worker's cell is given to another.", lower_bound=1
    )
    flags.DEFINE_bool("dry_run", False, "Validate everything and list the cells; run nothing.")
    cli.require("config", "workdir")


def main(argv: Sequence[str]) -> None:
    """Runs the cells of the configured grid, or lists them with --dry_run."""
    del argv
    from ema_jax.sweep.worker import StudyGrid

    values = flags.FLAGS
    workdir = local_path(values.workdir, "--workdir")
    grid = StudyGrid(read_config(), workdir, download=not values.dry_run)
    if values.cell is not None and values.cell >= len(grid.cells):
        raise UserError(f"--cell: {values.cell}: there are {len(grid.cells)}, counted from 0")
    if values.dry_run:
        for cell in grid.cells:
            done = "done" if grid.finished(cell.name) else "to do"
            print(f"{cell.number:5}  {done:5}  {cell.name}")
        return
    grid.work(only=values.cell, expiry=values.expiry_seconds)


if __name__ == "__main__":
    define_flags()
    cli.run(main, kept=KEPT)
