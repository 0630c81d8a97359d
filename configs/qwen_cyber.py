"""Paper cell: Qwen2.5-7B, refusals unlearned in Cybersecurity.

python -m ema_jax.main --config=configs/qwen_cyber.py --workdir=runs/qwen_cyber

Model and target are the paper's. The instruct checkpoint, prompt sets, hyper-parameters and judge
are this project's choices: the paper's are not known to us.
"""

from ema_jax import config as ema


def get_config():
    config = ema.default()
    config.model.source = "Qwen/Qwen2.5-7B-Instruct"
    config.target = "cybersecurity"
    config.prompts.source = "salad"
    config.prompts.benign_source = "dolly"
    config.prompts.lookalike_source = "xstest"
    config.generation.batch_size = 0  # as many rows as fit
    config.mesh = (1, -1, 1)
    return config
