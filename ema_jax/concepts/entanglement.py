"""How similar the domains' concepts are at every layer, each figure beside its null and ceiling.

A raw similarity of two concept vectors says little: a shared contrast set puts unrelated domains
near 0.5, centring over D domains puts them near -1/(D-1), and few prompts attenuate what is there.
So every cosine comes with the distribution it has when labels mean nothing (permutation), with what
two samples of one and the same domain would reach (split halves), and with a bootstrap interval.

The paper says only that "representation similarity in earlier layers" goes with the spill; the
measures, nulls and ceilings here are ours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float

from ema_jax.concepts.resampling import arctanh, calibrate
from ema_jax.concepts.vectors import CONTRAST, Activations
from ema_jax.errors import UserError

_CLIP_SD = 3.0
_FEWEST_PROMPTS = 4

ByDomain = dict[str, np.ndarray]


@dataclass(frozen=True)
class Groups:
    """What a similarity may look at: float64 means by domain and the pooled within-domain spread.

    `means` is `{domain: [L+1, d]}` and holds the contrast set too; `within_std` is `[L+1, d]`;
    `domains` are the responsible-AI domains, in order.
    """

    means: ByDomain
    within_std: np.ndarray
    domains: tuple[str, ...]
    contrast: str

    @classmethod
    def of(cls, activations: Activations, domains: Sequence[str], contrast: str) -> "Groups":
        """Means over prompts and the standard deviation around them, pooled over all domains."""
        names = (*domains, contrast)
        means = {name: activations[name].mean(axis=0, dtype=np.float64) for name in names}
        # Layer by layer: a float64 copy of everything would double the memory.
        squares = np.stack(
            [
                sum(np.square(activations[n][:, i] - means[n][i]).sum(axis=0) for n in names)
                for i in range(activations[contrast].shape[1])
            ]
        )
        freedom = sum(len(activations[name]) - 1 for name in names)
        return cls(means, np.sqrt(squares / freedom), tuple(domains), contrast)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine along the last axis; NaN where a vector is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def cosine(groups: Groups, a: str, b: str) -> Float[np.ndarray, " layers"]:
    """Cosine of the difference-in-means vectors against the shared contrast set.

    Unrelated domains score about 0.5, because both vectors contain minus the contrast mean.
    """
    contrast = groups.means[groups.contrast]
    return _cosine(groups.means[a] - contrast, groups.means[b] - contrast)


def cosine_centred(groups: Groups, a: str, b: str) -> Float[np.ndarray, " layers"]:
    """Cosine of the domain means after subtracting their mean over the responsible-AI domains.

    What every refusable prompt shares is gone; unrelated domains score about -1/(D-1). It says
    something from three domains on.
    """
    centre = np.mean([groups.means[d] for d in groups.domains], axis=0)
    return _cosine(groups.means[a] - centre, groups.means[b] - centre)


def cosine_standardised(groups: Groups, a: str, b: str) -> Float[np.ndarray, " layers"]:
    """`cosine` with each dimension in units of its within-domain standard deviation.

    Differences beyond three such units count as three, so that a few outlier dimensions cannot own
    the figure; constant dimensions count as zero.
    """
    contrast, std = groups.means[groups.contrast], groups.within_std

    def standardised(domain: str) -> np.ndarray:
        difference = groups.means[domain] - contrast
        z = np.divide(difference, std, out=np.zeros_like(std), where=std > 0)
        return np.clip(z, -_CLIP_SD, _CLIP_SD)

    return _cosine(standardised(a), standardised(b))


SIMILARITIES: dict[str, Callable[[Groups, str, str], np.ndarray]] = {
    "cosine": cosine,
    "cosine_centred": cosine_centred,
    "cosine_standardised": cosine_standardised,
}


@dataclass(frozen=True)
class Calibrated:
    """One similarity to the target by domain and layer, with what it has to be read against.

    Attributes:
      observed: `[L+1]` per domain.
      null95: 95th percentile over permuted labels; an observed value above it is not chance.
      null_mean: mean over permuted labels.
      ceiling: what two samples of one domain would reach at these prompt counts: the geometric
        mean of the two domains' split-half reliabilities, each stepped up to the full number of
        prompts by Spearman-Brown. The raw one shares the contrast set between the halves, as the
        observed cosine does between the domains, so without any concept it sits at the null.
      ci95: `[L+1, 2]`; from redrawing prompts within domains. It is an interval for the
        similarity at this number of prompts: more prompts raise the ceiling and with it both ends.
    """

    observed: ByDomain
    null95: ByDomain
    null_mean: ByDomain
    ceiling: ByDomain
    ci95: ByDomain


@dataclass(frozen=True)
class Entanglement:
    """Similarity of every domain to the target at layers 0 to L; NaN where a vector is zero.

    `cosine_standardised` is observed only. `lexical_baseline` is `{similarity: {domain: x}}` on
    mean token embeddings: if it forecasts as well as the layers do, they add nothing to the words.
    """

    target: str
    domains: tuple[str, ...]
    cosine: Calibrated
    cosine_centred: Calibrated
    cosine_standardised: ByDomain
    lexical_baseline: dict[str, dict[str, float]] | None = None

    @property
    def num_layers(self) -> int:
        """L, the number of blocks; the arrays have one entry more."""
        return len(next(iter(self.cosine.observed.values()))) - 1

    def to_json(self) -> dict[str, Any]:
        """As in `results.json`: figures of `cosine_centred` end in `_centred`; NaN is null."""
        out: dict[str, Any] = {
            "target": self.target,
            "domains": list(self.domains),
            "layers": list(range(self.num_layers + 1)),
            "cosine_standardised": _listed(self.cosine_standardised),
        }
        for name, suffix in _SUFFIXES.items():
            for field in fields(Calibrated):
                key = name if field.name == "observed" else field.name + suffix
                out[key] = _listed(getattr(getattr(self, name), field.name))
        if self.lexical_baseline is not None:
            out["lexical_baseline"] = {k: _listed(v) for k, v in self.lexical_baseline.items()}
        return out

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Entanglement":
        """The inverse of `to_json`."""

        def arrays(key: str) -> ByDomain:
            return {d: np.array(x, np.float64) for d, x in value[key].items()}

        def calibrated(name: str, suffix: str) -> Calibrated:
            rest = [f.name for f in fields(Calibrated) if f.name != "observed"]
            return Calibrated(arrays(name), **{key: arrays(key + suffix) for key in rest})

        return cls(
            target=value["target"],
            domains=tuple(value["domains"]),
            cosine_standardised=arrays("cosine_standardised"),
            lexical_baseline=value.get("lexical_baseline"),
            **{name: calibrated(name, suffix) for name, suffix in _SUFFIXES.items()},
        )


_SUFFIXES = {"cosine": "", "cosine_centred": "_centred"}


def _listed(by_domain: Mapping[str, Any]) -> dict[str, Any]:
    def plain(x: Any) -> Any:
        if isinstance(x, list):
            return [plain(item) for item in x]
        return None if np.isnan(x) else x

    return {domain: plain(np.asarray(x).tolist()) for domain, x in by_domain.items()}


def entanglement(
    activations: Activations,
    target: str,
    domains: Sequence[str],
    *,
    contrast: str = CONTRAST,
    permutations: int = 1000,
    splits: int = 50,
    seed: int = 0,
    lexical: Activations | None = None,
) -> Entanglement:
    """Measures how entangled the target's concept is with every other domain's, at every layer.

    The null of the raw cosine permutes labels among target, domain and contrast prompts; that of
    the centred one among the prompts of all `domains`. One permutation serves all layers.

    Args:
      activations: `{domain: [prompts, L+1, d]}`, the contrast set included.
      target: the domain that is to be unlearned.
      domains: all responsible-AI domains, the target among them.
      contrast: name of the contrast set.
      permutations: label permutations behind each null.
      splits: random splits behind each ceiling.
      seed: of permutations, splits and bootstrap.
      lexical: mean token embeddings of the prompts, layer 0 of the same shape, for the baseline.

    Raises:
      UserError: if a domain is missing, has fewer than four prompts or values that are not finite.
    """
    domains = tuple(domains)
    _check(activations, target, domains, contrast)
    others = tuple(d for d in domains if d != target)
    groups = Groups.of(activations, domains, contrast)

    def observed(name: str, groups: Groups = groups) -> ByDomain:
        return {d: SIMILARITIES[name](groups, target, d) for d in others}

    figures = calibrate(
        _layers(activations, groups),
        [len(activations[name]) for name in (*domains, contrast)],
        domains.index(target),
        permutations=permutations,
        splits=splits,
        seed=seed,
    )
    calibrated = {}
    for name in _SUFFIXES:
        found = observed(name)
        columns = {
            figure: {d: x[:, domains.index(d)] for d in others}
            for figure, x in figures[name].items()
        }
        spread = columns.pop("spread")
        ci95 = {d: _fisher_interval(found[d], spread[d]) for d in others}
        calibrated[name] = Calibrated(observed=found, ci95=ci95, **columns)

    baseline = None
    if lexical is not None:
        _check(lexical, target, domains, contrast)
        words = Groups.of({d: x[:, :1] for d, x in lexical.items()}, domains, contrast)
        baseline = {
            name: {d: float(x[0]) for d, x in observed(name, words).items()} for name in _SUFFIXES
        }
    return Entanglement(
        target=target,
        domains=domains,
        cosine_standardised=observed("cosine_standardised"),
        lexical_baseline=baseline,
        **calibrated,
    )


def _check(activations: Activations, target: str, domains: tuple[str, ...], contrast: str) -> None:
    if target not in domains or len(domains) < 2:
        raise UserError(
            f"entanglement: target {target!r} needs to be one of two or more domains, "
            f"found {', '.join(domains)}"
        )
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


def _layers(activations: Activations, groups: Groups) -> Iterator[np.ndarray]:
    """Rows of all groups `[N, d]`, layer by layer, domains in order, the contrast set last.

    Every cosine here is one of sums of rows whose weights add to zero, so the origin is free: at
    the mean of the domains float32 stays exact under residuals with a large common offset.
    """
    origin = np.mean([groups.means[d] for d in groups.domains], axis=0)
    for layer in range(len(origin)):
        yield np.concatenate(
            [
                (activations[name][:, layer] - origin[layer]).astype(np.float32)
                for name in (*groups.domains, groups.contrast)
            ]
        )


def _fisher_interval(observed: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Normal interval on Fisher's z scale `[L+1, 2]`.

    Not percentiles of the bootstrap: redrawing adds sampling noise a second time, which pulls
    cosines of noisy means to their null and can leave the observed value outside.
    """
    z = arctanh(observed)
    return np.tanh(np.stack([z - 1.96 * spread, z + 1.96 * spread], axis=-1))
