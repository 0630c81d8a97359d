"""The flag `--config` of every command that takes a study, and `--config.FIELD=VALUE`.

Apart from `config_file`, which imports JAX: a mistyped flag should not wait for it.
"""

from typing import TYPE_CHECKING

from absl import flags

from ema_jax.runtime import cli
from ema_jax.study import field_help

if TYPE_CHECKING:
    from ema_jax.config import StudyConfig


def define_config_flag(meaning: str) -> None:
    """Declares `--config=FILE`, and with it `--config.FIELD=VALUE` for every field."""
    flags.DEFINE_string(
        "config", None, f"{meaning} A path, or a shipped one by its name, as in --config=tiny."
    )
    cli.explain(field_help.text)


def read_config() -> "StudyConfig":
    """The study that `--config` describes, with the fields that other flags replace.

    Raises:
        UserError: no such file, one that is not a config, or what `config.read` finds wrong.
    """
    from ema_jax.study import config_file

    return config_file.load(flags.FLAGS.config, cli.fields_of("config"))
