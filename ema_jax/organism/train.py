"""Training of the model organisms from scratch: `python -m ema_jax.organism.train --output=DIR`.

A model organism is a small model made to show the effect under study: the embedded models.
"""

from collections.abc import Sequence

from absl import flags, logging

from ema_jax.runtime import cli
from ema_jax.runtime.paths import local_path

FAMILIES = ("qwen2", "mistral")


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_enum("family", "all", ["all", *FAMILIES], "Which embedded model to train.")
    # No default: the folder of the embedded models is part of an installed package.
    flags.DEFINE_string("output", None, "Folder to write; each model gets a folder in it.")
    flags.DEFINE_integer("seed", 0, "Seed of the corpus, the weights and the batches.")
    cli.require("output")


def main(argv: Sequence[str]) -> None:
    """Trains the models that the flags name."""
    del argv
    from ema_jax.organism.training import train

    values = flags.FLAGS
    output = local_path(values.output, "--output")
    for family in FAMILIES if values.family == "all" else [values.family]:
        logging.info("training the %s model", family)
        train(family, output / family, values.seed)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
