"""Array shapes and dtypes of annotations, checked at run time so that they cannot rot."""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable) -> Callable:
    """A function that checks what its annotations say of arrays, and nothing else.

    Stand-ins for a tokenizer or a judge are welcome in a test; an array of another shape is not.
    """
    hints = getattr(function, "__annotations__", {})
    shaped = {name: hint if _has_shape(hint) else object for name, hint in hints.items()}
    if all(hint is object for hint in shaped.values()):
        return function
    function.__annotations__ = shaped
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in get_args(hint))
