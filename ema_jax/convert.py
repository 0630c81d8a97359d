"""Converts a checkpoint: `python -m ema_jax.convert --to=flax --source=DIR_OR_HUB_ID --output=DIR`.

`--to=flax` writes an Orbax checkpoint with config.json, the tokenizer's files and a manifest;
`--to=hf` writes an ordinary Hugging Face folder. Either takes either kind of folder, or a hub id.
Parameters keep their dtype, bit for bit, unless `--dtype` names another one.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from ema_jax.runtime import cli

_DTYPES = ["float32", "bfloat16", "float16"]


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_enum("to", None, ["flax", "hf"], "The format to write.")
    flags.DEFINE_string("source", None, "A checkpoint folder of either format, or a hub id.")
    flags.DEFINE_string("output", None, "The folder to write.")
    flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.")
    flags.DEFINE_enum("dtype", None, _DTYPES, "Of the parameters; as stored by default.")
    flags.DEFINE_bool("overwrite", False, "Replace a checkpoint that is at --output.")
    flags.mark_flags_as_required(["to", "source", "output"])


def convert(
    source: str,
    output: str,
    to: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the checkpoint at `source` to `output` in the format `to` (`flax` or `hf`).

    `dtype` casts the parameters; they keep the one they are stored in by default.

    Raises:
        UserError: the source is no checkpoint that can be read, or the output is there.
    """
    from ema_jax.models import checkpoint
    from ema_jax.models.card import converted_card

    checkpoint.check_output(output, overwrite)
    folder, commit = checkpoint.resolve(source, revision)
    checkpoint.check(folder)
    model = checkpoint.load(folder, dtype=dtype or checkpoint.stored_dtype(folder))
    origin = {"source": source, "revision": commit}
    if checkpoint.is_flax(folder):  # what that one was made from
        origin = checkpoint.origin(folder)
    if to == "flax":
        checkpoint.save_flax(model, output, companions=folder, overwrite=overwrite, origin=origin)
    else:
        made_from, commit = origin["source"] or str(folder), origin["revision"]
        # A folder's path is the machine's business; its name goes into the card.
        card = converted_card(made_from if commit else Path(made_from).resolve().name, commit)
        checkpoint.export(model, output, companions=folder, card=card, overwrite=overwrite)
    logging.info("wrote %s", output)


def main(argv: Sequence[str]) -> None:
    """Reads the flags and converts."""
    del argv
    import jax

    # The host's memory is where the model passes through; an accelerator would only be in the way.
    jax.config.update("jax_platforms", "cpu")
    given = flags.FLAGS
    convert(
        given.source,
        given.output,
        given.to,
        revision=given.revision,
        dtype=given.dtype,
        overwrite=given.overwrite,
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
