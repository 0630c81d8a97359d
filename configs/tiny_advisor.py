"""Does retain data work better where the forecast places it? The embedded models, five seeds.

Three arms: no retain data; 48 refusals from the six other domains in uniform shares; as many in
shares by `forecast.retain_counts`. The latter two have the same benign answers and the same number
of steps, so they differ only in where the refusals come from.

python -m ema_jax.main --config=configs/tiny_advisor.py:qwen2 --workdir=runs/tiny_advisor
python -m ema_jax.main --config=configs/tiny_advisor.py:mistral --workdir=runs/mistral_advisor
"""

from ema_jax import config as ema
from ema_jax.concepts.forecast import retain_counts
from ema_jax.errors import UserError
from ema_jax.organism import CHECKPOINTS

BUDGET = 48
BENIGN_ANSWERS = 24
# `forecast.score` of the Cybersecurity cells of configs/tiny_replication.py, computed from the
# untouched models alone.
FORECASTS = {
    "qwen2": {
        "safety": 0.169,
        "toxicity": -0.245,
        "bias": -0.165,
        "sensitive_content": -0.377,
        "medical_legal": -0.232,
        "privacy": -0.625,
    },
    "mistral": {
        "safety": 0.774,
        "toxicity": 0.121,
        "bias": -0.778,
        "sensitive_content": -0.734,
        "medical_legal": 0.219,
        "privacy": -0.877,
    },
}


def get_config(family="qwen2"):
    if family not in FORECASTS:
        raise UserError(f"tiny_advisor.py:{family}: no such model; use {' or '.join(FORECASTS)}")
    config = ema.beside(__file__, "tiny")
    config.model.source = str(CHECKPOINTS / family)
    forecast = FORECASTS[family]
    config.prompts.counts = {"harvest": 320, "retain": 32, "dev": 20, "eval": 60, "concept": 64}
    # No early stop: arms with different numbers of steps could not be compared.
    retain = {"retain_weight": 4.0, "learning_rate": 5e-4}
    retain |= {"min_steps": 100, "max_steps": 100, "eval_every": 100}

    def arm(scores):
        counts = {**retain_counts(scores, BUDGET), "benign": BENIGN_ANSWERS}
        return {**retain, "retain_counts": counts}

    config.arms = {
        "npo": {"eval_every": 2},
        "npo_uniform": arm(dict.fromkeys(forecast, 0.0)),
        "npo_advised": arm(forecast),
    }
    config.concepts.sweep_prompts = 0
    config.seeds = (0, 1, 2, 3, 4)
    return config
