"""The cost model: a lower bound on a train step from what a chip can do and a mesh must send.

    seconds = max(compute, memory) + communication

- compute: analytic FLOPs (`unlearning.throughput`), with the forward pass that rematerialisation
  repeats, over the peak of all chips.
- memory: each chip reads the weights that it multiplies with once per pass.
- communication: bytes sent by the collectives of the compiled program, over the bandwidth of all
  links of a chip; nothing is assumed to overlap.

Of a GPU's program the kernels are known, and their bound is closer (`kernel_bound`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ema_jax.compile_check.kernels import Kernel
from ema_jax.compile_check.topology import Topology
from ema_jax.compile_check.workload import Workload
from ema_jax.models.sharding import batch_multiple
from ema_jax.runtime.devices import Accelerator
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


def train_flops(work: Workload, groups: int = 1) -> float:
    """FLOPs of a train step, recomputation included; `groups` of devices share its rows."""
    arm, rows = work.arm, work.step_batch(groups).rows
    scored = rows.places.size / rows.tokens.size  # the responses
    per_token = flops_per_token(
        work.model, arm, rows.tokens.shape[-1], scored=scored, recompute=arm.remat == "full"
    )
    return float(per_token * rows.tokens.size)


def train_tokens(work: Workload, groups: int = 1) -> dict[str, int]:
    """Tokens of a step: those of examples, and with the padding of its rows."""
    rows = work.step_batch(groups).rows
    return {"real": int(np.count_nonzero(rows.segments)), "padded": rows.tokens.size}


def train_bound(work: Workload, topology: Topology, mesh: Mesh, sent_bytes: float) -> Bound:
    """Lower bound on one train step.

    Args:
        work: the shapes.
        topology: the slice or the GPUs.
        mesh: over its devices.
        sent_bytes: by one device per step (`collectives.summary`).
    """
    chip, devices = topology.chip, topology.devices_per_chip
    passes = 2 + (work.arm.remat == "full")
    read = passes * work.model.matrix_weights * work.dtype.itemsize / mesh.shape["tensor"]
    return Bound(
        compute=train_flops(work, batch_multiple(mesh)) / (topology.chips * chip.flops),
        memory=read * devices / chip.hbm_bandwidth,
        communication=sent_bytes * devices / chip.link_bandwidth,
    )


def kernel_bound(kernels: Sequence[Kernel], chip: Accelerator) -> dict[str, Any]:
    """Lower bound on a program's time from its kernels, one after another.

    Each takes as long as its operations at the chip's peak or its bytes at the bandwidth, whichever
    is longer. Launches, gaps and what the caches save are not in it.

    Returns:
        `flops` and `bytes` of one run, `seconds` that it takes at least, and of which
        `seconds_by_bytes` in kernels that the bandwidth limits.
    """
    by_flops = [one.times * one.flops / chip.flops for one in kernels]
    by_bytes = [one.times * one.bytes / chip.hbm_bandwidth for one in kernels]
    pairs = list(zip(by_flops, by_bytes, strict=True))
    return {
        "flops": sum(one.times * one.flops for one in kernels),
        "bytes": sum(one.times * one.bytes for one in kernels),
        "seconds": sum(map(max, pairs)),
        "seconds_by_bytes": sum(memory for compute, memory in pairs if memory > compute),
    }


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
