"""R1 to R5 on the embedded models: both families, both targets, both arms, five seeds, one folder.

python -m ema_jax.main --config=configs/tiny_replication.py --workdir=runs/tiny_replication

What a cell says for itself was found on dev prompts of seeds 0 to 2; BUILD_NOTES.md has what else
was tried.
"""

from ema_jax import config as ema
from ema_jax.organism import CHECKPOINTS

# One greedy refusal a prompt is enough to forget, but for Qwen2 with Cybersecurity.
GREEDY = {"samples": 1}
# Here the others come back early, and training on turns what the target says to garble.
EARLY = {"min_steps": 60, "eval_every": 10, "stop_at": 0.08}
OWN = {
    "qwen2_safety": {"harvest": GREEDY, "arms": {"npo_retain": EARLY}},
    "mistral_cybersecurity": {"harvest": GREEDY},
    "mistral_safety": {"harvest": GREEDY},
}


def get_config():
    config = ema.beside(__file__, "tiny")
    config.seeds = (0, 1, 2, 3, 4)
    config.cells = {
        f"{family}_{target}": {
            "model": {"source": str(CHECKPOINTS / family)},
            "target": target,
            **OWN.get(f"{family}_{target}", {}),
        }
        for family in ("qwen2", "mistral")
        for target in ("cybersecurity", "safety")
    }
    return config
