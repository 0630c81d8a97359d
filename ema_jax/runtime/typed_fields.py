"""Dataclasses built from what a user wrote, checked by their fields' annotations."""

import dataclasses
import functools
import re
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from ema_jax.errors import UserError, did_you_mean


def build(kind: Any, values: Mapping[str, Any], path: str) -> Any:
    """A dataclass from nested mappings, each value checked against its field's annotation.

    Args:
        kind: the dataclass; its annotations say types, ranges and choices, pydantic's included.
        values: field → value, those of nested dataclasses as mappings.
        path: of the dataclass in the whole, for messages.

    Raises:
        UserError: a field that does not exist, or a value of another type or out of range.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    built = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        if name not in hints:
            fix = did_you_mean(str(name), hints) or f"; there are: {', '.join(hints)}"
            raise UserError(f"config: unknown field {where!r}{fix}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            built[name] = build(hint, value, where)
            continue
        try:
            built[name] = _adapter(hint).validate_python(
                tuple(value) if isinstance(value, list) else value
            )
        except pydantic.ValidationError as error:
            raise UserError(f"config: {_message(where, error.errors()[0])}") from None
    return kind(**built)


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter:
    strict = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
    return pydantic.TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else strict)


_TYPES = {"string": "str", "dict": "set of fields"}
_BOUNDS = {
    "greater_than": "not above {gt}",
    "greater_than_equal": "below {ge}",
    "less_than": "not below {lt}",
    "less_than_equal": "above {le}",
    "finite_number": "not a finite number",
}


def _message(where: str, error: Any) -> str:
    """The line for one of pydantic's errors: field, value, and what it should be."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    where = ".".join([where, *(key for key in error["loc"] if isinstance(key, str))])
    if kind.endswith("_type"):
        name = kind.removesuffix("_type")
        wanted = context.get("class_name") or _TYPES.get(name, name)
        return f"{where} = {value!r} is not a {wanted}"
    where = re.sub(r"^(arms\.\w+)\.", r"\1: ", where)
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ")
        meant = did_you_mean(str(value), choices.split(", "))
        return f"{where} {value!r} is none of {choices}{meant}"
    limits = {name: f"{limit:.12g}" for name, limit in context.items()}
    bound = re.sub(r"\b0$", "zero", _BOUNDS[kind].format(**limits))
    return f"{where} = {value} is {bound}"
