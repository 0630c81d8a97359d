"""`XLA_FLAGS`, tried in a process of its own: XLA ends the one that has a flag it cannot read."""

import os
import re
import subprocess
import sys

from ema_jax.errors import UserError

# Those that this project sets itself (`launch/local.py`, its tests) need no trial.
_KNOWN = re.compile(
    r"--xla_force_host_platform_device_count=[1-9]\d{0,3}|--xla_backend_optimization_level=[0-3]"
)
_COMPLAINT = re.compile(r"^[EF]\d{4} .*?\] (.+)$", re.MULTILINE)  # a line of XLA's own log
_SECONDS = 120


def check() -> None:
    """Refuses `XLA_FLAGS` with which JAX would end this process, past every `except`.

    Takes seconds where flags are set that this project does not know. The trial is on the CPU: no
    other device is touched, and the flags of all devices are read there.

    Raises:
        UserError: JAX does not start with them.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if all(map(_KNOWN.fullmatch, flags.split())):
        return
    log = _tried(flags)
    if log is not None and _tried("") is None:  # else it is not the flags that JAX fails at
        raise UserError(
            f"XLA_FLAGS={flags!r:.200}: {complaint(log)}; correct the variable, or unset it"
        )


def _tried(flags: str) -> str | None:
    """What a process writes that ends as JAX starts with these flags; None where JAX starts."""
    own = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    try:
        done = subprocess.run(
            command,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None  # a machine that busy says nothing of the flags
    return done.stderr if done.returncode else None


def complaint(log: str) -> str:
    """What XLA, or else Python, says in a log of why it ended."""
    found = _COMPLAINT.search(log)
    lines = log.strip().splitlines()
    said = found[1] if found else lines[-1] if lines else "JAX does not start with it"
    return said.partition(" (you may need to")[0].strip().rstrip(".")[:300]
