"""TPU topologies by name, and what one of their chips has."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from ema_jax.errors import UserError
from ema_jax.models.sharding import AXES

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, by the figures of its public documentation (cloud.google.com/tpu/docs).

    Attributes:
        hbm_gib: memory.
        flops: peak bfloat16 operations a second.
        hbm_bandwidth: bytes a second.
        ici_bandwidth: bytes a second that leave it over all of its links.
    """

    hbm_gib: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float


CHIPS = {
    "v4": Chip(32, 275e12, 1.228e12, 300e9),
    "v5e": Chip(16, 197e12, 0.819e12, 200e9),
    "v5p": Chip(95, 459e12, 2.765e12, 600e9),
    "v6e": Chip(32, 918e12, 1.640e12, 448e9),
}
_NAME = re.compile(r"(v\w+):(\d+(?:x\d+){1,2})")


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its chips, and the devices that JAX sees in them.

    A v4 chip is two devices where its cores are not joined, each with half of the memory.
    """

    name: str
    chip: Chip
    chips: int
    devices: Sequence[jax.Device] = dataclasses.field(repr=False)

    @property
    def devices_per_chip(self) -> int:
        """One, or two where a chip's cores are apart."""
        return len(self.devices) // self.chips

    def mesh(self, shape: Sequence[int]) -> Mesh:
        """A mesh over all devices, neighbours in the torus along its axes; one size may be -1.

        Raises:
            UserError: the sizes do not use every device.
        """
        sizes, count = list(shape), len(self.devices)
        if sizes.count(-1) == 1:
            known = -math.prod(sizes)
            sizes[sizes.index(-1)] = count // known if count % known == 0 else 1
        if math.prod(sizes) != count:
            raise UserError(
                f"mesh {tuple(shape)} (data, fsdp, tensor): {self.name} has {count} devices; set "
                f"--config.mesh to sizes whose product is {count}"
            )
        return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 3, devices=self.devices)


def prepare_environment() -> None:
    """Lets libtpu describe topologies on a machine without a TPU; call it before importing JAX."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no device is held, so several may run
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA says that it rematerialises a tensor whole in a warning.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"


def find(name: str) -> Topology:
    """The topology of a name such as `v5e:4x4`.

    Raises:
        UserError: no such chip, a shape that the chip does not come in, or no libtpu.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in CHIPS:
        raise UserError(
            f"--topology: {name!r} is no topology; write CHIP:AxB or CHIP:AxBxC, as in v5e:4x4, "
            f"with a chip of: {', '.join(CHIPS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: libtpu is not installed; pip install 'ema_jax[tpu]'")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(name, "tpu")
    except Exception as error:  # libtpu's own, of whatever kind
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--topology: {name}: libtpu does not describe it ({reason})") from None
    chips = math.prod(int(size) for size in match[2].split("x"))
    return Topology(name, CHIPS[match[1]], chips, described.devices)
