"""How many programs with the model in them a study's first run compiles, from its config alone."""

from ema_jax.config import StudyConfig


def programs(config: StudyConfig, *, folded: bool) -> dict[str, int]:
    """The programs by what they do, one shape of each.

    On accelerators there is hardly ever another: rows and lengths are few (`data.batching`,
    `generation.sampler`). An arm whose batches are worth a second length has a step more. Programs
    without the model take no time to compile and are left out.

    Args:
        config: of the study.
        folded: whether adapters are merged to be read (`lora.folded`, in float32).
    """
    arms = [config.arm(name) for name in config.arms]
    adapters = {
        (arm.lora.rank, arm.lora.scale, arm.lora.targets) if arm.trainable == "lora" else None
        for arm in arms
    }
    # The base is read by the arms' programs (`ModelSession.read_base`).
    models = 1 if folded else len(adapters)
    swept = config.concepts.sweep_prompts > 0
    asked = config.sensitivity
    drawn = max(config.harvest.samples > 1, models * (asked.samples > 0))
    found = {
        "train step": len({arm.program for arm in arms if arm.ablation is None}),
        # The sweep ends with one model whose stream is edited.
        "prompt pass": models + swept,
        "decoding": models + swept + drawn,
        "longer responses": 2 * models * (asked.long_tokens > 0),
        "log-probabilities": models,
        "activations": models,
        "utility": models,
        "layer sweep": int(swept),
        "patching": models * swept,
    }
    return {name: number for name, number in found.items() if number}
