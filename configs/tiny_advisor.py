"""Is retain data better spent where the forecast says? The embedded Qwen2 model, five seeds.

python -m ema_jax.main --config=configs/tiny_advisor.py --workdir=runs/tiny_advisor

Arms of the same number of retain examples of the six other domains: dealt out evenly, and by
`forecast.retain_counts` of the forecast that configs/tiny.py makes (`retain_shares` in its
results.json); beside them an arm with none. The shares are written here, before any training.
"""

from ema_jax import config as ema
from ema_jax.concepts.forecast import retain_counts

BUDGET = 48
FORECAST: dict[str, float] = {}
EVEN = dict.fromkeys(FORECAST, 0.0)


def get_config():
    config = ema.beside(__file__, "tiny")
    retain = config.arms["npo_retain"].to_dict()
    config.arms = {
        "npo": {},
        "npo_advised": {**retain, "retain_counts": retain_counts(FORECAST, BUDGET)},
        "npo_even": {**retain, "retain_counts": retain_counts(EVEN, BUDGET)},
    }
    config.seeds = (0, 1, 2, 3, 4)
    return config
