"""Several processes as one program: their number, the one that writes, and their barriers.

Every process runs the same stages on the same prompts in the same order; arrays are split over all
devices, so the work on them is, too. Batches are placed by `models.sharding.place_batch` and read
back by `host_array`. Files are written by the first process alone (`files.atomic_path`) and
read by all, so the folder has to be on a shared file system.

The environment names the processes:

- `EMA_JAX_COORDINATOR=HOST:PORT`, `EMA_JAX_NUM_PROCESSES` and `EMA_JAX_PROCESS_ID`
  (launch/local.py, launch/k8s/);
- `EMA_JAX_COORDINATOR=auto`: JAX asks the cluster (a TPU slice; launch/tpu_vm.py);
- a SLURM step of more than one task, by itself (launch/slurm.sbatch).
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from ema_jax.errors import RunStoppedError, UserError
from ema_jax.runtime import signals

BARRIER_SECONDS = 1800
_CONNECT_SECONDS = 300
_SLURM = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")


class _Processes:
    """State shared by the functions below: this process alone until `initialise`."""

    index = 0
    count = 1
    barriers = 0
    alone = False
    noted = signals.Noted()  # whether this one was asked to stop


def initialise(heartbeat_seconds: int, environment: Mapping[str, str] | None = None) -> None:
    """Joins the other processes, if the environment names any; before any device is used.

    Args:
        heartbeat_seconds: a process that is silent for as long is lost, and ends the others.
        environment: in place of `os.environ`.

    Raises:
        UserError: the environment is incomplete, or the others cannot be reached.
    """
    arguments = _arguments(os.environ if environment is None else environment)
    if arguments is None:
        return
    import jax

    # JAX's own service agrees on a count of calls. Orbax asks it too, with step numbers: between
    # the two counts a request is answered hundreds of steps late, or never. See stop_requested.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=max(heartbeat_seconds, 30),
        )
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"distributed: the other processes cannot be reached ({reason}); see that all of them "
            "run, with one EMA_JAX_COORDINATOR that they can connect to"
        ) from None
    signals.install(_Processes.noted)
    _Processes.index, _Processes.count = jax.process_index(), jax.process_count()
    if _Processes.index:
        logging.set_verbosity(logging.WARNING)  # one voice is enough
    logging.info("%d processes, %d devices", _Processes.count, jax.device_count())


def _arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None where there is one process."""
    address = environment.get("EMA_JAX_COORDINATOR")
    if address == "auto":
        return {}
    if address is None:
        if _number(environment, "SLURM_STEP_NUM_TASKS", "1") < 2:
            return None
        for name in _SLURM:  # which JAX reads
            _number(environment, name, "0")
        # JAX takes the GPU of the task's number, which a task that is shown one alone has not.
        shown = environment.get("CUDA_VISIBLE_DEVICES", "")
        return {"local_device_ids": [0]} if shown and "," not in shown else {}
    if re.fullmatch(r"[\w.:\[\]-]+:\d+", address) is None:
        raise UserError(f"EMA_JAX_COORDINATOR: {address!r} is neither HOST:PORT nor auto")
    if not 0 < int(address.rpartition(":")[2]) < 1 << 16:
        raise UserError(f"EMA_JAX_COORDINATOR: {address!r} has no port below 65536")
    count = _number(environment, "EMA_JAX_NUM_PROCESSES")
    index = _number(environment, "EMA_JAX_PROCESS_ID")
    if not index < count:
        raise UserError(f"EMA_JAX_PROCESS_ID: {index} is not below EMA_JAX_NUM_PROCESSES ({count})")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", text, re.ASCII) is None:
        ours = name.startswith("EMA_JAX")
        fix = "it goes with EMA_JAX_COORDINATOR" if ours else "correct it or unset it"
        raise UserError(f"{name}: {text!r:.80} is no number; {fix}")
    return int(text)


def several() -> bool:
    """Whether there is more than this process."""
    return _Processes.count > 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return _Processes.index == 0


def barrier(what: str, seconds: float = BARRIER_SECONDS) -> None:
    """Waits until every process has reached this call.

    Raises:
        RunStoppedError: some do not arrive in time; the message names them.
    """
    if not several() or _Processes.alone:
        return
    from orbax.checkpoint import multihost

    _Processes.barriers += 1
    try:
        multihost.get_barrier_sync_fn()(
            key=f"ema_jax.{_Processes.barriers}", timeout_ms=int(1000 * seconds)
        )
    except Exception as error:  # the coordination service's own, of whatever kind
        # It ends in a line "Some timed out task names:" with one number a line.
        named = str(error).partition("timed out task names:")[2].partition("\n\n")[0]
        missing = sorted({int(i) for i in re.findall(r"^(?:.*task:)?(\d+)$", named, re.MULTILINE)})
        who = ", ".join(map(str, missing)) if missing else "some"
        raise RunStoppedError(
            f"{what}: process {who} of {_Processes.count} did not come within {seconds:g} s; the "
            "finished stages are kept: start all of them again"
        ) from None


def stop_requested() -> bool:
    """Whether one of several processes was sent a signal; true in all of them at the same call.

    Every process has to call it equally often: at each train step and before each stage. A single
    process is ended by SIGTERM and Ctrl-C at once, or notes them itself (`signals.noting`).
    """
    if not several() or _Processes.alone:
        return False
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(_Processes.noted.asked()))))


def first_only(function: Callable[[], None], what: str) -> None:
    """Runs a function that only writes files in the first process, while the others wait."""
    if is_first():
        _Processes.alone = True
        try:
            function()
        finally:
            _Processes.alone = False
    barrier(what)
