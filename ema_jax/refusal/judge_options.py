"""Checks of a judge's options, alike for every judge."""

import contextlib
import math
import string
import types
import typing
from collections.abc import Sequence
from typing import Any

from ema_jax.errors import UserError
from ema_jax.runtime.files import parse_json


def fit_option(judge: str, option: str, value: Any, hint: Any) -> Any:
    """The option's value in the type that the judge's maker declares; texts are parsed if need be.

    Raises:
        UserError: a value of another type. Its text is never shown, in case it is a secret.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, str) and (str not in kinds or (value == "null" and len(kinds) > 1)):
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    if float in kinds and type(value) is int:
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if k is types.NoneType else k.__name__ for k in kinds)
        raise UserError(
            f"judge {judge!r}: option {option!r} is {type(value).__name__}, expected {expected}"
        )
    return value


def check_positive(judge: str, **values: float) -> None:
    """Refuses options that are not above zero."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UserError(f"judge {judge!r}: {name} is {value}, expected more than 0")


def check_template(judge: str, template: str, fields: Sequence[str]) -> None:
    """Refuses a `str.format` template without one of the fields, or with another one."""
    try:
        found = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"judge {judge!r}: template: {error}; write {{{{ for a brace") from None
    used = {name for name, _, _ in found if name is not None}
    plain = all(not spec and not how for name, spec, how in found if name is not None)
    if used != set(fields) or not plain:
        wanted = ", ".join(f"{{{name}}}" for name in fields)
        raise UserError(f"judge {judge!r}: the template needs {wanted} and no other field")
