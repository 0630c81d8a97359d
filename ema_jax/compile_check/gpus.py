"""GPUs as XLA's compiler has to know them where there is none: a target configuration."""

import dataclasses

from ema_jax.runtime.devices import GIB, GPUS, Accelerator


@dataclasses.dataclass(frozen=True)
class Card:
    """What the compiler asks of a card.

    Sources: the target configurations in XLA's own repository
    (`xla/backends/gpu/target_config/specs`: memory, cores, caches, clocks), NVIDIA's CUDA C++
    Programming Guide (limits by compute capability), and the data sheets (bandwidth).

    Attributes:
        sheet: its row in `GPUS`: peak FLOP/s, bandwidth and links.
        name: as the driver calls it, and so `jax.Device.device_kind`.
        memory: bytes that the driver shows.
        capability: the compute capability, as in (9, 0).
        accelerated: instructions of that one capability alone (sm_90a).
        cores: streaming multiprocessors.
        lanes: float32 units of each.
        l2: bytes of its second cache.
        shared: bytes of shared memory of a core, of which a block may take all but 1 KiB.
        clock_ghz: highest clock.
    """

    sheet: Accelerator
    name: str
    memory: int
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    lanes: int
    l2: int
    shared: int
    clock_ghz: float

    @property
    def memory_gib(self) -> float:
        """Memory that the driver shows, in GiB: less than the label says."""
        return self.memory / GIB

    def target_config(self) -> str:
        """The card as a `GpuTargetConfigProto` of XLA, in the text format of protocol buffers."""
        major, minor = self.capability
        feature = "ACCELERATED_FEATURES" if self.accelerated else "NONE"
        return f"""gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  clock_rate_ghz: {self.clock_ghz}
  memory_bandwidth: {round(self.sheet.hbm_bandwidth)}
  device_memory_size: {self.memory}
  l2_cache_size: {self.l2}
  shared_memory_per_core: {self.shared}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared - 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.name}"
"""


def _hopper(sheet: str, name: str, memory: int) -> Card:
    sizes = {"l2": 50 << 20, "shared": 228 << 10}
    return Card(GPUS[sheet], name, memory, (9, 0), True, 132, 128, clock_ghz=1.98, **sizes)


def _ampere(sheet: str, name: str, memory: int) -> Card:
    sizes = {"l2": 40 << 20, "shared": 164 << 10}
    return Card(GPUS[sheet], name, memory, (8, 0), False, 108, 64, clock_ghz=1.41, **sizes)


CARDS: dict[str, Card] = {
    "h100": _hopper("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072),
    "h200": _hopper("h200", "NVIDIA H200", 151_397_597_184),
    "a100": _ampere("a100-80gb", "NVIDIA A100-SXM4-80GB", 85_100_068_864),
    "a100-40gb": _ampere("a100-40gb", "NVIDIA A100-SXM4-40GB", 42_331_013_120),
}
"""The cards that `--topology` knows, each by its name there (SXM boards)."""
