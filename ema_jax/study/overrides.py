"""Fields of a study that the command line replaces: `--config.FIELD=VALUE`, read by their types."""

import ast
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

from ema_jax.config import StudyConfig
from ema_jax.errors import UserError, closest, did_you_mean
from ema_jax.unlearning.config import UnlearnConfig

_TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def replace_field(values: dict[str, Any], field: str, text: str | None) -> None:
    """Sets one field, nested by dots, to what a text means by the field's annotation.

    Args:
        values: the config as nested dicts; changed.
        field: as in `unlearn.beta`, or `arms.npo.beta` for one arm alone.
        text: the value; None for a bare `--config.FIELD`, which sets a bool.

    Raises:
        UserError: no such field or arm, or a text that cannot be of its type.
    """
    *above, last = field.split(".")
    hint: Any = StudyConfig
    inside, path = values, ""
    for name in above:
        hint = _inner(hint, name, path, inside, field)
        path = f"{path}.{name}" if path else name
        if not (is_dataclass(hint) or _is_mapping(hint) or hint is Any):
            raise UserError(f"--config.{field}: {path} has no fields; write --config.{path}=VALUE")
        found = inside.get(name)
        inside[name] = dict(found) if isinstance(found, Mapping) else _defaults(name, path)
        inside = inside[name]
    hint = _inner(hint, last, path, inside, field, last=True)
    if is_dataclass(hint):
        names = [f.name for f in fields(hint)]
        raise UserError(
            f"--config.{field}: a set of fields; write --config.{field}.FIELD=VALUE with one of "
            f"{', '.join(names)}"
        )
    value = _parsed(text, hint, field)
    merged = isinstance(value, Mapping) and field not in ("arms", "cells", "grid")
    before = inside.get(last)
    inside[last] = {**before, **value} if merged and isinstance(before, Mapping) else value


def _defaults(name: str, path: str) -> dict[str, Any]:
    """What a mapping holds that the config file leaves out."""
    for field in fields(StudyConfig):
        if field.name == name == path and field.default_factory is not MISSING:
            return dict(field.default_factory())
    return {}


def _inner(
    hint: Any, name: str, path: str, inside: Mapping[str, Any], field: str, *, last: bool = False
) -> Any:
    """The annotation of a field of a dataclass, or of an entry of a mapping."""
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        if name in hints:
            return hints[name]
        close, prefix = closest(name, hints), f"{path}." if path else ""
        # The very name, but nested elsewhere, is a better guess than another name here.
        elsewhere = [known for known in _paths(StudyConfig) if known.split(".")[-1] == name]
        meant = [*elsewhere, *([prefix + close] if close else [])]
        fix = f"did you mean --config.{meant[0]}?" if meant else f"there are: {', '.join(hints)}"
        raise UserError(f"--config.{field}: no field {name!r}; {fix}")
    if path in ("arms", "cells"):  # a mistyped name would be another one, with nothing said
        known = inside or _defaults(path, path)
        if name not in known and not last:
            fix = did_you_mean(name, known) or f"; there are: {', '.join(known) or 'none'}"
            raise UserError(f"--config.{field}: no {path[:-1]} {name!r}{fix}")
        if not last:
            return UnlearnConfig if path == "arms" else StudyConfig
    if _is_mapping(hint):
        return typing.get_args(hint)[1]
    return Any


def _paths(kind: Any, prefix: str = "") -> Iterable[str]:
    """All fields of a config, those of nested ones after a dot."""
    for name, hint in typing.get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from _paths(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) in (Mapping, dict)


def _parsed(text: str | None, hint: Any, field: str) -> Any:
    """A value of a field's type; a text that is none stays as it is: `config.read` refuses it."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if hint is bool:
        return True if text is None else _TRUTH.get(text.strip().lower(), text)
    if text is None:
        raise UserError(f"--config.{field}: no value; write --config.{field}=VALUE")
    kind = typing.get_origin(hint) or hint
    if kind in (types.UnionType, typing.Union):
        inner = [arm for arm in typing.get_args(hint) if arm is not types.NoneType]
        return None if text.strip().lower() in ("none", "null") else _parsed(text, inner[0], field)
    if kind is str or kind is Literal:
        return text
    if not text.strip():
        raise UserError(f"--config.{field}: empty; write --config.{field}=VALUE")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    if kind is tuple:
        return _sequence(text, typing.get_args(hint)[0], field)
    value = _literal(text)
    if _is_mapping(hint) and not isinstance(value, Mapping):
        raise UserError(
            f"--config.{field}: {text!r:.80} is not a set of fields; write "
            f"--config.{field}.NAME=VALUE, or {{'NAME': VALUE, …}}"
        )
    return value


def _sequence(text: str, hint: Any, field: str) -> tuple[Any, ...]:
    value = _literal(text)
    if isinstance(value, str):  # names without quotes: a,b,c or (a, b, c)
        inner = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]")
        parts: Sequence[str] = [part.strip().strip("'\"") for part in inner.split(",")]
        return tuple(_parsed(part, hint, field) for part in parts if part)
    return tuple(value) if isinstance(value, tuple | list | set) else (value,)


def _literal(text: str) -> Any:
    """What Python reads the text as, or the text."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
