"""The study on the embedded Qwen2 model: minutes on a laptop CPU, offline.

python -m ema_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from ema_jax import config as ema
from ema_jax.organism import CHECKPOINTS


def get_config():
    config = ema.default()
    config.model.source = str(CHECKPOINTS / "qwen2")
    config.target = "cybersecurity"
    config.prompts.source = "organism"
    config.prompts.counts = {"harvest": 64, "retain": 32, "dev": 24, "eval": 100, "concept": 64}
    config.generation.max_new_tokens = 48
    config.generation.batch_size = 128
    config.unlearn.lora.rank = 8
    config.unlearn.lora.alpha = 16.0
    config.unlearn.learning_rate = 1e-3
    config.unlearn.max_steps = 100
    config.unlearn.eval_every = 2
    config.arms = {
        "npo": {},
        "npo_retain": {"retain_weight": 5.0, "min_steps": 40, "eval_every": 10},
    }
    config.seeds = (0,)
    return config
