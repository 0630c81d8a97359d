"""Does a study fit a TPU slice or a GPU? `python -m ema_jax.compile_check --topology=v5e:4x4`."""

import json
from collections.abc import Sequence

from absl import flags

from ema_jax.errors import UserError
from ema_jax.runtime import cli
from ema_jax.study.flags import define_config_flag, read_config


def define_flags() -> None:
    """Declares the command's flags."""
    define_config_flag("The study: a Python file with get_config().")
    flags.DEFINE_string("topology", None, "Devices: v5e:4x4, v5p:4x4x4, h100, h100:8.")
    flags.DEFINE_integer("prompt_tokens", 128, "Length of a rendered prompt.", lower_bound=1)
    flags.DEFINE_enum(
        "lengths",
        "full",
        ["full", "drawn"],
        "Training examples that fill their rows, or of drawn lengths, packed.",
    )
    flags.DEFINE_bool("sweep", False, "Try meshes and batch sizes; print a table, best first.")
    flags.DEFINE_list("programs", ["train", "capture", "decode"], "What to compile, or: all.")
    cli.require("config", "topology")


def main(argv: Sequence[str]) -> None:
    """Compiles the configured study; prints JSON, or with --sweep a table of meshes."""
    del argv
    from ema_jax.compile_check import topology

    topology.prepare_environment()
    from ema_jax.compile_check import check
    from ema_jax.compile_check.programs import PROGRAMS

    values = flags.FLAGS
    names = tuple(PROGRAMS) if values.programs == ["all"] else tuple(values.programs)
    unknown = [name for name in names if name not in PROGRAMS]
    if unknown or not names:
        raise UserError(f"--programs: {unknown or 'none'}; choose of {', '.join(PROGRAMS)}, or all")
    study, where = read_config(), topology.find(values.topology)
    if values.sweep:
        rows = check.compare_meshes(study, where, values.prompt_tokens, values.lengths)
        print(check.mesh_table(rows))
    else:
        found = check.check(study, where, values.prompt_tokens, names, values.lengths)
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
