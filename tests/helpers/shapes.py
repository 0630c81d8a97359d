"""Array shapes and dtypes of annotations, checked at run time so that they cannot rot."""

from collections.abc import Callable
from typing import Any, get_args, get_origin

import jax
import jaxtyping
import numpy as np
from beartype import beartype


def checked(function: Callable) -> Callable:
    """A function that checks shapes and dtypes of its annotations' arrays, and nothing else.

    Stand-ins for a tokenizer or a judge are welcome in a test, and so is NumPy in JAX's place; an
    array of another shape is not.
    """
    hints = getattr(function, "__annotations__", {})
    shaped = {name: _of_any_library(hint) for name, hint in hints.items() if _has_shape(hint)}
    if not shaped:
        return function
    function.__annotations__ = dict.fromkeys(hints, object) | shaped
    return beartype(function)


def _is_shape(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _has_shape(hint: Any) -> bool:
    return _is_shape(hint) or any(_has_shape(part) for part in get_args(hint))


def _of_any_library(hint: Any) -> Any:
    if _is_shape(hint):
        kind = getattr(jaxtyping, hint.__name__.partition("[")[0])
        return kind[jax.Array | np.ndarray, hint.dim_str]
    if get_origin(hint) is tuple:
        return tuple[tuple(map(_of_any_library, get_args(hint)))]
    return hint
