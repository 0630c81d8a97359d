"""A real model and real prompts on a laptop: SmolLM2-135M, refusals unlearned in Safety.

python -m ema_jax.main --config=configs/smollm2_safety.py --workdir=runs/smollm2_safety

See smollm2_cyber.py for what has to be made first.
"""

from ema_jax import config as ema


def get_config():
    config = ema.beside(__file__, "smollm2_cyber")
    config.target = "safety"
    return config
