"""The flag `--config` of every command that takes a study.

Apart from `ema_jax.config`, which imports JAX: a mistyped flag should not wait for it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from ema_jax.errors import UserError

if TYPE_CHECKING:
    from ema_jax.config import StudyConfig


def define_config_flag(meaning: str) -> None:
    """Declares `--config=FILE`, and with it `--config.FIELD=VALUE` for every field."""
    config_flags.DEFINE_config_file("config", None, meaning)


def read_config() -> "StudyConfig":
    """The study that `--config` describes.

    Raises:
        UserError: no such file, or what `config.read` finds wrong.
    """
    from ema_jax.config import read

    # What follows a colon is handed to get_config: --config=configs/tiny_advisor.py:mistral.
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    if not Path(path).is_file():
        raise UserError(f"--config: {path}: no such file; see configs/ for the ones there are")
    return read(flags.FLAGS.config)
