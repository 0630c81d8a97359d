"""R1 to R5 on the embedded models: both families, both targets, both arms, five seeds, one folder.

Every cell has the settings of tiny.py and none of its own; all have dev rates every second step.

python -m ema_jax.main --config=configs/tiny_replication.py --workdir=runs/tiny_replication
"""

from ema_jax import config as ema
from ema_jax.organism import CHECKPOINTS


def get_config():
    config = ema.beside(__file__, "tiny")
    config.unlearn.eval_every = 2  # as the figures of BUILD_NOTES.md were measured
    config.seeds = (0, 1, 2, 3, 4)
    config.cells = {
        f"{family}_{target}": {"model": {"source": str(CHECKPOINTS / family)}, "target": target}
        for family in ("qwen2", "mistral")
        for target in ("cybersecurity", "safety")
    }
    return config
