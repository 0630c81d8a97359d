"""The cost model: a lower bound on a train step from what a chip can do and a mesh must send.

    seconds = max(compute, memory) + communication

- compute: analytic operations (XLA counts a scan's body once) over the chip's peak. A matrix
  product costs 2 operations a parameter and token. Backward costs as much again for the
  activations' gradients and, in full fine-tuning, once more for the weights'; rematerialising
  repeats the forward pass.
- memory: every chip reads the weights that it multiplies with once a pass.
- communication: bytes that the compiled program's collectives send, over the bandwidth of all links
  of a chip; nothing is assumed to overlap.
"""

import dataclasses
import math

from jax.sharding import Mesh

from ema_jax.compile_check.programs import Workload
from ema_jax.compile_check.topology import Topology


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that a train step takes at least, and what takes them."""

    compute: float
    memory: float
    communication: float

    @property
    def seconds(self) -> float:
        """Of one step."""
        return max(self.compute, self.memory) + self.communication

    @property
    def limit(self) -> str:
        """What takes the largest part."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])


def parameters(work: Workload) -> int:
    """Parameters that multiply activations: all but the embedding table's and the norms'."""
    c = work.model
    attention, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    block = c.hidden_size * (2 * attention + 2 * kv + 3 * c.intermediate_size)
    return c.num_layers * block + c.vocab_size * c.hidden_size


def train_flops(work: Workload, rows: int) -> float:
    """Operations of a train step over `rows` examples."""
    c, tokens = work.model, rows * work.train_tokens
    attention = 4 * c.num_layers * c.num_heads * c.head_dim * work.train_tokens
    passes = 2 + work.arm.remat + (work.arm.trainable == "full")
    return float(passes * 2 * parameters(work) * tokens + (2 + work.arm.remat) * attention * tokens)


def train_bound(work: Workload, topology: Topology, mesh: Mesh, sent_bytes: float) -> Bound:
    """The bound on one step.

    Args:
        work: the shapes.
        topology: the slice.
        mesh: over its devices.
        sent_bytes: by one device in a step (`collectives.summary`).
    """
    chip, apart = topology.chip, topology.devices_per_chip
    rows = work.train_rows(mesh)
    passes = 2 + work.arm.remat
    read = passes * parameters(work) * work.dtype.itemsize / mesh.shape["tensor"]
    return Bound(
        compute=train_flops(work, rows) / (topology.chips * chip.flops),
        memory=read * apart / chip.hbm_bandwidth,
        communication=sent_bytes * apart / chip.ici_bandwidth,
    )


def meshes(work: Workload, devices: int) -> list[tuple[int, int, int]]:
    """Meshes worth trying: tensor sizes that split every head count, and all ways of the rest."""
    heads = math.gcd(work.model.num_heads, work.model.num_kv_heads)
    shapes = []
    for tensor in _divisors(math.gcd(devices, heads)):
        rest = devices // tensor
        shapes += [(rest // fsdp, fsdp, tensor) for fsdp in _divisors(rest) if fsdp * 4 >= rest]
    return shapes


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
