"""Compilation as a user sees it: what takes long is named while it is compiled."""

import functools
import threading
from typing import Any

from absl import logging

_EVENT = "/jax/core/compile/backend_compile_duration"
_SECONDS = 5.0  # shorter ones are of no interest

_waiting: dict[tuple[int, str], threading.Timer] = {}


@functools.cache  # listeners stay
def watch_compilation() -> None:
    """Logs the names of programs that take long to compile, and then how long they took."""
    import jax

    jax.monitoring.register_scalar_listener(_started)
    jax.monitoring.register_event_duration_secs_listener(_ended)


def _started(event: str, value: float, **about: Any) -> None:
    if event == _EVENT:
        name = str(about.get("fun_name", "a program"))
        timer = threading.Timer(_SECONDS, logging.info, ("  compiling %s …", name))
        timer.daemon = True
        timer.start()
        _waiting[threading.get_ident(), name] = timer


def _ended(event: str, duration_secs: float, **about: Any) -> None:
    if event == _EVENT:
        name = str(about.get("fun_name", "a program"))
        timer = _waiting.pop((threading.get_ident(), name), None)
        if timer is not None:
            timer.cancel()
        if duration_secs >= _SECONDS:
            logging.info("  compiled %s in %.0f s", name, duration_secs)
