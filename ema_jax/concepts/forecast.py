"""Forecast, from the untouched model, of the other domains that an intervention will hit.

Declared before any measurement, so that the score against the measured spill is honest: the
forecast is the centred cosine with the target's concept, averaged over the first third of the
layers, layer 0 left out. The paper says only "earlier layers" and "representation similarity";
both choices are this project's. Centred, because raw cosines share the contrast set
and all that refusable prompts have in common, which leaves them a narrow range far above zero.
Layer 0 is left out because it is lexical: token embeddings, which no context has touched.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ema_jax.concepts.entanglement import Entanglement
from ema_jax.concepts.rank_agreement import centred_ranks
from ema_jax.concepts.vectors import Activations, concept_vectors
from ema_jax.errors import UserError

CATEGORY_PROMPTS = 8  # for its vector, and for its measured drop: fewer are too noisy
_EXACT_UP_TO = 8
_SAMPLED_PERMUTATIONS = 100_000
_RESAMPLES = 10_000
_DIGITS = 9  # of scores and shares that are compared; the rest is rounding


def early_layers(num_layers: int) -> range:
    """Layers 1 to ceil(L/3): 1 to 11 of 32, 1 to 10 of 28."""
    return range(1, math.ceil(num_layers / 3) + 1)


def forecast(entanglement: Entanglement, target: str) -> dict[str, float]:
    """Susceptibility of every other domain: its mean centred cosine over the early layers.

    Only the order of the domains is a claim: the scale is not points of refusal.

    Raises:
      UserError: if the entanglement was measured against another target.
    """
    if entanglement.target != target:
        raise UserError(
            f"forecast: asked for target {target!r}, but the entanglement was measured against "
            f"{entanglement.target!r}: measure it again"
        )
    early = np.array(early_layers(entanglement.num_layers))
    return {d: float(x[early].mean()) for d, x in entanglement.cosine_centred.observed.items()}


def category_forecast(
    activations: Activations,
    categories: Mapping[str, Sequence[str]],
    target: str,
    domains: Sequence[str],
) -> dict[str, float]:
    """`forecast` of the other domains' sub-categories, each with a vector of its own prompts.

    Args:
      activations: `{domain: [prompts, L+1, d]}` with the contrast set.
      categories: of each domain's prompts, in order; empty where there is none.
      target: the domain to be unlearned.
      domains: all of them; their mean vector is the centre, as in the forecast of domains.

    Returns:
      By `domain/category`, of those with `CATEGORY_PROMPTS` prompts or more.
    """
    labels = {d: np.array(categories.get(d, ())) for d in domains if d != target}
    counts = {d: zip(*np.unique(x, return_counts=True), strict=True) for d, x in labels.items()}
    parts = {
        f"{d}/{name}": activations[d][labels[d] == name]
        for d, found in counts.items()
        for name, n in found
        if name and n >= CATEGORY_PROMPTS
    }
    vectors = concept_vectors({**activations, **parts})
    centre = np.mean([vectors[d] for d in domains], axis=0)
    early = np.array(early_layers(len(centre) - 1))
    of_target = (vectors[target] - centre)[early]
    scores = {}
    for name in parts:
        own = (vectors[name] - centre)[early]
        lengths = np.linalg.norm(own, axis=1) * np.linalg.norm(of_target, axis=1)
        scores[name] = float(((own * of_target).sum(1) / np.maximum(lengths, 1e-30)).mean())
    return scores


def layer_profile(
    entanglement: Entanglement, measured_ema: Mapping[str, float | None]
) -> Float[np.ndarray, " layers"]:
    """Spearman correlation of centred cosine and measured EMA at each layer, NaN if undefined.

    To look at, not to choose the best layer from: that would be fitting the claim to the data.
    """
    observed = entanglement.cosine_centred.observed
    layers = range(entanglement.num_layers + 1)
    rho = [
        score({d: float(x[layer]) for d, x in observed.items()}, measured_ema, test=False)
        for layer in layers
    ]
    return np.array([np.nan if r["spearman"] is None else r["spearman"] for r in rho])


def score(
    forecast: Mapping[str, float], measured_ema: Mapping[str, float | None], *, test: bool = True
) -> dict[str, Any]:
    """Rank agreement of forecast and measurement.

    Spearman's correlation with mid-ranks; two-sided permutation p, the share of orderings with a
    correlation at least as far from zero: all n! of them for n <= 8, else 100,000 drawn ones with a
    fixed seed. Domains whose EMA could not be measured (None or NaN) are left out.

    Returns:
      `{"spearman", "p", "n"}`; where the correlation is undefined both are None, and `reason`
      explains it. Without `test`, p is None.

    Raises:
      UserError: if a forecast domain has no measurement.
    """
    missing = [d for d in forecast if d not in measured_ema]
    if missing:
        raise UserError(f"forecast: no measured EMA for {', '.join(missing)}: evaluate them too")
    pairs = [(x, measured_ema[d]) for d, x in forecast.items()]
    usable = np.array(
        [(x, y) for x, y in pairs if y is not None and np.isfinite([x, y]).all()], np.float64
    ).reshape(-1, 2)
    n = len(usable)
    undefined = {"spearman": None, "p": None, "n": n}
    if n < 3:
        return undefined | {"reason": f"{n} domains with forecast and measurement, needs 3"}
    x, y = (_standard_ranks(column) for column in usable.T)
    if x is None or y is None:
        same = "forecasts" if x is None else "measured drops"
        return undefined | {"reason": f"all {same} are equal"}
    rho = float(x @ y)
    return {"spearman": rho, "p": _permutation_p(x, y, rho) if test else None, "n": n}


def pooled_score(
    cells: Sequence[tuple[Mapping[str, float], Mapping[str, float | None]]],
) -> dict[str, Any]:
    """Rank agreement over several studies: the mean Spearman correlation over cells.

    A permutation test over the domains' names: whatever a cell measured stays in that cell, and one
    relabelling serves all cells with domains in common. Cells that differ in model or target alone
    mostly see the same domains spill, so they are no independent evidence. One-sided, in the
    direction of the claim; 100,000 draws with a fixed seed.

    Args:
      cells: a forecast and the measured EMA of each.

    Returns:
      `{"spearman", "p", "cells"}`; None for the first two where no cell can be scored.
    """
    ranks = []
    for forecast, measured in cells:
        known = [d for d in forecast if measured.get(d) is not None]
        values = np.array([(forecast[d], measured[d]) for d in known], np.float64).reshape(-1, 2)
        x, y = (_standard_ranks(column) for column in values.T) if len(known) > 2 else (None, None)
        if x is not None and y is not None:
            ranks.append((known, x, y))
    if not ranks:
        return {"spearman": None, "p": None, "cells": 0}
    observed = float(np.mean([x @ y for _, x, y in ranks]))
    rng = np.random.default_rng(0)
    drawn = np.zeros(_SAMPLED_PERMUTATIONS)
    for names in _connected([known for known, *_ in ranks]):
        relabelled = rng.permuted(np.tile(np.arange(len(names)), (len(drawn), 1)), axis=1)
        place = {name: i for i, name in enumerate(names)}
        for known, x, y in ranks:
            if known[0] in place:
                drawn += y[_induced(relabelled, [place[d] for d in known])] @ x / len(ranks)
    extreme = int((drawn >= observed - 1e-12).sum())
    p = (1 + extreme) / (1 + _SAMPLED_PERMUTATIONS)
    return {"spearman": observed, "p": p, "cells": len(ranks)}


def _connected(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """The names of cells that have some in common, directly or through other cells."""
    found: list[dict[str, None]] = []  # ordered sets
    for names in cells:
        met = [group for group in found if not group.keys().isdisjoint(names)]
        rest = [group for group in found if group.keys().isdisjoint(names)]
        found = [*rest, dict.fromkeys(itertools.chain(*met, names))]
    return [list(group) for group in found]


def _induced(order: Int[np.ndarray, "R n"], members: Sequence[int]) -> Int[np.ndarray, "R m"]:
    """Permutations of n names on some of them: each goes to the next of these along its cycle.

    Of uniform permutations these are uniform; of all names they are the permutations themselves.

    Returns:
      Indices into `members`.
    """
    position = np.full(order.shape[1], -1)
    position[list(members)] = np.arange(len(members))
    reached = order[:, list(members)]
    while (outside := position[reached] < 0).any():
        reached = np.where(outside, np.take_along_axis(order, reached, axis=1), reached)
    return position[reached]


def pooled_interval(
    cells: Sequence[tuple[Mapping[str, float], Sequence[Mapping[str, float | None]]]],
) -> list[float] | None:
    """95 % percentile bootstrap interval of `pooled_score`'s correlation over seeds.

    Each cell's seeds are redrawn 10,000 times and their measurements averaged. The interval covers
    another set of seeds, not other domains, models or prompts.

    Args:
      cells: a forecast and the measured EMA of every seed of each.

    Returns:
      None with fewer than two seeds, or where no cell can be scored.
    """
    rng, drawn = np.random.default_rng(0), []
    for forecast, runs in cells:
        known = [d for d in forecast if runs and all(run.get(d) is not None for run in runs)]
        x = _standard_ranks(np.array([forecast[d] for d in known])) if len(known) > 2 else None
        if x is None:
            continue
        if len(runs) < 2:
            return None
        measured = np.array([[run[d] for d in known] for run in runs], np.float64)
        mean = measured[rng.integers(0, len(runs), (_RESAMPLES, len(runs)))].mean(1)
        ranks = centred_ranks(mean)
        length = np.linalg.norm(ranks, axis=1)
        # All equal: no order, which is no agreement.
        drawn.append(ranks @ x / np.where(length > 0, length, 1))
    if not drawn:
        return None
    return [float(q) for q in np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))]


def _standard_ranks(values: np.ndarray) -> np.ndarray | None:
    """Mid-ranks, centred, of unit length; None for a constant."""
    ranks = centred_ranks(values)
    length = np.linalg.norm(ranks)
    return ranks / length if length > 0 else None


def _permutation_p(x: np.ndarray, y: np.ndarray, rho: float) -> float:
    n = len(x)
    # Equal correlations differ in their last bits with the order of summation.
    extreme = abs(rho) - 1e-12
    if n <= _EXACT_UP_TO:
        orders = np.array(list(itertools.permutations(range(n))))
        return float((np.abs(y[orders] @ x) >= extreme).mean())
    rng = np.random.default_rng(0)
    drawn = rng.permuted(np.tile(y, (_SAMPLED_PERMUTATIONS, 1)), axis=1) @ x
    return float((1 + (np.abs(drawn) >= extreme).sum()) / (1 + _SAMPLED_PERMUTATIONS))


def advice(forecast: Mapping[str, float], k: int = 2) -> list[str]:
    """The k domains forecast to be hit hardest: add retain data for these first."""
    return sorted(forecast, key=lambda d: (-round(forecast[d], _DIGITS), d))[:k]


def retain_shares(forecast: Mapping[str, float]) -> dict[str, float]:
    """Shares of a budget of retain examples that the domains should have; they add to one.

    Half of the budget is even, for the forecast may be wrong; the other half goes by how far a
    domain's score is above the lowest.
    """
    lowest = min(forecast.values())
    above = {d: x - lowest for d, x in forecast.items()}
    total = sum(above.values())
    even = 1 / len(forecast)
    return {d: (even + (x / total if total > 0 else even)) / 2 for d, x in above.items()}


def retain_counts(forecast: Mapping[str, float], budget: int) -> dict[str, int]:
    """`retain_shares` of a budget in numbers of examples (largest remainders), at least one each.

    Raises:
      UserError: fewer examples than domains.
    """
    if budget < len(forecast):
        raise UserError(
            f"retain budget: {budget} examples for {len(forecast)} domains: needs one each"
        )
    # One each first, so that no share is rounded to nothing.
    left = budget - len(forecast)
    exact = {d: share * left for d, share in retain_shares(forecast).items()}
    counts = {d: 1 + math.floor(x) for d, x in exact.items()}
    missing = budget - sum(counts.values())
    for d in sorted(exact, key=lambda d: (round(counts[d] - exact[d], _DIGITS), d))[:missing]:
        counts[d] += 1
    return counts
