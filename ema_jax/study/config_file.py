"""A study's config file: found, run, and with the fields that the command line replaces."""

import inspect
import runpy
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ema_jax import config as config_lib
from ema_jax.config import StudyConfig
from ema_jax.errors import UserError, closest
from ema_jax.runtime.paths import local_path
from ema_jax.study.overrides import replace_field


def load(given: str, overrides: Iterable[tuple[str, str | None]] = ()) -> StudyConfig:
    """The checked study of a config file.

    Args:
        given: a path, or the name of a shipped config; what follows a colon is handed to
            `get_config`, as in `configs/tiny_advisor.py:mistral`.
        overrides: fields and the texts that replace them (None for a bare `--config.FIELD`).

    Raises:
        UserError: no such file, a file that is not a config (with its line), an unknown field, or
            what `config.read` finds wrong.
    """
    path, word = locate(given)
    values = _values(path, word)
    for field, text in overrides:
        replace_field(values, field, text)
    return config_lib.read(values)


def locate(given: str) -> tuple[Path, str | None]:
    """Path of a config file, and the word after the colon.

    Raises:
        UserError: there is no such file; the line names the one that was probably meant.
    """
    whole = local_path(given, "--config")
    if whole.is_file():
        return whole, None
    name, colon, after = given.rpartition(":") if ":" in given else (given, "", "")
    word = after if colon else None
    path = local_path(name, "--config")
    known = config_lib.shipped_paths()
    if path.is_file():
        return path, word
    if name in known:
        return known[name], word
    if path.is_dir():
        raise UserError(f"--config: {name}: a folder; name a file in it{_meant(path, known)}")
    if path.exists():
        raise UserError(f"--config: {name}: not an ordinary file; name a Python file")
    raise UserError(f"--config: {name}: no such file{_meant(path, known)}")


def _meant(path: Path, known: Mapping[str, Path]) -> str:
    if path.parent.is_dir() and not path.is_dir():
        beside = {other.name for other in path.parent.glob("*.py")}
        close = closest(path.name, sorted(beside))
        if close is not None:
            return f"; did you mean {path.parent / close}?"
    close = closest(path.stem, known)
    if close is not None:
        return f"; did you mean --config={close}, which comes with the package?"
    return f"; the shipped ones are {', '.join(known)}, as in --config=tiny"


def _values(path: Path, word: str | None) -> dict[str, Any]:
    """What the file's `get_config` returns, as nested dicts."""
    namespace = _guarded(path, lambda: runpy.run_path(str(path)))
    get_config = namespace.get("get_config")
    if not callable(get_config):
        raise UserError(
            f"{path}: no function get_config(); a config file defines one that returns the study "
            "(ema-jax init DIR writes an example)"
        )
    where = _line_of(get_config, path)
    given = () if word is None else (word,)
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError as error:
        fix = "leave out what follows the colon" if given else "give it after a colon, FILE.py:WORD"
        raise UserError(f"{where}: get_config(): {error}; {fix}") from None
    except ValueError:  # a callable without a signature
        pass
    config = _guarded(path, lambda: get_config(*given))
    if not isinstance(config, Mapping | ConfigDict):
        if inspect.iscoroutine(config):
            config.close()
        raise UserError(
            f"{where}: get_config() returned {type(config).__name__}, not a config; start from "
            "ema_jax.config.default() and return it"
        )
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    strange = [key for key in plain if not isinstance(key, str)]
    if strange:
        raise UserError(f"{where}: get_config() returned a field {strange[0]!r}, which is no name")
    return plain


def _guarded(path: Path, run: Callable[[], Any]) -> Any:
    """What a config file's code returns; whatever it raises is said with its line."""
    try:
        return run()
    except (UserError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        raise UserError(
            f"{_place(path, error)}: calls exit({error.code!r}); a config file only defines "
            "get_config()"
        ) from None
    except SyntaxError as error:
        place = f"{error.filename or path}:{error.lineno or 1}"
        raise UserError(f"{place}: {type(error).__name__}: {error.msg}") from None
    except BaseException as error:
        message = " ".join(str(error).split())[:300] or "no message"
        raise UserError(f"{_place(path, error)}: {type(error).__name__}: {message}") from None


def _place(path: Path, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _line_of(function: Any, path: Path) -> str:
    code = getattr(function, "__code__", None)
    return f"{path}:{code.co_firstlineno}" if code and code.co_filename == str(path) else str(path)
