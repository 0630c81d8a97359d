"""Compilation as a user sees it: quick on a CPU, and named where it takes long."""

import functools
import os
import threading
from pathlib import Path
from typing import Any

from absl import logging

from ema_jax.runtime import hardware

_EVENT = "/jax/core/compile/backend_compile_duration"
_SECONDS = 5.0  # shorter ones are of no interest

_LEVEL = "--xla_backend_optimization_level"

# JAX's own is a second, which leaves out nearly all of a small study's programs.
_WORTH_KEEPING = 0.1  # seconds of compilation

_waiting: dict[tuple[int, str], threading.Timer] = {}


def compile_quickly() -> None:
    """Has LLVM optimise at level 1 on a machine without an accelerator; before JAX starts.

    Programs then take a fifth less to compile and run as fast: nearly all of the work is in matrix
    products, whose code is a library's. A level in `XLA_FLAGS` stands.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _LEVEL not in flags and not hardware.has_accelerator():
        os.environ["XLA_FLAGS"] = f"{flags} {_LEVEL}=1".strip()


def keep_programs(folder: Path | None) -> None:
    """Keeps compiled programs in a folder, for later runs and for other processes.

    None is where JAX's own variable says, which may be a bucket's address. Its variable for the
    least time of compilation stands.
    """
    import jax

    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


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
