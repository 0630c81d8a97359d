"""TPU slices and GPUs by name, and meshes over their devices."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from ema_jax.compile_check.gpus import CARDS, Card
from ema_jax.errors import UserError
from ema_jax.models.sharding import AXES
from ema_jax.runtime.devices import TPUS, Accelerator

_SLICE = re.compile(r"(v\w+):(\d+(?:x\d+){1,2})")
_GPUS = re.compile(r"([a-z]\d+(?:-\w+)?)(?::([1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice or the GPUs of a host: the chips, and the devices that JAX sees in them.

    A v4 chip is two devices where its cores are not joined, each with half of the memory.
    """

    name: str
    chip: Accelerator
    chips: int
    devices: Sequence[jax.Device] = dataclasses.field(repr=False)
    card: Card | None = None  # what the chip is, if it is a GPU

    @property
    def capacity_gib(self) -> float:
        """Memory of a chip."""
        return self.chip.hbm_gib if self.card is None else self.card.memory_gib

    def compiler_options(self, folder: str) -> dict[str, str]:
        """Options of XLA's compiler.

        Without a GPU it cannot try which kernel is faster. Of a TPU's program, which JAX cannot
        always print, it writes the text into a folder.
        """
        return {"xla_dump_to": folder} if self.card is None else {"xla_gpu_autotune_level": "0"}

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
    """Lets compilers describe devices that are not there; for before JAX starts its backend."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no device is held, so several may run
    # Not by the environment, which JAX has read. It also keeps the CUDA plugin, which describes
    # GPUs all the same, from looking for a driver.
    jax.config.update("jax_platforms", "cpu")
    # XLA reports full rematerialisation of a tensor as a warning.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"


def find(name: str) -> Topology:
    """A slice by a name such as `v5e:4x4`, or GPUs by one such as `h100` or `h100:8`.

    Raises:
        UserError: no such chip, a shape that the chip does not come in, or no compiler for it.
    """
    if (match := _SLICE.fullmatch(name)) and match[1] in TPUS:
        chips = math.prod(int(size) for size in match[2].split("x"))
        return Topology(name, TPUS[match[1]], chips, _slice_devices(name))
    if (match := _GPUS.fullmatch(name)) and match[1] in CARDS:
        card, count = CARDS[match[1]], int(match[2] or 1)
        return Topology(name, card.sheet, count, _gpu_devices(card, count), card)
    raise UserError(
        f"--topology: {name!r} is no topology; write CHIP:AxB or CHIP:AxBxC, as in v5e:4x4, with a "
        f"chip of: {', '.join(TPUS)}; or a card or CARD:N, as in h100:8, of: {', '.join(CARDS)}"
    )


def _slice_devices(name: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: libtpu is not installed; pip install libtpu")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except Exception as error:  # libtpu's own, of whatever kind
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--topology: {name}: libtpu does not describe it ({reason})") from None


def _gpu_devices(card: Card, count: int) -> Sequence[jax.Device]:
    """The GPUs of one host, by XLA's compiler for them, which needs none."""
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (13, 12)):
        raise UserError(
            "--topology: XLA's compiler for NVIDIA GPUs is not installed; in a clone, pip install "
            "-e '.[cuda-check]' with Python 3.12 or later (5 GB)"
        )
    from jax.experimental import topologies

    options = {"target_config": card.target_config(), "topology": f"1x1x{count}"}
    try:
        return topologies.get_topology_desc(platform="cuda", **options).devices
    except Exception as error:  # the plugin's own, of whatever kind
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"--topology: jax {jax.__version__} here does not describe a GPU that is not there "
            f"({reason}); jax 0.11.2 with its own CUDA plugin is known to"
        ) from None
