"""Analytic FLOPs of training. (XLA's own count takes the body of a scan once.)"""

from ema_jax.models.config import DecoderConfig
from ema_jax.unlearning.config import UnlearnConfig


def flops_per_token(
    model: DecoderConfig,
    arm: UnlearnConfig,
    length: int,
    *,
    scored: float = 1.0,
    recompute: bool = False,
) -> float:
    """FLOPs of a forward and a backward pass, per token of a sequence of `length` tokens.

    A product with a weight costs 2 FLOPs forward, 2 for the gradient of its input, and 2 for the
    weight's own gradient where it is trained. Attention costs 4 · length · heads · head_dim per
    layer forward (masked positions included, as XLA computes them) and twice that backward.

    Args:
        model: the architecture.
        arm: what is trained.
        length: padded tokens per row.
        scored: share of the tokens whose logits are computed: those before a response token.
        recompute: add the forward pass that rematerialisation repeats.
    """
    head = scored * model.hidden_size * model.vocab_size
    weights = model.num_layers * model.block_weights + head
    trained, adapters = weights, 0.0
    if arm.trainable == "lora":
        sizes = (model.projections[name] for name in arm.lora.targets)
        trained, adapters = 0, model.num_layers * arm.lora.rank * sum(map(sum, sizes))
    elif arm.layers:
        trained = (arm.layers[1] - arm.layers[0] + 1) * model.block_weights
    attention = 4 * length * model.num_heads * model.head_dim * model.num_layers
    forward = 2 * (weights + adapters) + attention
    backward = 2 * (weights + adapters) + 2 * (trained + adapters) + 2 * attention
    return forward * (2 if recompute else 1) + backward
