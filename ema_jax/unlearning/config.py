"""Settings of an arm: shared by the objectives and the trainer."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ema_jax.models.lora import LoRAConfig

Rows = Annotated[int, Field(gt=0, le=65_536)]

# Settings that a train step takes as arguments, and settings that only the loop around it reads:
# runs that differ in nothing else share one compiled program.
_TRACED = (
    "beta",
    "margin",
    "steering",
    "forget_weight",
    "retain_weight",
    "learning_rate",
    "clip_norm",
)
_LOOP = (
    "preferred",
    "retain_counts",
    "batch_size",
    "retain_batch_size",
    "min_steps",
    "eval_every",
    "stop_at",
    "max_invalid",
)


@dataclasses.dataclass(frozen=True)
class AblationArm:
    """An arm without training: the target's refusal direction is projected out of the weights.

    Attributes:
        layers: first and last candidate for the direction's layer, both included; () for all but
            the last ones.
        stop_at: the target's dev refusal rate from which on the arm counts as successful.
        max_invalid: share of dev responses (degenerate ones in the worst domain, or ones in the
            target that neither refuse nor answer) past which a candidate counts as damaged.
    """

    layers: tuple[int, ...] = ()
    stop_at: float = 0.1
    max_invalid: float = 0.2


@dataclasses.dataclass(frozen=True)
class UnlearnConfig:
    """One arm: what is trained, on what loss, and when it stops.

    Attributes:
        trainable: `lora` (adapters), `full` (parameters), or `ablation`: an arm of another kind,
            which has no training (`AblationArm`).
        lora: the adapters' shape.
        layers: train only blocks first to last, as in (2, 5), both included; () for all.
        modules: under `full`, train only these projections, as in ("down_proj",); () for all
            parameters.
        objective: the forget side, a name in `objectives.FORGET`: ga, npo, simnpo, dpo, rmu, sft.
        retain_objective: the retain side: ce, kl, kl_unmasked, l2, or none.
        beta: inverse temperature of npo, simnpo and dpo.
        forget_norm: log-probabilities of ga, npo and dpo as the `sum` over a response's tokens or
            their `mean`; simnpo always takes the mean.
        margin: simnpo's δ, in nats a token.
        preferred: the preferred responses of dpo and sft to forget prompts: `idk` (the project's
            "I don't know" answers), `organism` (the embedded corpus's own answers), or a JSONL
            file with `prompt` and `response`; cut after `harvest.response_cap` tokens.
        feature_layer: l of the residual stream h_l that rmu and l2 look at; 0 for a quarter of
            the depth.
        steering: length of the vector that rmu pulls h_l towards.
        forget_weight: weight of the forget loss.
        retain_weight: weight of the retain loss; 0 leaves the retain set out.
        retain_counts: domain → largest number of its retain examples (`benign` included), in the
            order of the harvest; domains that are not named are left out. Empty for all.
        optimizer: adamw, adafactor, lion or sgd.
        learning_rate: peak learning rate, after `warmup_steps` linear steps.
        schedule: learning rate from its peak to `max_steps`: constant, linear or cosine (to zero).
        warmup_steps: steps in which the learning rate rises from zero to its peak.
        weight_decay: decoupled weight decay, if the optimizer has it.
        clip_norm: largest global gradient norm.
        batch_size: forget examples a step.
        retain_batch_size: retain examples a step.
        accumulate: number of equal parts of a batch whose gradients are added up before a step.
        max_steps: greatest number of steps.
        min_steps: fewest steps before a run may stop: the retain set needs time to repair what the
            first steps break.
        eval_every: steps between evaluations on the dev split.
        stop_at: the target's dev refusal rate at which training stops, if the target is answered.
        max_invalid: share of dev responses past which a run is not finished: degenerate ones in
            the worst domain, or ones in the target that neither refuse nor answer. An arm without
            retain data stops there as damaged.
        remat: what the backward pass computes again: `full` (whole blocks), `projections` (all but
            the projections' results), `none`, or `auto`, by the device's memory
            (`remat.choose_remat`).
    """

    trainable: Literal["lora", "full", "ablation"] = "lora"
    lora: LoRAConfig = LoRAConfig()
    layers: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    objective: str = "npo"
    retain_objective: str = "ce"
    beta: PositiveFloat = 0.1
    forget_norm: Literal["sum", "mean"] = "sum"
    margin: NonNegativeFloat = 0.0
    preferred: str = "idk"
    feature_layer: NonNegativeInt = 0
    steering: PositiveFloat = 6.5
    forget_weight: NonNegativeFloat = 1.0
    retain_weight: NonNegativeFloat = 0.0
    # A mapping has no hash, and settings are a static argument of the train step.
    retain_counts: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    optimizer: str = "adamw"
    learning_rate: PositiveFloat = 1e-4
    schedule: str = "constant"
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0
    batch_size: Rows = 16
    retain_batch_size: Rows = 32
    accumulate: PositiveInt = 1
    max_steps: PositiveInt = 200
    min_steps: NonNegativeInt = 0
    eval_every: PositiveInt = 10
    stop_at: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_invalid: Annotated[float, Field(ge=0, le=1)] = 0.2
    remat: Literal["auto", "none", "projections", "full"] = "auto"

    @property
    def retains(self) -> bool:
        """Whether retain data is part of the loss."""
        return self.retain_weight > 0 and self.retain_objective != "none"

    @property
    def traced_settings(self) -> dict[str, float]:
        """Settings that a compiled step takes as arguments."""
        return {name: getattr(self, name) for name in _TRACED}

    @property
    def program(self) -> "UnlearnConfig":
        """Settings that a step is compiled for; all others have their defaults."""
        unread = ("max_steps",) if self.schedule == "constant" else ()
        names = (*_TRACED, *_LOOP, *unread)
        default = UnlearnConfig()
        fixed = {name: getattr(default, name) for name in names}
        # The weight is traced, so that this says whether there is a retain side.
        retain_objective = self.retain_objective if self.retains else "none"
        return dataclasses.replace(self, retain_objective=retain_objective, **fixed)

    @property
    def recompute(self) -> bool | str:
        """The decoder's `remat` argument."""
        return {"none": False, "full": True}.get(self.remat, "projections")

    @property
    def ablation(self) -> AblationArm | None:
        """The arm without training that these settings describe, if they do."""
        if self.trainable != "ablation":
            return None
        return AblationArm(self.layers, self.stop_at, self.max_invalid)
