"""A sweep on the embedded Qwen2 model: two targets × two β × both arms × eight seeds.

python -m ema_jax.sweep --config=configs/tiny_sweep.py --workdir=runs/tiny_sweep
"""

from ema_jax import config as ema


def get_config():
    config = ema.beside(__file__, "tiny")
    config.seeds = tuple(range(8))
    config.grid = {
        "target": ("cybersecurity", "safety"),
        "unlearn": {"beta": (0.1, 0.2)},
    }
    return config
