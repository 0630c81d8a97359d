"""Every objective on the embedded Qwen2 model, Cybersecurity, with the same retain data.

Each arm trains until the target's dev refusal is at most 8 %, or to its step limit: what else
changed compares only where the target's refusal matches. `ablation` is the baseline without
training.

python -m ema_jax.main --config=configs/tiny_objectives.py --workdir=runs/tiny_objectives
"""

from ema_jax import config as ema


def get_config():
    config = ema.beside(__file__, "tiny")
    config.prompts.counts = {"harvest": 160, "retain": 32, "dev": 20, "eval": 60, "concept": 32}
    retain = {"retain_weight": 4.0, "learning_rate": 5e-4}
    retain |= {"min_steps": 40, "max_steps": 80, "eval_every": 20, "max_invalid": 0.05}
    answers = {"preferred": "organism"}
    config.arms = {
        "ga": {**retain, "objective": "ga", "forget_norm": "mean"},
        "npo_alone": {},
        "npo": retain,
        "npo_kl": {**retain, "retain_objective": "kl"},
        "npo_l2": {**retain, "retain_objective": "l2"},
        "simnpo": {**retain, "objective": "simnpo", "beta": 2.5},
        "dpo_idk": {**retain, "objective": "dpo"},
        "dpo_answers": {**retain, "objective": "dpo", **answers},
        "sft_answers": {**retain, "objective": "sft", **answers},
        "rmu": {**retain, "objective": "rmu", "retain_objective": "l2"},
        "ablation": {"trainable": "ablation"},
    }
    return config
