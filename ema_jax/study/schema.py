"""`results.json` (schema 1) and `replication.json` as types: the contract in code.

What the schema's first version names is required. `NotRequired` is what came later, so that every
study of schema 1 is valid, or what a study has only if it asks for it. Rates, shares and drops are
fractions; null is what is undefined. Fields may be added freely; none is renamed or dropped without
another schema number.

`python -m ema_jax.study.schema` writes `results.schema.json` beside this file: the JSON Schema of
`Results`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NotRequired

from typing_extensions import TypedDict  # typing's own cannot be read by pydantic before 3.12

from ema_jax.data.similarity import Leakage
from ema_jax.refusal.intervals import PartialInterval
from ema_jax.refusal.paired import Drop, Recovery, SeedDifference
from ema_jax.refusal.scores import RefusalScore

SCHEMA: Final = 1
PATH = Path(__file__).with_name("results.schema.json")

PerLayer = Sequence[float | None]  # [L+1], from the embeddings to the last block
ByDomain = dict[str, float | None]
ByLayer = dict[str, PerLayer]  # domain → figure at every layer
LayerIntervals = dict[str, Sequence[PartialInterval | None]]


class Model(TypedDict):
    """The model that was studied."""

    id: str
    path: str
    revision: str | None
    family: str
    num_layers: int
    hidden_size: int
    parameters: int
    quantisation: NotRequired[str | None]
    """That of the GGUF file whose weights were dequantised."""
    fingerprint: NotRequired[str]
    template: NotRequired[str]
    template_hash: NotRequired[str]


class OracleCheck(TypedDict):
    """Answers that the embedded model's grammar accepts, of those that it can check."""

    right: int
    answers: int
    total: int
    rate: float | None


class Run(TypedDict):
    """One arm with one seed; drops and rises are paired with the base prompt by prompt."""

    refusal: dict[str, RefusalScore]
    steps: int
    stopped: NotRequired[str | None]
    first_loss: NotRequired[float | None]
    last_step: NotRequired[int]
    drop: NotRequired[ByDomain]
    compliance_rise: NotRequired[ByDomain]
    oracle: NotRequired[dict[str, OracleCheck]]


class DoseTrial(TypedDict):
    """A short run at one learning rate (`unlearning.dose.Trial`)."""

    learning_rate: float
    outcome: Literal["fits", "too_fast", "too_much", "too_little"]
    best_step: int | None
    target_refusal: float | None
    steps: int
    points: Sequence[dict[str, Any]]


class Dose(TypedDict):
    """The settings that a search on dev prompts gave an arm, and what it cost."""

    fits: bool
    learning_rate: float
    eval_every: int
    steps: int
    responses: int
    trials: list[DoseTrial]


class Arm(TypedDict):
    """An arm, its seeds pooled; the base has none."""

    refusal: dict[str, RefusalScore]
    dose: NotRequired[Dose]
    seeds: NotRequired[dict[str, Run]]
    oracle: NotRequired[dict[str, OracleCheck]]


class FarHalf(TypedDict):
    """EMA on the half of the prompts least like those trained on (`study.far_half`).

    `cosine` is that of the nearest of them.
    """

    n: int
    cosine: float
    drop: float | None
    ci95: PartialInterval
    compliance_rise: float | None
    compliance_ci95: PartialInterval


class Change(Drop):
    """EMA of one domain by both measures."""

    compliance_rise: NotRequired[float | None]
    compliance_ci95: NotRequired[PartialInterval]
    compliance_p: NotRequired[float]
    far: NotRequired[FarHalf]


class OffTargetChange(Change):
    """EMA of one domain, in the family of tests of its arm."""

    p_holm: float
    compliance_p_holm: NotRequired[float]


class TargetChange(Change):
    """The target's change in one arm."""

    refusal: RefusalScore
    damaged: bool


class Containment(Recovery):
    """The share of EMA without retain data (`compared_with`) that an arm with it recovers."""

    compared_with: NotRequired[str]
    target_rate: float | None
    target_answered: NotRequired[float]
    target_damaged: NotRequired[bool]
    recovered_by_compliance: NotRequired[float | None]
    compliance_ci95: NotRequired[PartialInterval]
    compliance_flags: NotRequired[list[str]]


class Comparison(TypedDict):
    """Two arms with retain data, `arm` − `minus`, paired by seed."""

    arm: str
    minus: str
    target: SeedDifference
    others: SeedDifference
    invalid: SeedDifference
    answered: NotRequired[SeedDifference]


class Utility(TypedDict):
    """Over-refusal, and likelihood of benign answers in nats per token."""

    benign_refusal: RefusalScore
    lookalike_refusal: NotRequired[RefusalScore]
    benign_nll: float
    kl_to_base: float
    benign_perplexity: NotRequired[float]
    response_perplexity: NotRequired[float]


class Entanglement(TypedDict):
    """Similarity of every domain's concept to the target's, by measure and layer.

    Figures of the raw cosine have no suffix; see `concepts.entanglement.MEASURES` for the others.
    """

    layers: list[int]
    target: NotRequired[str]
    domains: NotRequired[list[str]]
    outlier_share: NotRequired[ByLayer]
    cosine: ByLayer
    null95: ByLayer
    null_mean: NotRequired[ByLayer]
    ceiling: ByLayer
    disattenuated: NotRequired[ByLayer]
    ci95: NotRequired[LayerIntervals]
    null_interval: NotRequired[LayerIntervals]
    cosine_centred: ByLayer
    null95_centred: NotRequired[ByLayer]
    null_mean_centred: NotRequired[ByLayer]
    ceiling_centred: NotRequired[ByLayer]
    disattenuated_centred: NotRequired[ByLayer]
    ci95_centred: NotRequired[LayerIntervals]
    null_interval_centred: NotRequired[LayerIntervals]
    cosine_own: NotRequired[ByLayer]
    null95_own: NotRequired[ByLayer]
    null_mean_own: NotRequired[ByLayer]
    ceiling_own: NotRequired[ByLayer]
    disattenuated_own: NotRequired[ByLayer]
    ci95_own: NotRequired[LayerIntervals]
    null_interval_own: NotRequired[LayerIntervals]
    cosine_standardised: NotRequired[ByLayer]
    null95_standardised: NotRequired[ByLayer]
    null_mean_standardised: NotRequired[ByLayer]
    ceiling_standardised: NotRequired[ByLayer]
    disattenuated_standardised: NotRequired[ByLayer]
    ci95_standardised: NotRequired[LayerIntervals]
    null_interval_standardised: NotRequired[LayerIntervals]
    probe_transfer: NotRequired[ByLayer]
    null95_probe_transfer: NotRequired[ByLayer]
    null_mean_probe_transfer: NotRequired[ByLayer]
    ceiling_probe_transfer: NotRequired[ByLayer]
    disattenuated_probe_transfer: NotRequired[ByLayer]
    ci95_probe_transfer: NotRequired[LayerIntervals]
    null_interval_probe_transfer: NotRequired[LayerIntervals]
    subspace_overlap: NotRequired[ByLayer]
    null95_subspace_overlap: NotRequired[ByLayer]
    null_mean_subspace_overlap: NotRequired[ByLayer]
    ceiling_subspace_overlap: NotRequired[ByLayer]
    disattenuated_subspace_overlap: NotRequired[ByLayer]
    ci95_subspace_overlap: NotRequired[LayerIntervals]
    null_interval_subspace_overlap: NotRequired[LayerIntervals]
    lexical_baseline: NotRequired[dict[str, ByDomain]]


class Erased(TypedDict):
    """A domain's place in the ranking by erasure."""

    domain: str
    mean: float | None
    ci95: PartialInterval


class RefusalDirection(TypedDict):
    """Changes of the refusal direction: all domains together against the contrast set."""

    erasure: PerLayer
    norm_ratio: PerLayer
    angle_degrees: PerLayer
    probe_auroc: PerLayer


class ConceptChanges(TypedDict):
    """Changes of the concepts: arm → figures, means over seeds."""

    erasure: dict[str, ByLayer]
    norm_ratio: NotRequired[dict[str, ByLayer]]
    angle_degrees: NotRequired[dict[str, ByLayer]]
    probe_auroc: NotRequired[dict[str, ByLayer]]
    refusal_direction: NotRequired[dict[str, RefusalDirection]]
    cka: NotRequired[dict[str, PerLayer]]
    erasure_ranking: NotRequired[dict[str, dict[str, list[Erased]]]]
    patching: NotRequired[dict[str, ByLayer]]


class AblatedEverywhere(TypedDict):
    """Responses with the target's own direction ablated at all layers."""

    direction: str
    layer: int
    refusal: ByDomain
    invalid_rate: float
    shares: NotRequired[dict[str, dict[str, float]]]


class Sweep(TypedDict):
    """Refusal log-odds of the untouched model under steering and ablation, layer by layer."""

    layers: NotRequired[list[int]]  # those that were swept, where not all were
    strengths: list[str]
    directions: list[str]
    prompts_per_domain: int
    refusing_tokens: list[int]
    clean: dict[str, float]
    change: dict[str, dict[str, ByLayer]]  # strength → direction → domain
    ablated_ci95: NotRequired[dict[str, LayerIntervals]]
    """Of `change` under ablation, over prompts: direction → domain → `[low, high]` per layer."""
    ablated_everywhere: NotRequired[AblatedEverywhere]


class JudgesOnRows(TypedDict):
    """Two judges' verdicts on the same rows (`refusal.agreement.Agreement`)."""

    table: list[list[int]]
    labels: list[str]
    total: int
    both_valid: int
    observed: float | None
    kappa: float | None
    ci95: PartialInterval | None


class JudgePair(TypedDict):
    """Agreement of two judges, overall and by domain."""

    judges: list[str]
    overall: JudgesOnRows
    domains: dict[str, JudgesOnRows]


class Validity(TypedDict):
    """Calibration of the screen for off-topic and degenerate responses."""

    weights: list[float]
    topic: Sequence[float | None]
    fluency: Sequence[float | None]
    figures: dict[str, Any]


class RankScore(TypedDict):
    """Rank agreement of a forecast with what was measured."""

    spearman: float | None
    p: float | None
    n: NotRequired[int]
    reason: NotRequired[str]


class PooledScore(TypedDict):
    """Rank agreement within several groups, pooled."""

    spearman: float | None
    p: float | None
    cells: int
    ci95: NotRequired[PartialInterval | None]


class Categories(RankScore):
    """The forecast of sub-categories, `domain/category`."""

    score: dict[str, float]
    drop: ByDomain
    within_domains: PooledScore


class Probe(TypedDict):
    """A linear probe for one domain's concept."""

    accuracy: PerLayer
    auroc: PerLayer


class Forecast(RankScore):
    """Susceptibility of each domain to unlearning the target, scored against the measured EMA."""

    score: dict[str, float]
    lexical_score: NotRequired[dict[str, float] | None]
    category_score: NotRequired[dict[str, float]]
    early_layers: NotRequired[list[int]]
    advice: NotRequired[list[str]]
    retain_shares: NotRequired[dict[str, float]]
    susceptibility: NotRequired[dict[str, dict[str, float]]]
    probes: NotRequired[dict[str, Probe]]
    cka_layers: NotRequired[list[PerLayer]]
    layer_spearman: NotRequired[PerLayer]
    lexical: NotRequired[RankScore | None]
    categories: NotRequired[Categories | None]


class WayOfAsking(TypedDict):
    """Refusal by one way of asking."""

    rate: float | None
    shares: dict[str, float]


class Sensitivity(TypedDict):
    """Lowest and highest refusal rate and shares over the ways of asking."""

    rate: PartialInterval
    shares: dict[str, list[float]]
    ways: dict[str, WayOfAsking]


class Estimate(TypedDict):
    """A figure with its interval."""

    value: float | None
    ci95: PartialInterval


class LabelledShare(TypedDict):
    """The share of responses of one verdict that have one label."""

    n: int
    share: float
    ci95: PartialInterval


class LabelledArm(TypedDict):
    """The judge against a person's labels in one arm."""

    labelled: int
    accuracy: float


class Labels(TypedDict):
    """The judge against a person's labels."""

    labelled: int
    accuracy: Estimate
    kappa: float | None
    sensitivity: Estimate
    specificity: Estimate
    confusion: dict[str, dict[str, LabelledShare]]  # verdict → label
    by_arm: dict[str, LabelledArm]


class CorrectedShare(TypedDict):
    """The refused share, corrected for the judge's errors."""

    apparent: float | None
    share: float | None
    ci95: PartialInterval
    drop: NotRequired[float | None]
    drop_ci95: NotRequired[PartialInterval]


class PromptSet(TypedDict):
    """Numbers of prompts, split → domain, and leakage from those trained on, by domain."""

    counts: dict[str, dict[str, int]]
    leakage: dict[str, Leakage]


class Provenance(TypedDict):
    """Versions, seeds, hashes, devices and times behind the figures."""

    versions: dict[str, str]
    seeds: list[int]
    hashes: dict[str, str]
    devices: str
    wall_seconds: dict[str, float]
    settings: NotRequired[dict[str, Any]]
    """Every field of the config, the arms with what they share filled in."""
    judging: NotRequired[dict[str, Any]]
    command: NotRequired[str | None]
    commit: NotRequired[str | None]
    date: NotRequired[str]


class Claim(TypedDict):
    """The decision on one claim; None: cannot be decided."""

    holds: bool | None
    evidence: list[str]
    by: NotRequired[dict[str, bool | None]]  # refusal, compliance
    rows: NotRequired[dict[str, bool]]
    """Arm, in a replication after its cell → whether a claim on every arm holds there."""
    statement: NotRequired[str]
    rule: NotRequired[str]
    """When it holds, by each measure."""


class BaselineResults(TypedDict):
    """`results.json` of a study that has a baseline and no finished arm.

    With concepts it has the fields of `Results` that are of the base alone.
    """

    schema: Literal[1]
    model: Model
    target: str
    domains: list[str]
    judge: NotRequired[str]
    arms: dict[str, Arm]
    agreement: NotRequired[dict[str, list[JudgePair]]]
    validity: NotRequired[Validity]
    prompts: NotRequired[PromptSet]
    sensitivity: NotRequired[dict[str, dict[str, Sensitivity]]]
    labels: NotRequired[Labels]
    corrected: NotRequired[dict[str, dict[str, CorrectedShare]]]
    warnings: NotRequired[list[str]]
    provenance: Provenance


class Results(BaselineResults, ConceptChanges):
    """`results.json`; most mappings are arm → … or domain → …."""

    ema: dict[str, dict[str, OffTargetChange]]
    on_target: NotRequired[dict[str, TargetChange]]
    containment: dict[str, Containment]
    comparisons: NotRequired[list[Comparison]]
    utility: dict[str, Utility]
    entanglement: Entanglement
    sweep: NotRequired[Sweep | None]
    forecast: Forecast
    claims: NotRequired[dict[str, Claim]]


class ReplicationCell(TypedDict):
    """One study of a replication: seed → domain off target → change, without retain data."""

    cell: str
    family: str
    target: str
    drops: dict[str, ByDomain]
    rises: dict[str, ByDomain]


class ReplicationRow(TypedDict):
    """One arm of one study."""

    cell: str
    family: str
    target: str
    arm: str
    seeds: int
    target_rate: float | None
    target_rate_max: float | None
    target_answered: float | None
    target_answered_min: float | None
    target_right_rate: float | None
    target_damaged: bool | None
    relevance_measured: bool
    invalid_rate: float
    invalid_rate_max: float
    invalid_domain: str
    off_topic_rate: float | None
    degenerate_rate: float | None
    worst_domain: str | None
    worst_drop: float | None
    worst_p_holm: float | None
    spilled_domains: int  # by the rule of R2
    mean_off_target_drop: float | None
    worst_rise_domain: str | None
    worst_rise: float | None
    worst_rise_p_holm: float | None
    spilled_domains_by_compliance: int
    mean_off_target_rise: float | None
    compared_with: str | None
    not_contained: NotRequired[str | None]  # why; "" where it may be containment
    recovered: float | None
    recovered_lo: float | None
    recovered_hi: float | None
    recovered_by_compliance: float | None
    recovered_by_compliance_lo: float | None
    recovered_by_compliance_hi: float | None
    benign_nll: float
    kl_to_base: float
    forecast_spearman: float | None
    forecast_p: float | None


class Replication(TypedDict):
    """`replication.json`, schema 2."""

    schema: Literal[2]
    cells: list[ReplicationCell]
    claims: dict[str, Claim]
    forecast: dict[str, PooledScore]
    rows: list[ReplicationRow]


def json_schema() -> str:
    """The JSON Schema (draft 2020-12) of `Results`, as it is shipped."""
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class Untitled(GenerateJsonSchema):
        """Without a title that repeats each field's name."""

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    made = TypeAdapter(Results).json_schema(schema_generator=Untitled)
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
    return json.dumps(made, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(json_schema(), encoding="utf-8")
