"""Similarity of the domains' concepts at every layer, with its null and its ceiling.

A raw similarity of two concept vectors means little: a shared contrast set puts unrelated domains
near 0.5, centring over D domains puts them near -1/(D-1), and few prompts attenuate what is there.
So every figure comes with the distribution it has when labels mean nothing (permutation), with what
two samples of one and the same domain would reach (split halves), with the share of that ceiling,
and with a bootstrap interval.

The paper says only that "representation similarity in earlier layers" goes with the spill; the
measures, nulls and ceilings are this project's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ema_jax.concepts.resampling import PairFigures, calibrate
from ema_jax.concepts.subspaces import subspaces
from ema_jax.concepts.transfer import probe_transfer
from ema_jax.concepts.vectors import Activations, matched_contrast
from ema_jax.data.domains import BENIGN
from ema_jax.errors import UserError
from ema_jax.runtime.files import json_safe

if TYPE_CHECKING:
    from pandas import DataFrame

_CLIP_SD = 3.0
_FEWEST_PROMPTS = 4

ByDomain = dict[str, np.ndarray]

# Measure -> suffix of its figures in JSON, and the kind of vectors its cosine is taken of.
_COSINES = {
    "cosine": ("", "raw"),
    "cosine_centred": ("_centred", "centred"),
    "cosine_own": ("_own", "own"),
    "cosine_standardised": ("_standardised", "raw"),
}
_SUFFIXES = {name: suffix for name, (suffix, _) in _COSINES.items()}
_SUFFIXES |= {"probe_transfer": "_probe_transfer", "subspace_overlap": "_subspace_overlap"}

MEASURES = tuple(_SUFFIXES)
"""The similarity measures.

`cosine`: of difference-in-means vectors against the shared contrast set; unrelated domains score
about 0.5, because both vectors contain minus its mean.
`cosine_centred`: of domain means less their mean over the domains, so that what every refusable
prompt shares is gone; unrelated domains score about -1/(D-1); it needs three
domains or more.
`cosine_own`: against contrast prompts of the domain's own (`vectors.matched_contrast`), so that
unrelated domains score about 0.
`cosine_standardised`: `cosine` on activations in units of each dimension's within-domain standard
deviation and clipped at three of them, so that no outlier dimension dominates.
`probe_transfer`: see `transfer.probe_transfer`.
`subspace_overlap`: see `subspaces.subspaces`.
"""


@dataclass(frozen=True)
class Calibrated:
    """One similarity to the target by domain and layer, with null, ceiling and interval.

    Attributes:
      observed: `[L+1]` per domain.
      null95: 95th percentile over permuted labels; an observed value above it is not chance.
      null_mean: mean over permuted labels.
      ceiling: what two samples of one domain would reach at these prompt counts: the geometric
        mean of the two domains' split-half reliabilities, each stepped up to the full number of
        prompts by Spearman-Brown. The raw one shares the contrast set between the halves, as the
        observed cosine does between the domains, so without any concept it sits at the null.
      disattenuated: observed over ceiling.
      ci95: `[L+1, 2]`; from redrawing prompts within domains. It is an interval for the
        similarity at this number of prompts: more prompts raise the ceiling and with it both ends.
      null_interval: `[L+1, 2]`, the central 95 % over permuted labels; empty in figures that were
        made before there was one.
    """

    observed: ByDomain
    null95: ByDomain
    null_mean: ByDomain
    ceiling: ByDomain
    disattenuated: ByDomain
    ci95: ByDomain
    null_interval: ByDomain = field(default_factory=dict)


@dataclass(frozen=True)
class Entanglement:
    """Similarity of every domain to the target at layers 0 to L; NaN where a vector is zero.

    Attributes:
      target: the domain that is to be unlearned.
      domains: all of them.
      measures: of `MEASURES`.
      outlier_share: `[L+1]` per domain, the target too: share of the squared length of the raw
        vector that its largest dimension has.
      lexical_baseline: `{similarity: {domain: x}}` on mean token embeddings: if it forecasts as
        well as the layers do, they add nothing to the words.
    """

    target: str
    domains: tuple[str, ...]
    measures: dict[str, Calibrated]
    outlier_share: ByDomain
    lexical_baseline: dict[str, dict[str, float]] | None = None

    @property
    def cosine(self) -> Calibrated:
        """The raw one."""
        return self.measures["cosine"]

    @property
    def cosine_centred(self) -> Calibrated:
        """The one that the forecast reads."""
        return self.measures["cosine_centred"]

    @property
    def num_layers(self) -> int:
        """L, the number of blocks; the arrays have one entry more."""
        first = next(iter(self.measures.values()))
        return len(next(iter(first.observed.values()))) - 1

    def __repr__(self) -> str:
        others = ", ".join(d for d in self.domains if d != self.target)
        return (
            f"Entanglement({self.target} with {others}; layers 0 to {self.num_layers}; "
            f"{', '.join(self.measures)})"
        )

    def to_frame(self) -> "DataFrame":
        """One row a measure, domain and layer, with its null, ceiling and interval."""
        from pandas import DataFrame  # slow to import, and no study needs it

        return DataFrame(
            [
                {
                    "measure": measure,
                    "domain": domain,
                    "layer": layer,
                    "observed": x,
                    "null95": found.null95[domain][layer],
                    "ceiling": found.ceiling[domain][layer],
                    "low": found.ci95[domain][layer, 0],
                    "high": found.ci95[domain][layer, 1],
                }
                for measure, found in self.measures.items()
                for domain, values in found.observed.items()
                for layer, x in enumerate(values)
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """As in `results.json`: figures of `cosine_centred` end in `_centred`; NaN is null."""
        out: dict[str, Any] = {
            "target": self.target,
            "domains": list(self.domains),
            "layers": list(range(self.num_layers + 1)),
            "outlier_share": json_safe(self.outlier_share),
        }
        for name, calibrated in self.measures.items():
            for each in fields(Calibrated):
                key = name if each.name == "observed" else each.name + _SUFFIXES[name]
                out[key] = json_safe(getattr(calibrated, each.name))
        if self.lexical_baseline is not None:
            out["lexical_baseline"] = json_safe(self.lexical_baseline)
        return out

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Entanglement":
        """The inverse of `to_json`."""

        def arrays(key: str) -> ByDomain:
            return {d: np.array(x, np.float64) for d, x in value.get(key, {}).items()}

        def calibrated(name: str) -> Calibrated:
            rest = [f.name for f in fields(Calibrated) if f.name != "observed"]
            return Calibrated(arrays(name), **{key: arrays(key + _SUFFIXES[name]) for key in rest})

        return cls(
            target=value["target"],
            domains=tuple(value["domains"]),
            measures={name: calibrated(name) for name in MEASURES if name in value},
            outlier_share=arrays("outlier_share"),
            lexical_baseline=value.get("lexical_baseline"),
        )


class Pairs(NamedTuple):
    """Entanglement of every domain with every other: `[L+1, D, D]` a figure."""

    domains: tuple[str, ...]
    measures: dict[str, PairFigures]
    outlier_share: Float[np.ndarray, "L1 D"]
    lexical: dict[str, PairFigures] | None

    def __repr__(self) -> str:
        return f"Pairs({', '.join(self.domains)}; {', '.join(self.measures)})"

    def towards(self, target: str) -> Entanglement:
        """The rows of one target."""
        t = self.domains.index(target)
        others = {d: i for i, d in enumerate(self.domains) if i != t}

        def of(found: PairFigures) -> Calibrated:
            return Calibrated(
                **{
                    figure: {d: x[:, t, i] for d, i in others.items()}
                    for figure, x in found._asdict().items()
                }
            )

        baseline = None
        if self.lexical is not None:
            baseline = {
                name: {d: float(x.observed[0, t, i]) for d, i in others.items()}
                for name, x in self.lexical.items()
            }
        share = {d: self.outlier_share[:, i] for i, d in enumerate(self.domains)}
        measures = {name: of(found) for name, found in self.measures.items()}
        return Entanglement(target, self.domains, measures, share, baseline)


def all_pairs(
    activations: Activations,
    domains: Sequence[str],
    *,
    contrast: str = BENIGN,
    measures: Sequence[str] = MEASURES,
    permutations: int = 1000,
    splits: int = 50,
    bootstraps: int = 400,
    seed: int = 0,
    lexical: Mapping[str, Float[np.ndarray, "_ _ width"]] | None = None,
) -> Pairs:
    """Measures how entangled the concepts of all domains are, at every layer.

    The null of a raw cosine permutes labels among the prompts of the two domains and of the
    contrast set; that of the centred one among the prompts of all domains. One permutation serves
    all layers.

    Args:
      activations: `{domain: [prompts, L+1, d]}`, the contrast set included.
      domains: all responsible-AI domains.
      contrast: name of the contrast set.
      measures: of `MEASURES`.
      permutations: label permutations behind each null.
      splits: random splits behind each ceiling.
      bootstraps: redrawings behind each interval.
      seed: of permutations, splits and bootstrap.
      lexical: mean token embeddings of the prompts, layer 0 of the same shape, for the baseline;
        they also match contrast prompts to domains, which are otherwise assigned in order.

    Raises:
      UserError: if a domain is missing, has fewer than four prompts or values that are not finite.
    """
    domains = tuple(domains)
    _check(activations, domains, contrast)
    if lexical is not None:
        _check(lexical, domains, contrast)
    names = (*domains, contrast)
    # Never matched by what is measured: that would make domains and their contrasts alike.
    words = {d: np.zeros((len(activations[d]), 1)) for d in names}
    words = words if lexical is None else {d: lexical[d][:, 0] for d in names}
    order, parts = matched_contrast(words, domains, contrast)
    activations = {**activations, contrast: activations[contrast][order]}
    sizes = (*(len(activations[d]) for d in domains), *parts)
    trio = (*sizes[: len(domains)], sum(parts))
    draws = {"permutations": permutations, "splits": splits, "bootstraps": bootstraps, "seed": seed}
    found: dict[str, PairFigures] = {}

    plain = [name for name in measures if name in _COSINES and name != "cosine_standardised"]
    if plain:
        kinds = {name: _COSINES[name][1] for name in plain}
        made = calibrate(_layers(activations, names), sizes, list(kinds.values()), **draws)
        found |= {name: made[kind] for name, kind in kinds.items()}
    if "cosine_standardised" in measures:
        scaled = (_standardised(x, trio) for x in _layers(activations, names))
        found["cosine_standardised"] = calibrate(scaled, sizes, ["raw"], **draws)["raw"]
    if "probe_transfer" in measures:
        found["probe_transfer"] = probe_transfer(_layers(activations, names), trio, **draws)
    if "subspace_overlap" in measures:
        few = {"splits": splits, "bootstraps": min(bootstraps, 100), "seed": seed}
        found["subspace_overlap"] = subspaces(_layers(activations, names), trio, **few)

    baseline = None
    if lexical is not None:
        rows = _layers(
            {d: lexical[d][order if d == contrast else slice(None), :1] for d in names}, names
        )
        made = calibrate(rows, sizes, ["raw", "centred"], **draws)
        baseline = {"cosine": made["raw"], "cosine_centred": made["centred"]}
    share = np.stack([_outlier_share(activations, d, contrast) for d in domains], axis=1)
    return Pairs(domains, {name: found[name] for name in measures}, share, baseline)


def entanglement(
    activations: Activations, target: str, domains: Sequence[str], **settings: Any
) -> Entanglement:
    """Measures how entangled the target's concept is with every other domain's, at every layer.

    Args:
      activations: `{domain: [prompts, L+1, d]}`, the contrast set included.
      target: the domain that is to be unlearned.
      domains: all responsible-AI domains, the target among them.
      **settings: of `all_pairs`.

    Raises:
      UserError: as `all_pairs`, or the target is none of the domains.
    """
    if target not in domains or len(domains) < 2:
        raise UserError(
            f"entanglement: target {target!r} needs to be one of two or more domains, "
            f"found {', '.join(domains)}"
        )
    return all_pairs(activations, domains, **settings).towards(target)


def _check(activations: Activations, domains: tuple[str, ...], contrast: str) -> None:
    for name in (*domains, contrast):
        if name not in activations:
            raise UserError(f"entanglement: no activations for {name!r}: capture it too")
        if len(activations[name]) < _FEWEST_PROMPTS:
            raise UserError(
                f"entanglement: {name!r} has {len(activations[name])} prompts, "
                f"needs at least {_FEWEST_PROMPTS}: add prompts or drop the domain"
            )
        if not np.isfinite(activations[name]).all():
            raise UserError(
                f"entanglement: activations of {name!r} hold NaN or infinity: "
                "capture them in float32 or bfloat16"
            )


def _layers(activations: Activations, names: Sequence[str]) -> Iterator[np.ndarray]:
    """Rows of all groups `[N, d]`, layer by layer, domains in order, the contrast set last.

    Every cosine here is one of sums of rows whose weights add to zero, so the origin is free: at
    the mean of the domains float32 stays exact under residuals with a large common offset.
    """
    domains = names[:-1]
    for layer in range(activations[names[0]].shape[1]):
        rows = [activations[name][:, layer] for name in names]
        origin = np.mean([x.mean(axis=0, dtype=np.float64) for x in rows[: len(domains)]], axis=0)
        yield np.concatenate([(x - origin).astype(np.float32) for x in rows])


def _standardised(rows: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Rows in units of the within-group standard deviation of each dimension, clipped.

    Constant dimensions count as zero.
    """
    groups = np.split(rows, np.cumsum(sizes)[:-1])
    squares = sum(np.square(x - x.mean(axis=0, dtype=np.float64)).sum(axis=0) for x in groups)
    std = np.sqrt(squares / (len(rows) - len(groups)))
    z = np.divide(rows, std, out=np.zeros(rows.shape), where=std > 0)
    return np.clip(z, -_CLIP_SD, _CLIP_SD).astype(np.float32)


def _outlier_share(
    activations: Activations, domain: str, contrast: str
) -> Float[np.ndarray, " layers"]:
    means = (activations[name].mean(axis=0, dtype=np.float64) for name in (domain, contrast))
    squares = np.square(np.subtract(*means))
    with np.errstate(invalid="ignore"):
        return squares.max(axis=-1) / squares.sum(axis=-1)
