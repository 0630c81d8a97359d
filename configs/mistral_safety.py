"""Paper cell: Mistral-7B-v0.3, refusals unlearned in Safety.

python -m ema_jax.main --config=configs/mistral_safety.py --workdir=runs/mistral_safety
"""

from ema_jax import config as ema


def get_config():
    config = ema.beside(__file__, "qwen_cyber")
    config.model.source = "mistralai/Mistral-7B-Instruct-v0.3"
    config.target = "safety"
    return config
