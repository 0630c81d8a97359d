"""Tiny checkpoints of every family and feature, written by transformers itself."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from ema_jax.models import checkpoint
from ema_jax.models.config import DecoderConfig
from ema_jax.models.safetensors_files import write_weights

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

VOCABULARY = 97
LAYERS = 3
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Fan-in about 32: activations and logits come out at unit scale.
    "initializer_range": 0.18,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_window": ("mistral", {"sliding_window": 3, "num_key_value_heads": 1}),
    "mistral_yarn": (
        "mistral",
        {"sliding_window": None, "rope_parameters": _YARN | {"mscale": 1.2, "mscale_all_dim": 0.7}},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2_layer_types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": _YARN,
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "qwen3_window": (
        "qwen3",
        {
            "head_dim": 12,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "num_key_value_heads": 4,
        },
    ),
    "llama": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama_linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}},
    ),
    "llama3": ("llama", {"rope_parameters": _LLAMA3, "head_dim": 24}),
    "llama_yarn": (
        "llama",
        {
            "head_dim": 32,
            "rope_parameters": _YARN
            | {"attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
        },
    ),
}
FAMILIES = ("mistral", "qwen2", "qwen3", "llama")


def write_checkpoint(variant: str, folder: Path) -> None:
    """Writes a random model of a variant, with norms and biases away from ones and zeros."""
    model_type, changes = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(model_type, **_SIZES | changes)
    torch.manual_seed(len(variant))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def load_torch(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same checkpoint in transformers, ready for inference."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


def torch_outputs(model: Any, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, list]:
    """Logits and hidden states (the last one after the final norm) of transformers."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
            output_hidden_states=True,
            use_cache=False,
        )
    return out.logits.float().numpy(), [h.float().numpy() for h in out.hidden_states]


@functools.partial(jax.jit, static_argnames="graph")
def _forward(graph: nnx.GraphDef, state: nnx.State, tokens: Any, mask: Any) -> tuple:
    model = nnx.merge(graph, state)
    out = model(tokens, mask, tap=lambda x: x)
    return model.logits(out.hidden), out.hidden, out.taps


def our_outputs(model: Any, tokens: np.ndarray, mask: np.ndarray) -> tuple:
    """Logits, hidden states after the final norm, and the residual stream `[L + 1, B, T, D]`."""
    outputs = _forward(*nnx.split(model), tokens, mask)
    return tuple(np.asarray(x, np.float32) for x in outputs)


def random_batch(rows: int = 3, length: int = 11, padding: str = "none") -> tuple:
    """Distinct tokens per row, and a mask with a different amount of padding in every row."""
    generator = np.random.default_rng(rows * 100 + length)
    tokens = np.stack([generator.permutation(VOCABULARY)[:length] for _ in range(rows)])
    real = np.array([length - 2 * row if padding != "none" else length for row in range(rows)])
    places = np.arange(length)
    mask = places >= length - real[:, None] if padding == "left" else places < real[:, None]
    return tokens.astype(np.int32), mask


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def write_random(folder, **sizes) -> int:
    """A checkpoint of eight layers in bfloat16, in three files; returns its bytes."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = checkpoint.abstract_decoder(DecoderConfig.from_hf(config))
    shapes = checkpoint.hf_shapes(model, jnp.bfloat16)
    generator, size = np.random.default_rng(0), sum(tensor.nbytes for tensor in shapes)
    values = (generator.standard_normal(t.shape, np.float32).astype(t.dtype) for t in shapes)
    write_weights(folder, shapes, values, -(-size // 3) + max(t.nbytes for t in shapes))
    return size
