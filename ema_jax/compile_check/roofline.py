"""The cost model: a lower bound on a train step from what a chip can do and a mesh must send.

    seconds = max(compute, memory) + communication

- compute: analytic FLOPs (`unlearning.throughput`), with the forward pass that rematerialisation
  repeats, over the peak of all chips.
- memory: each chip reads the weights that it multiplies with once per pass.
- communication: bytes sent by the collectives of the compiled program, over the bandwidth of all
  links of a chip; nothing is assumed to overlap.
"""

import dataclasses
import math

from jax.sharding import Mesh

from ema_jax.compile_check.programs import Workload
from ema_jax.compile_check.topology import Topology
from ema_jax.unlearning.throughput import flops_per_token


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bound on the time of a train step, by cause, in seconds."""

    compute: float
    memory: float
    communication: float

    @property
    def seconds(self) -> float:
        """Seconds per step."""
        return max(self.compute, self.memory) + self.communication

    @property
    def limit(self) -> str:
        """The largest of the three parts."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])


def train_flops(work: Workload) -> float:
    """FLOPs of a train step, recomputation included."""
    arm, length = work.arm, work.train_tokens
    scored = (length - work.prompt_tokens) / length  # the responses
    per_token = flops_per_token(
        work.model, arm, length, scored=scored, recompute=arm.remat == "full"
    )
    return float(per_token * work.train_rows * length)


def train_bound(work: Workload, topology: Topology, mesh: Mesh, sent_bytes: float) -> Bound:
    """Lower bound on one train step.

    Args:
        work: the shapes.
        topology: the slice.
        mesh: over its devices.
        sent_bytes: by one device per step (`collectives.summary`).
    """
    chip, devices = topology.chip, topology.devices_per_chip
    passes = 2 + (work.arm.remat == "full")
    read = passes * work.model.matrix_weights * work.dtype.itemsize / mesh.shape["tensor"]
    return Bound(
        compute=train_flops(work) / (topology.chips * chip.flops),
        memory=read * devices / chip.hbm_bandwidth,
        communication=sent_bytes * devices / chip.link_bandwidth,
    )


def candidate_meshes(work: Workload, devices: int) -> list[tuple[int, int, int]]:
    """Candidate meshes: tensor sizes that divide all head counts, fsdp over most of the rest."""
    heads = math.gcd(work.model.num_heads, work.model.num_kv_heads)
    shapes = []
    for tensor in _divisors(math.gcd(devices, heads)):
        rest = devices // tensor
        shapes += [(rest // fsdp, fsdp, tensor) for fsdp in _divisors(rest) if fsdp * 4 >= rest]
    return shapes


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
