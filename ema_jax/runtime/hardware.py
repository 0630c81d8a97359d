"""The hardware that JAX would run on, as the system shows it: no device is touched."""

import glob
import importlib.util
import os
import re
from pathlib import Path

# Chips up to v4, and later ones (as any device that is passed through).
_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd")
_NVIDIA = "/proc/driver/nvidia/gpus/*/information"
_CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def at_hand() -> str:
    """What JAX would run on here: `cpu`, `TPU`, or a GPU by its name.

    Read from JAX's and CUDA's variables, the installed packages and the system's files.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "").lower()
    if platforms.startswith("cpu"):
        return "cpu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    installed = any(map(importlib.util.find_spec, _CUDA))
    if installed and not hidden and (gpus := sorted(glob.glob(_NVIDIA))):
        found = re.search(r"^Model:\s*(.+)$", Path(gpus[0]).read_text(errors="replace"), re.M)
        return found[1].strip() if found else "a GPU"
    if importlib.util.find_spec("libtpu") and has_tpu():
        return "TPU"
    return "cpu"


def has_tpu() -> bool:
    """Whether the system shows the device of a TPU, or of one that may be."""
    return any(glob.glob(pattern) for pattern in _TPU_DEVICES)


def has_accelerator() -> bool:
    """Whether the system shows the device of a TPU or of a GPU, or of one that may be."""
    return has_tpu() or any(glob.glob(pattern) for pattern in _GPU_DEVICES)


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
