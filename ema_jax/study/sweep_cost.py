"""The layer sweep's cost, known before it starts, and the layers that a CPU has time for."""

from collections.abc import Sequence

import numpy as np
from absl import logging
from jax.sharding import Mesh

from ema_jax.data.batching import bucket
from ema_jax.models.config import DecoderConfig
from ema_jax.runtime.devices import find_accelerator
from ema_jax.runtime.hardware import cores

# What a sweep may take where nobody said how many layers: on two cores about ten minutes.
_CPU_BUDGET = 5e13  # FLOP
_FEWEST_LAYERS = 4
_CORE, _ACCELERATOR = 4e10, 0.3  # FLOP/s of a core in float32; share of an accelerator's peak


def sweep_flops(
    decoder: DecoderConfig, layers: Sequence[int], interventions: int, lengths: Sequence[int]
) -> float:
    """FLOPs of a sweep: every intervention at every layer, through the blocks above it."""
    blocks = sum(decoder.num_layers - layer for layer in layers)
    tokens = sum(bucket(length) for length in lengths)
    weights = 2 * decoder.block_weights * tokens
    attention = 4 * decoder.num_heads * decoder.head_dim * sum(bucket(n) ** 2 for n in lengths)
    return float(interventions * blocks * (weights + attention))


def layers_to_sweep(
    decoder: DecoderConfig,
    interventions: int,
    lengths: Sequence[int],
    mesh: Mesh,
    most: int = 0,
) -> list[int]:
    """The layers of a sweep, evenly spread from the embeddings to the last; says what they cost.

    Args:
        decoder: the architecture.
        interventions: at each layer, on each prompt.
        lengths: tokens of the prompts.
        mesh: devices of the model.
        most: number of layers; 0 for all, or on a CPU as many as take some minutes.
    """
    every = list(range(decoder.num_layers + 1))
    whole = sweep_flops(decoder, every, interventions, lengths)
    device = mesh.devices.flat[0]
    count = most or len(every)
    if not most and device.platform == "cpu":
        count = max(int(len(every) * _CPU_BUDGET / whole), _FEWEST_LAYERS)
    count = min(count, len(every))
    layers = np.unique(np.linspace(0, decoder.num_layers, count).round().astype(int)).tolist()
    flops = sweep_flops(decoder, layers, interventions, lengths)
    accelerator = find_accelerator(device.device_kind)
    if accelerator is not None:
        speed = _ACCELERATOR * accelerator.flops * mesh.size
    else:
        speed = _CORE * cores()
    rest = (
        ""
        if len(layers) == len(every)
        else (
            f"; all {len(every)} would take {_minutes(whole / speed)} "
            f"(concepts.sweep_layers = {len(every)}), none concepts.sweep_prompts = 0"
        )
    )
    logging.info(
        "layer sweep: %d layers × %d interventions × %d prompts, %.2g FLOP, %s%s",
        *(len(layers), interventions, len(lengths), flops, _minutes(flops / speed), rest),
    )
    return layers


def _minutes(seconds: float) -> str:
    return "under a minute" if seconds < 60 else f"about {seconds / 60:.0f} min"
