"""Summaries of a study's concept measurements: from activations and models to figures.

The step between `concepts`, which knows arrays, and the stages, which know files. All results are
ready for JSON; undefined figures are None.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from ema_jax.concepts.cka import cka, cka_layers
from ema_jax.concepts.entanglement import all_pairs
from ema_jax.concepts.erasure import angle_degrees, erasure, norm_ratio, probe_auroc, ranking
from ema_jax.concepts.forecast import (
    advice,
    category_forecast,
    early_layers,
    forecast,
    retain_shares,
)
from ema_jax.concepts.interventions import (
    ABLATED,
    ablation,
    grid,
    intervene,
    patch,
    random_like,
    sweep,
)
from ema_jax.concepts.probes import logistic_probe
from ema_jax.concepts.vectors import Activations, LayerVectors, concept_vectors, sample
from ema_jax.config import ConceptConfig
from ema_jax.data.domains import BENIGN
from ema_jax.models.decoder import Decoder
from ema_jax.refusal.responses import JudgedResponses
from ema_jax.refusal.verdicts import COMPLIED, REFUSED
from ema_jax.runtime.files import json_safe
from ema_jax.study.sweep_cost import layers_to_sweep

RANDOM = "random"
_REFUSAL = "refusal"
_SHARE_OF_OPENINGS = 0.01

Prompts = Mapping[str, Sequence[Sequence[int]]]


def refusal_openers(judged: JudgedResponses) -> list[int]:
    """Ids of first tokens that open this model's refusals rather than its answers.

    Of all tokens that open at least one refusal in a hundred, those that open more refusals than
    answers.
    """
    counts: dict[str, Counter[int]] = {REFUSED: Counter(), COMPLIED: Counter()}
    for _, response, verdict in judged:
        if verdict.verdict in counts and response.tokens:
            counts[verdict.verdict][int(response.tokens[0])] += 1
    refusals = counts[REFUSED]
    enough = _SHARE_OF_OPENINGS * sum(refusals.values())
    return sorted(t for t, n in refusals.items() if n >= enough and n > counts[COMPLIED][t])


def forecast_summary(
    activations: Activations,
    lexical: Activations | None,
    target: str,
    domains: Sequence[str],
    settings: ConceptConfig,
    categories: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Entanglement and the forecast of the spill, from the base's activations alone.

    Of many prompts, all but the forecast of sub-categories is from a `sample`.

    Args:
        activations: `{domain: [prompts, L+1, d]}` with the contrast set.
        lexical: the same under mean pooling, of which layer 0 is bags of embeddings.
        target: the domain to be unlearned.
        domains: all of them.
        settings: numbers of resamplings.
        categories: sub-categories of the domains' prompts, in order.
    """
    chosen = sample(activations)
    pairs = all_pairs(
        chosen,
        domains,
        permutations=settings.permutations,
        splits=settings.splits,
        lexical=None if lexical is None else sample({d: x[:, :1] for d, x in lexical.items()}),
    )
    measured = pairs.towards(target)
    scores = forecast(measured, target)
    probes = {d: logistic_probe(chosen, d) for d in domains}
    pooled = np.concatenate([chosen[d] for d in (*domains, BENIGN)])
    words = measured.lexical_baseline
    return {
        "entanglement": measured.to_json(),
        "score": scores,
        "lexical_score": None if words is None else json_safe(words["cosine_centred"]),
        "category_score": category_forecast(activations, categories, target, domains),
        "early_layers": list(early_layers(measured.num_layers)),
        "advice": advice(scores),
        "retain_shares": retain_shares(scores),
        "susceptibility": {t: json_safe(forecast(pairs.towards(t), t)) for t in domains},
        "probes": {
            d: json_safe({"accuracy": probe.accuracy, "auroc": probe.auroc})
            for d, probe in probes.items()
        },
        "cka_layers": json_safe(cka_layers(pooled)),
    }


def layer_sweep_summary(
    model: Decoder,
    vectors: LayerVectors,
    prompts: Prompts,
    refusing: Sequence[int],
    strengths: Sequence[float],
    *,
    most_layers: int,
    batch_size: int,
    mesh: Mesh,
) -> dict[str, Any]:
    """Change of refusal on every domain's prompts when a concept is added or ablated at one layer.

    Args:
        model: the untouched one.
        vectors: `{domain: [L+1, d]}`; a random direction of their mean length is added.
        prompts: token ids by domain, the contrast set among them.
        refusing: ids of tokens that open a refusal.
        strengths: multiples of the vectors to add; ablation is always among the interventions.
        most_layers: see `layers_to_sweep`.
        batch_size: sequences at once.
        mesh: devices of the model.

    Returns:
        Mean refusal log-odds in nats: `clean` by domain, and its `change` by strength, direction
        and domain of the prompts, `[L+1]`; None at layers that are not among `layers`, if that is
        there. `ablated_ci95`, intervals of the change under ablation (the last strength) over
        prompts.
    """
    lengths = [np.linalg.norm(v, axis=1, keepdims=True) for v in vectors.values()]
    drawn = random_like(next(iter(vectors.values())))
    drawn *= np.mean(lengths, axis=0) / np.maximum(lengths[0], 1e-30)
    directions = {**vectors, RANDOM: drawn}
    wanted = grid(directions, strengths)
    pooled = [ids for each in prompts.values() for ids in each]
    layers = layers_to_sweep(
        model.config,
        len(wanted.directions) * len(wanted.strengths),
        [len(ids) for ids in pooled],
        mesh,
        most_layers,
    )
    found = sweep(
        model,
        pooled,
        wanted.candidates,
        refusing,
        layers=layers,
        batch_size=batch_size,
        mesh=mesh,
    )
    change = wanted.unflatten(found.changed - found.clean)
    rows = np.split(np.arange(len(pooled)), np.cumsum([len(x) for x in prompts.values()])[:-1])
    rows_of = dict(zip(prompts, rows, strict=True))
    return {
        **({"layers": layers} if len(layers) <= model.config.num_layers else {}),
        "strengths": [str(s) for s in wanted.strengths],
        "directions": list(wanted.directions),
        "prompts_per_domain": min(len(x) for x in prompts.values()),
        "refusing_tokens": list(refusing),
        "clean": {d: float(found.clean[rows].mean()) for d, rows in rows_of.items()},
        "change": {
            str(strength): {
                direction: {
                    d: json_safe(change[:, i, j, rows].mean(axis=-1, dtype=np.float64))
                    for d, rows in rows_of.items()
                }
                for i, direction in enumerate(wanted.directions)
            }
            for j, strength in enumerate(wanted.strengths)
        },
        "ablated_ci95": {
            direction: {
                d: json_safe(_mean_interval(change[:, i, -1, rows])) for d, rows in rows_of.items()
            }
            for i, direction in enumerate(wanted.directions)
        },
    }


def _mean_interval(x: Float[np.ndarray, "L1 N"]) -> Float[np.ndarray, "L1 2"]:
    """Student's 95 % interval of the mean over prompts at every layer; NaN of one prompt."""
    from scipy import stats

    n = x.shape[1]
    if n < 2:
        return np.full((len(x), 2), np.nan)
    mean = x.mean(axis=1, dtype=np.float64)
    half = stats.t.ppf(0.975, n - 1) * x.std(axis=1, ddof=1, dtype=np.float64) / np.sqrt(n)
    return np.stack([mean - half, mean + half], axis=1)


def most_refusing_layer(found: Mapping[str, Any], domain: str) -> int:
    """Layer at which ablating a domain's own direction lowers refusal of its own prompts most.

    Of the first four fifths of the layers, as in Arditi et al. (2024): the last directions are next
    to the logits, and ablating them edits the first token and not the concept.
    """
    changes = np.array(found["change"][ABLATED][domain][domain], float)  # NaN for None
    return int(np.nanargmin(changes[: math.ceil(0.8 * (len(changes) - 1))]))


def ablated_model(model: Decoder, vector: Float[np.ndarray, "L1 D"], layer: int) -> Decoder:
    """The model with one layer's direction ablated at all layers (Arditi et al., 2024)."""
    return intervene(model, ablation(np.tile(vector[layer], (len(vector), 1))))


def patching_summary(
    base: Decoder,
    unlearned: Decoder,
    prompts: Prompts,
    refusing: Sequence[int],
    *,
    batch_size: int,
    mesh: Mesh,
) -> dict[str, list[float]]:
    """Mean refusal log-odds by domain `[L+1]`: the base up to layer l, the unlearned model above.

    From the unlearned model's own (l = 0) to the base's (l = L): where it rises, unlearning acts.
    """
    return {
        d: json_safe(
            patch(base, unlearned, ids, refusing, batch_size=batch_size, mesh=mesh).mean(
                axis=1, dtype=np.float64
            )
        )
        for d, ids in prompts.items()
    }


def concept_drift(base: Activations, arm: Activations, domains: Sequence[str]) -> dict[str, Any]:
    """Differences of a model's concepts from the base's on the same prompts.

    Vectors are of all prompts, probes, CKA and intervals of a `sample`.

    Returns:
        By domain and, as `refusal`, for all domains together against the contrast set (the refusal
        direction): `erasure`, `norm_ratio`, `angle_degrees` and `probe_auroc`, `[L+1]` each; `cka`
        over all prompts `[L+1]`; and the domains by erasure, with 95 % intervals.
    """
    vectors = [{**concept_vectors(x, BENIGN), _REFUSAL: _together(x, domains)} for x in (base, arm)]
    erased = erasure(*vectors)
    base, arm = sample(base), sample(arm)
    ranked = ranking({d: erased[d] for d in domains}, base, arm, BENIGN)
    names = (*domains, _REFUSAL)
    aurocs: dict[str, list[float]] = {d: [] for d in names}
    similar: list[float] = []
    for layer in range(base[BENIGN].shape[1]):
        # A layer at a time: joined, all of them would be gigabytes once more.
        pair = [{d: x[:, layer : layer + 1] for d, x in each.items()} for each in (base, arm)]
        similar.extend(cka(*(np.concatenate([x[d] for d in (*domains, BENIGN)]) for x in pair)))
        for each in pair:
            each[_REFUSAL] = np.concatenate([each[d] for d in domains])
        for d in names:
            aurocs[d].extend(probe_auroc(pair[0], pair[1], d))
    return json_safe(
        {
            "erasure": erased,
            "norm_ratio": norm_ratio(*vectors),
            "angle_degrees": angle_degrees(*vectors),
            "probe_auroc": aurocs,
            "cka": similar,
            "ranking": [row._asdict() for row in ranked],
        }
    )


def _together(activations: Activations, domains: Sequence[str]) -> Float[np.ndarray, "L1 D"]:
    """Mean over the prompts of all domains minus the mean over the contrast set."""
    sizes = [len(activations[d]) for d in domains]
    means = [activations[d].mean(axis=0, dtype=np.float64) for d in domains]
    mean = np.average(means, axis=0, weights=sizes)
    return (mean - activations[BENIGN].mean(axis=0, dtype=np.float64)).astype(np.float32)
