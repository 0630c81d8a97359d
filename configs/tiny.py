"""The study on the embedded Qwen2 model, a model organism: minutes on a laptop CPU, offline.

python -m ema_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from ema_jax import config as ema
from ema_jax.organism import CHECKPOINTS


def get_config():
    config = ema.default()
    config.model.source = str(CHECKPOINTS / "qwen2")
    config.target = "cybersecurity"
    config.prompts.source = "organism"
    config.prompts.counts = {"harvest": 320, "retain": 32, "dev": 40, "eval": 100, "concept": 64}
    # A refusal has many wordings: with only the greedy one in the forget set, the others remain.
    config.harvest.samples = 4
    config.generation.max_new_tokens = 48
    config.generation.batch_size = 140
    # NPO's push ends at a log-ratio of a few 1/β nats. At β 0.1 it continues long after the target
    # is answered, and with retain data the answers disappear too; see docs/unlearning.md.
    config.unlearn.beta = 1.0
    config.unlearn.learning_rate = 2e-4
    config.unlearn.max_steps = 60
    config.unlearn.eval_every = 4
    # Well under the required 10 %: the dev rate that decides is measured on 40 prompts only.
    config.unlearn.stop_at = 0.03
    # With retain data the target falls first and the other domains recover afterwards.
    retain = {"retain_weight": 4.0, "learning_rate": 5e-4, "min_steps": 100, "max_steps": 160}
    config.arms = {"npo": {}, "npo_retain": {**retain, "eval_every": 20}}
    config.seeds = (0,)
    return config
