"""A config to edit: `python -m ema_jax.init --output=DIR`, or `ema-jax init DIR`.

Writes DIR/study.py: the study of a shipped config (`--from=tiny`, the default, runs on a laptop),
with the lines that name your own model and prompts.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from ema_jax.errors import UserError, did_you_mean
from ema_jax.runtime import cli, files
from ema_jax.runtime.paths import local_path

_TEXT = '''"""My study.

ema-jax dry-run --config={path} --workdir={folder}/run   # validates everything, prints the plan
ema-jax run --config={path} --workdir={folder}/run

`ema-jax run --help` lists every field.
"""

from ema_jax import config as ema


def get_config():
    config = ema.shipped("{base}")  # change below what differs

    # The model: a checkpoint folder, a GGUF file, pip:PACKAGE or a Hub id.
    # config.model.source = "Qwen/Qwen2.5-7B-Instruct"

    # The domain whose refusals are unlearned, and all domains that are measured.
    # config.target = "cybersecurity"
    # config.domains = ("cybersecurity", "privacy", "bias")

    # Your own prompts: JSONL rows {{"domain": …, "prompt": …}}, some of them of domain "benign".
    # config.prompts.source = "file"
    # config.prompts.path = "~/prompts.jsonl"
    # config.prompts.lookalike_source = None
    # config.prompts.counts = {{"harvest": 64, "retain": 16, "dev": 16, "eval": 50, "concept": 32}}

    # config.seeds = (0, 1, 2)
    return config
'''


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("output", None, "The folder to write to; `ema-jax init DIR` is the same.")
    flags.DEFINE_string("from", "tiny", "The shipped config to start from.")


def main(argv: Sequence[str]) -> None:
    """Writes the config."""
    given = [*argv[1:], *([flags.FLAGS.output] if flags.FLAGS.output else [])]
    if len(given) != 1:
        raise UserError("init: name one folder, as in ema-jax init DIR")
    path = write(local_path(given[0], "init"), str(flags.FLAGS["from"].value))
    print(f"{path}: edit it, then ema-jax dry-run --config={path} --workdir={path.parent / 'run'}")


def write(folder: Path, base: str) -> Path:
    """Writes a config file that starts from a shipped one; returns its path.

    Raises:
        UserError: no such shipped config, or a file that is there already.
    """
    from ema_jax.config import shipped_paths

    names = shipped_paths()
    if base not in names:
        raise UserError(
            f"--from: {base!r} is none of {', '.join(names)}{did_you_mean(base, names)}"
        )
    path = folder / "study.py"
    if path.exists():
        raise UserError(f"{path}: exists already; edit it, or name another folder")
    files.write_text(path, _TEXT.format(path=path, folder=folder, base=base))
    return path


if __name__ == "__main__":
    define_flags()
    cli.run(main, positional=True)
