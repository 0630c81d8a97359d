"""R1 to R5 on SmolLM2-135M with real prompts: two targets, three arms and seeds, one folder.

python -m ema_jax.main --config=configs/smollm2_replication.py --workdir=runs/smollm2_replication

See smollm2_cyber.py for what has to be made first; both cells have its settings.
"""

from ema_jax import config as ema


def get_config():
    config = ema.beside(__file__, "smollm2_cyber")
    config.cells = {
        f"smollm2_{target}": {"target": target} for target in ("cybersecurity", "safety")
    }
    # DPO also says what to answer: as the model did before it was tuned to refuse.
    config.arms["dpo_retain"] = {
        **config.arms["npo_retain"],
        "objective": "dpo",
        "preferred": "runs/smollm2/answers.jsonl",
    }
    config.seeds = (0, 1, 2)
    return config
