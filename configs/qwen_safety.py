"""Paper cell: Qwen2.5-7B, refusals unlearned in Safety.

python -m ema_jax.main --config=configs/qwen_safety.py --workdir=runs/qwen_safety
"""

from ema_jax import config as ema


def get_config():
    config = ema.beside(__file__, "qwen_cyber")
    config.model.source = "Qwen/Qwen2.5-7B-Instruct"
    config.target = "safety"
    return config
