"""Converts a checkpoint: `python -m ema_jax.convert --to=flax --source=DIR_OR_HUB_ID --output=DIR`.

`--to=flax` writes an Orbax checkpoint with config.json, the tokenizer's files and a manifest;
`--to=hf` writes a Hugging Face folder. The source is a folder of either format, a GGUF file (or
`pip:PACKAGE` for the one in an installed package), or a Hub id.
Parameters are copied bit for bit, unless `--dtype` names another dtype.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from ema_jax.runtime import cli
from ema_jax.runtime.paths import local_path

_DTYPES = ["float32", "bfloat16", "float16"]


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_enum("to", None, ["flax", "hf"], "The format to write.")
    flags.DEFINE_string(
        "source", None, "A checkpoint folder of either format, a GGUF file, or a hub id."
    )
    flags.DEFINE_string("output", None, "The folder to write.")
    flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.")
    flags.DEFINE_enum("dtype", None, _DTYPES, "Of the parameters; as stored by default.")
    flags.DEFINE_bool("overwrite", False, "Replace a checkpoint that is at --output.")
    cli.require("to", "source", "output")


def convert(
    source: str,
    output: str,
    to: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Converts a checkpoint to another format.

    Args:
        source: a checkpoint folder of either format, a GGUF file, `pip:PACKAGE` or a Hub id.
        output: the folder to write.
        to: `flax` or `hf`.
        revision: branch, tag or commit of a Hub id.
        dtype: of the written parameters; by default that of the stored ones.
        overwrite: replace a checkpoint at `output`.

    Raises:
        UserError: the source is not a readable checkpoint, or the output exists.
    """
    from ema_jax.models import checkpoint, hub
    from ema_jax.models.card import converted_card
    from ema_jax.models.gguf_folder import DEQUANTISED_FROM
    from ema_jax.models.orbax_folder import is_flax_folder

    checkpoint.check_output(output, overwrite)
    found = hub.find(source, revision)
    folder = found.folder
    model = checkpoint.load(folder, dtype=dtype or checkpoint.stored_dtype(folder))
    origin = {"source": source, "revision": found.revision}
    if is_flax_folder(folder):
        origin = checkpoint.origin(folder)
    if to == "flax":
        checkpoint.save_flax(model, output, companions=folder, overwrite=overwrite, origin=origin)
    else:
        original, commit = origin["source"] or str(folder), origin["revision"]
        # The path of a folder is private to its machine: the card names the folder alone.
        name = original if commit else Path(original).resolve().name
        card = converted_card(name, commit, model.config.hf.get(DEQUANTISED_FROM))
        checkpoint.export(model, output, companions=folder, card=card, overwrite=overwrite)
    logging.info("wrote %s", output)


def main(argv: Sequence[str]) -> None:
    """Converts the checkpoint that the flags name."""
    del argv
    import jax

    # The model passes through the host's memory alone: no accelerator is needed.
    jax.config.update("jax_platforms", "cpu")
    given = flags.FLAGS
    convert(
        given.source,
        str(local_path(given.output, "--output")),
        given.to,
        revision=given.revision,
        dtype=given.dtype,
        overwrite=given.overwrite,
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
