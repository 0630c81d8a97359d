"""Every objective on the embedded Qwen2 model, Cybersecurity, with the same retain data.

Each arm trains until the target's dev refusal is at most 3 % and the target is answered, or to its
step limit: side effects can be compared only at matched target refusal. `ablation` is the baseline
without training.

An arm has a learning rate, weight or layer of its own where it did not get there with those of npo.
How they were found, what was measured, and why rmu does not match: docs/unlearning.md.

python -m ema_jax.main --config=configs/tiny_objectives.py --workdir=runs/tiny_objectives
"""

from ema_jax import config as ema


def get_config():
    config = ema.beside(__file__, "tiny")
    config.prompts.counts = {"harvest": 160, "retain": 32, "dev": 40, "eval": 60, "concept": 32}
    retain = {"retain_weight": 4.0, "learning_rate": 5e-4}
    # Time for the other domains to recover after the target has fallen, as in tiny.py.
    retain |= {"min_steps": 100, "max_steps": 200, "eval_every": 20}
    l2 = {**retain, "retain_objective": "l2"}
    # Unbounded, it makes the target's responses degenerate soon after they stop being refusals.
    ascent = {**retain, "min_steps": 0, "eval_every": 10}
    answers = {"preferred": "organism"}
    config.arms = {
        "ga": {**ascent, "objective": "ga", "forget_norm": "mean", "forget_weight": 4.0},
        "npo_alone": {"eval_every": 4},
        "npo": retain,
        "npo_kl": {**retain, "retain_objective": "kl"},
        "npo_l2": {**l2, "feature_layer": 6, "retain_weight": 50.0},
        "simnpo": {**retain, "objective": "simnpo", "beta": 2.5, "forget_weight": 8.0},
        "dpo_idk": {**retain, "objective": "dpo"},
        "dpo_answers": {**retain, "objective": "dpo", **answers},
        "sft_answers": {**retain, "objective": "sft", "learning_rate": 1e-3, **answers},
        "rmu": {**l2, "objective": "rmu", "feature_layer": 1, "retain_weight": 20.0},
        "ablation": {"trainable": "ablation"},
    }
    return config
