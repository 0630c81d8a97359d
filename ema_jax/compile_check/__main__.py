"""Does a study fit a TPU slice? `python -m ema_jax.compile_check --config=… --topology=v5e:4x4`."""

import json
from collections.abc import Sequence

from absl import flags

from ema_jax.errors import UserError
from ema_jax.runtime import cli
from ema_jax.study.flags import define_config_flag, read_config


def define_flags() -> None:
    """Declares the command's flags."""
    define_config_flag("The study: a Python file with get_config().")
    flags.DEFINE_string("topology", None, "The slice, as in v5e:4x4 or v5p:4x4x4.")
    flags.DEFINE_integer("prompt_tokens", 128, "Length of a rendered prompt.", lower_bound=1)
    flags.DEFINE_bool("sweep", False, "Try meshes and batch sizes; print a table, best first.")
    flags.DEFINE_list("programs", ["train", "capture", "decode"], "What to compile.")
    cli.require("config", "topology")


def main(argv: Sequence[str]) -> None:
    """Compiles the configured study; prints JSON, or with --sweep a table of meshes."""
    del argv
    from ema_jax.compile_check import topology

    topology.prepare_environment()
    from ema_jax.compile_check import check

    values = flags.FLAGS
    unknown = [name for name in values.programs if name not in ("train", "capture", "decode")]
    if unknown or not values.programs:
        raise UserError(f"--programs: {unknown or 'none'}; choose of train, capture, decode")
    study, where = read_config(), topology.find(values.topology)
    if values.sweep:
        print(check.mesh_table(check.compare_meshes(study, where, values.prompt_tokens)))
    else:
        found = check.check(study, where, values.prompt_tokens, tuple(values.programs))
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
