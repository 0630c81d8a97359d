"""Throughput of training: analytic FLOPs, peak rates of devices, memory."""

import jax

from ema_jax.models.decoder import Decoder
from ema_jax.unlearning.config import UnlearnConfig

# Dense bfloat16 FLOP/s of one device, by how JAX names its kind; vendors' data sheets. The first
# name that a device's kind starts with counts.
PEAK_FLOPS: dict[str, float] = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(kind: str) -> float | None:
    """FLOP/s of a device kind; None for a CPU and for what the table does not have."""
    return next((peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), None)


def flops_per_token(model: Decoder, config: UnlearnConfig, length: int) -> float:
    """FLOPs of forward and backward pass for one token, without what is recomputed.

    Two a weight forwards, two for the gradient of its input, and two more for its own gradient
    where it is trained; attention 4·T·heads·head_dim a layer forwards (half of the places are
    masked, which XLA computes all the same), twice that backwards. XLA's own count takes a scan's
    body for once.
    """
    c = model.config
    attention = c.num_heads * c.head_dim
    block = c.hidden_size * (2 * attention + 2 * c.num_kv_heads * c.head_dim)
    block += 3 * c.hidden_size * c.intermediate_size
    weights = c.num_layers * block + c.hidden_size * c.vocab_size
    trained, adapters = weights, 0
    if config.trainable == "lora":
        trained = 0
        for name in config.lora.targets:
            layers, size_in, size_out = getattr(model.blocks, name).kernel.shape
            adapters += layers * config.lora.rank * (size_in + size_out)
    elif config.layers:
        trained = (config.layers[1] - config.layers[0] + 1) * block
    mixing = 3 * 4 * length * attention * c.num_layers
    return 4 * weights + 2 * trained + 6 * adapters + mixing


def memory_gib() -> float | None:
    """Peak memory of the first device in GiB; None where the backend does not report it."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30
