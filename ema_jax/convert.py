"""Converts a checkpoint: `python -m ema_jax.convert --to=flax --source=DIR_OR_HUB_ID --output=DIR`.

`--to=flax` writes an Orbax checkpoint with config.json, the tokenizer's files and a manifest;
`--to=hf` writes an ordinary Hugging Face folder. Either takes either kind of folder, or a hub id.
Parameters keep their dtype, bit for bit.
"""

from collections.abc import Sequence

from absl import flags, logging

from ema_jax import cli

_TO = flags.DEFINE_enum("to", None, ["flax", "hf"], "The format to write.", required=True)
_SOURCE = flags.DEFINE_string(
    "source", None, "A checkpoint folder of either format, or a hub id.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write.", required=True)
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a checkpoint that is at --output.")


def convert(
    source: str,
    output: str,
    to: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the checkpoint at `source` to `output` in the format `to` (`flax` or `hf`).

    Raises:
        UserError: the source is no checkpoint that can be read, or the output is there.
    """
    from ema_jax.models import checkpoint

    checkpoint.check_output(output, overwrite)
    folder, commit = checkpoint.resolve(source, revision)
    checkpoint.check(folder)
    model = checkpoint.load(folder, dtype=checkpoint.stored_dtype(folder))
    if to == "flax":
        origin = {"source": source, "revision": commit}
        checkpoint.save_flax(model, output, companions=folder, overwrite=overwrite, origin=origin)
    else:
        checkpoint.export(model, output, companions=folder, overwrite=overwrite)
    logging.info("wrote %s", output)


def main(_: Sequence[str]) -> None:
    """Reads the flags and converts."""
    import jax

    # The host's memory is where the model passes through; an accelerator would only be in the way.
    jax.config.update("jax_platforms", "cpu")
    convert(
        _SOURCE.value,
        _OUTPUT.value,
        _TO.value,
        revision=_REVISION.value,
        overwrite=_OVERWRITE.value,
    )


if __name__ == "__main__":
    cli.run(main)
