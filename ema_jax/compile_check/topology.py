"""TPU slices by name, and meshes over their devices."""

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
from ema_jax.runtime.devices import TPUS, Accelerator

_NAME = re.compile(r"(v\w+):(\d+(?:x\d+){1,2})")


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice: its chips, and the devices that JAX sees in them.

    A v4 chip is two devices where its cores are not joined, each with half of the memory.
    """

    name: str
    chip: Accelerator
    chips: int
    devices: Sequence[jax.Device] = dataclasses.field(repr=False)

    @property
    def devices_per_chip(self) -> int:
        """One, or two where the cores of a chip are separate devices."""
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
    """Lets libtpu describe topologies without a TPU; for before JAX starts its backend."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no device is held, so several may run
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA reports full rematerialisation of a tensor as a warning.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"


def find(name: str) -> Topology:
    """A slice by a name such as `v5e:4x4`.

    Raises:
        UserError: no such chip, a shape that the chip does not come in, or no libtpu.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in TPUS:
        raise UserError(
            f"--topology: {name!r} is no topology; write CHIP:AxB or CHIP:AxBxC, as in v5e:4x4, "
            f"with a chip of: {', '.join(TPUS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: libtpu is not installed; pip install libtpu")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(name, "tpu")
    except Exception as error:  # libtpu's own, of whatever kind
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--topology: {name}: libtpu does not describe it ({reason})") from None
    chips = math.prod(int(size) for size in match[2].split("x"))
    return Topology(name, TPUS[match[1]], chips, described.devices)
