"""Accelerators by name, with the peak figures of their vendors' data sheets."""

import dataclasses
import os

import jax

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One chip or board, by its vendor's data sheet.

    Sources: cloud.google.com/tpu/docs (TPU), nvidia.com/data-center (GPU).

    Attributes:
        kinds: prefixes of `jax.Device.device_kind`.
        flops: peak dense bfloat16 FLOP/s.
        hbm_gib: memory in GiB.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s that leave it over all of its links (ICI or NVLink).
    """

    kinds: tuple[str, ...]
    flops: float
    hbm_gib: float
    hbm_bandwidth: float
    link_bandwidth: float


TPUS = {
    "v4": Accelerator(("TPU v4",), 275e12, 32, 1.228e12, 300e9),
    "v5e": Accelerator(("TPU v5 lite", "TPU v5e"), 197e12, 16, 0.819e12, 200e9),
    "v5p": Accelerator(("TPU v5",), 459e12, 95, 2.765e12, 600e9),
    "v6e": Accelerator(("TPU v6",), 918e12, 32, 1.640e12, 448e9),
}
GPUS = {
    "a100-80gb": Accelerator(
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"), 312e12, 80, 2.039e12, 300e9
    ),
    "a100-40gb": Accelerator(("NVIDIA A100",), 312e12, 40, 1.555e12, 300e9),
    "h100-pcie": Accelerator(("NVIDIA H100 PCIe",), 756e12, 80, 2.0e12, 300e9),
    "h100": Accelerator(("NVIDIA H100",), 989e12, 80, 3.35e12, 450e9),
    "h200": Accelerator(("NVIDIA H200",), 989e12, 141, 4.8e12, 450e9),
}


def find_accelerator(kind: str) -> Accelerator | None:
    """The first row that names a device kind of JAX; None for a CPU or an unknown accelerator."""
    rows = (*TPUS.values(), *GPUS.values())
    return next((row for row in rows if kind.startswith(row.kinds)), None)


def memory_gib(device: jax.Device) -> float:
    """Memory that a device's programs may take, in GiB; of a CPU all of the machine's."""
    # For a device of another process the own one stands, so that all find the same; a topology
    # without devices has none here.
    own = jax.local_devices()[0]
    if device.device_kind == own.device_kind:
        limit = (own.memory_stats() or {}).get("bytes_limit")
        if limit:
            return limit / GIB
    accelerator = find_accelerator(device.device_kind)
    if accelerator is not None:
        return accelerator.hbm_gib
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def peak_memory_gib() -> float | None:
    """Peak memory in use on the first device so far, in GiB; None if its backend keeps no count."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return None if peak is None else peak / GIB
