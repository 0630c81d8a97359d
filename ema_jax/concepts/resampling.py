"""Cosines of group means under regrouped prompts: permutation nulls, split halves, bootstrap.

Group means enter a cosine only through inner products of prompts. So each layer is reduced once to
its N×N Gram matrix, and a regrouping costs O(groups · N²) whatever the width of the model, or
O(N²) where prompts stay in their groups. All pairs of domains come out of the same draws.

Rows are in the order of D domains and then of the contrast set, which is in D parts, one that goes
with each domain: groups 0 to D - 1 and D to 2D - 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

# Weights held on the device at once, in float32 elements (64 MiB).
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Regroupings:
    """R ways to put rows into groups, and the vectors formed from the group means.

    Attributes:
      rows: `[n]`, which of the N rows take part.
      labels: `[R, n]`, the group of each.
      counts: `[R, n]`, how often each one counts.
      contrasts: `[vectors, groups]`; weights of the group means, each row adding to zero.
    """

    rows: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    contrasts: np.ndarray

    def padded(self, number: int) -> "Regroupings":
        """With so many rows, of which those added count nothing: one program for all alike."""
        more = number - len(self.rows)
        return Regroupings(
            np.pad(self.rows, (0, more)),
            np.pad(self.labels, ((0, 0), (0, more))),
            np.pad(self.counts, ((0, 0), (0, more))),
            self.contrasts,
        )

    def cosines(self, gram: Float[jax.Array, "N N"]) -> Float[np.ndarray, "R vectors vectors"]:
        """Cosines between all vectors under every regrouping; NaN where a vector is zero."""
        chunk = _CHUNK_ELEMENTS // (self.labels.shape[1] * self.contrasts.shape[1])
        return np.asarray(
            _regrouped_cosines(
                gram,
                self.rows,
                self.labels.astype(np.int32),
                self.counts.astype(np.float32),
                self.contrasts.astype(np.float32),
                chunk=max(1, min(len(self.labels), chunk)),
            )
        )


@partial(jax.jit, static_argnames="chunk")
def _regrouped_cosines(
    gram: Float[jax.Array, "N N"],
    rows: Int[jax.Array, "n"],
    labels: Int[jax.Array, "R n"],
    counts: Float[jax.Array, "R n"],
    contrasts: Float[jax.Array, "v g"],
    chunk: int,
) -> Float[jax.Array, "R v v"]:
    groups = jnp.arange(contrasts.shape[1])
    inside = gram[rows][:, rows]

    def one(regrouping: tuple[jax.Array, jax.Array]) -> jax.Array:
        label, count = regrouping
        weights = jnp.where(label == groups[:, None], count, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
        inner = contrasts @ (weights @ inside @ weights.T) @ contrasts.T
        norms = jnp.sqrt(jnp.diagonal(inner))
        return inner / jnp.outer(norms, norms)

    # On accelerators the default precision of a float32 product is far below float32.
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(one, (labels, counts), batch_size=chunk)


@jax.jit
def gram_matrix(x: Float[jax.Array, "N d"]) -> Float[jax.Array, "N N"]:
    """Inner products of all rows."""
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)


def raw_contrasts(D: int) -> Float[np.ndarray, "D D+1"]:
    """Each of D domains minus the contrast set, which is the last group."""
    return np.hstack([np.eye(D), -np.ones((D, 1))])


def centred_contrasts(D: int) -> Float[np.ndarray, "D D+1"]:
    """Each of D domains minus the mean of all of them; the contrast set plays no part."""
    return np.hstack([np.eye(D) - 1 / D, np.zeros((D, 1))])


def permutations_of(
    rng: np.random.Generator,
    repeats: int,
    rows: np.ndarray,
    labels: np.ndarray,
    contrasts: np.ndarray,
) -> Regroupings:
    """Labels `[n]` of `rows` shuffled among themselves: the null of exchangeable prompts."""
    shuffled = rng.permuted(np.tile(labels, (repeats, 1)), axis=1)
    return Regroupings(rows, shuffled, np.ones(shuffled.shape), contrasts)


@partial(jax.jit, static_argnames="sizes")
def _inner_sums(
    gram: Float[jax.Array, "N N"], counts: Float[jax.Array, "R C N"], *, sizes: tuple[int, ...]
) -> Float[jax.Array, "R CG CG"]:
    """Inner products of the sums over each of G groups, in each of C sets of counts."""
    ends, groups = np.cumsum(sizes), np.arange(len(sizes))
    # Each group's rows side by side, filled up to the largest: one product in place of one a group,
    # which take seconds to compile.
    within = np.arange(max(sizes)) < np.array(sizes)[:, None]
    places = np.where(within, np.arange(max(sizes)) + (ends - sizes)[:, None], 0)
    own = np.repeat(groups, sizes) == groups[:, None]
    with jax.default_matmul_precision("highest"):
        sums = jnp.einsum("rcgm,gmn->rcgn", counts[..., places] * within, gram[places])
        chosen = counts[:, :, None] * own
        sums, chosen = (x.reshape(len(counts), -1, len(gram)) for x in (sums, chosen))
        return sums @ chosen.swapaxes(1, 2)


def _cosines(
    inner: Float[np.ndarray, "R G G"], vectors: Float[np.ndarray, "R V G"]
) -> Float[np.ndarray, "R V V"]:
    """Cosines of weighted sums of groups, from the groups' inner products; NaN for zeros."""
    inner, vectors = np.asarray(inner, np.float64), np.asarray(vectors, np.float64)
    with np.errstate(invalid="ignore"):
        products = vectors @ inner @ vectors.swapaxes(1, 2)
        norms = np.sqrt(np.maximum(np.einsum("rvv->rv", products), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / (norms[:, :, None] * norms[:, None])


def concept_weights(
    kind: str, sizes: Float[np.ndarray, "*R G"], D: int
) -> Float[np.ndarray, "*R D G"]:
    """Each domain's vector as weights of the sums over its groups.

    Args:
      kind: `raw` (minus the contrast set), `own` (minus the domain's own part of it) or `centred`
        (minus the mean of all domains).
      sizes: rows of each of the 2D groups, in every draw.
      D: the number of domains.
    """
    domains = _means_of(sizes[..., :D])
    nothing = np.zeros_like(domains)
    if kind == "own":
        return np.concatenate([domains, -_means_of(sizes[..., D:])], axis=-1)
    if kind == "centred":
        centred = domains - domains.mean(axis=-2, keepdims=True)
        return np.concatenate([centred, nothing], axis=-1)
    with np.errstate(divide="ignore"):
        contrast = nothing + 1 / sizes[..., D:].sum(axis=-1)[..., None, None]
    return np.concatenate([domains, -contrast], axis=-1)


def _means_of(sizes: Float[np.ndarray, "*R D"]) -> Float[np.ndarray, "*R D D"]:
    """Each group's mean as weights of sums; infinite for a group that no draw fell into."""
    D = sizes.shape[-1]
    own = np.zeros((*sizes.shape, D))
    with np.errstate(divide="ignore"):
        own[..., np.arange(D), np.arange(D)] = 1 / sizes
    return own


class PairFigures(NamedTuple):
    """One similarity between all domains at all layers; see `entanglement.Calibrated`."""

    observed: Float[np.ndarray, "L1 D D"]
    null95: Float[np.ndarray, "L1 D D"]
    null_mean: Float[np.ndarray, "L1 D D"]
    ceiling: Float[np.ndarray, "L1 D D"]
    disattenuated: Float[np.ndarray, "L1 D D"]
    ci95: Float[np.ndarray, "L1 D D 2"]
    null_interval: Float[np.ndarray, "L1 D D 2"]


def central(null: Float[np.ndarray, "R *shape"]) -> Float[np.ndarray, "*shape 2"]:
    """The central 95 % of draws under the null: two-sided, as a curve is read against it."""
    return np.moveaxis(np.quantile(null, (0.025, 0.975), axis=0), 0, -1)


def calibrate(
    layers: Iterable[Float[np.ndarray, "N d"]],
    sizes: Sequence[int],
    kinds: Sequence[str],
    *,
    permutations: int,
    splits: int,
    bootstraps: int,
    seed: int,
) -> dict[str, PairFigures]:
    """Cosines between all pairs of domains at every layer, with null, ceiling and interval.

    Args:
      layers: rows by layer, near the origin.
      sizes: rows of each of the 2D groups.
      kinds: of vectors, as in `concept_weights`.
      permutations: label permutations behind each null.
      splits: random halves behind each ceiling.
      bootstraps: redrawings of the prompts behind each interval.
      seed: of all of them, which are drawn once and used at every layer.
    """
    sizes = tuple(sizes)
    D = len(sizes) // 2
    rng = np.random.default_rng(seed)
    nulls = {kind: _null_draws(rng, permutations, kind, sizes) for kind in kinds}
    redrawn = _bootstrap_counts(rng, bootstraps, sizes)
    halves = _half_counts(rng, splits, sizes)
    once = np.ones((1, 1, sum(sizes)), np.float32)

    ends = np.cumsum(sizes)

    def group_sizes(counts: np.ndarray) -> np.ndarray:
        # Differences of running sums: a group may be empty (fewer contrast prompts than domains).
        return np.diff(np.cumsum(counts, axis=-1)[..., ends - 1], axis=-1, prepend=0)

    weights = {
        kind: {
            "observed": concept_weights(kind, group_sizes(once)[:, 0], D),
            "redrawn": concept_weights(kind, group_sizes(redrawn)[:, 0], D),
            "halves": _half_weights(kind, group_sizes(halves), D),
        }
        for kind in kinds
    }
    found: dict[str, list[PairFigures]] = {kind: [] for kind in kinds}
    for x in layers:
        gram = gram_matrix(x)
        sums = np.asarray(_inner_sums(gram, np.concatenate([once, redrawn]), sizes=sizes))
        inner = {
            "observed": sums[:1],
            "redrawn": sums[1:],
            "halves": np.asarray(_inner_sums(gram, halves, sizes=sizes)),
        }
        for kind in kinds:
            cosines = {name: _cosines(inner[name], weights[kind][name]) for name in inner}
            null = np.full((permutations, D, D), np.nan)
            for (a, b), regroupings in nulls[kind].items():
                drawn = regroupings.cosines(gram)
                if drawn.shape[1] == D:  # all pairs share one pool of prompts
                    null = drawn
                    break
                null[:, a, b] = null[:, b, a] = drawn[:, 0, 1]
            observed = cosines["observed"][0]
            own = np.arange(D)
            ceiling = _ceiling(cosines["halves"][:, own, D + own])
            spread = _spread(arctanh(cosines["redrawn"]))
            found[kind].append(
                PairFigures(
                    observed,
                    np.quantile(null, 0.95, axis=0),
                    null.mean(axis=0, dtype=np.float64),
                    ceiling,
                    np.divide(observed, ceiling, out=np.full((D, D), np.nan), where=ceiling > 0),
                    fisher_interval(observed, spread),
                    central(null),
                )
            )
    return {
        kind: PairFigures(*map(np.stack, zip(*rows, strict=True))) for kind, rows in found.items()
    }


def _null_draws(
    rng: np.random.Generator, repeats: int, kind: str, sizes: tuple[int, ...]
) -> dict[tuple[int, int], Regroupings]:
    """Shuffled labels for every pair: among the prompts that its two vectors are made of."""
    D = len(sizes) // 2
    labels = np.repeat(np.arange(2 * D), sizes)
    if kind == "centred":
        rows = np.flatnonzero(labels < D)
        drawn = permutations_of(rng, repeats, rows, labels[rows], centred_contrasts(D)[:, :D])
        return {(0, 1): drawn}
    draws = {}
    for a in range(D):
        for b in range(a + 1, D):
            if kind == "own":
                pool = [a, b, D + a, D + b]
                contrasts = np.array([[1.0, 0, -1, 0], [0, 1, 0, -1]])
                relabelled = labels
            else:
                pool, contrasts = [a, b, D], raw_contrasts(2)
                relabelled = np.minimum(labels, D)
            rows = np.flatnonzero(np.isin(relabelled, pool))
            places = np.searchsorted(pool, relabelled[rows])
            draws[a, b] = permutations_of(rng, repeats, rows, places, contrasts)
    # Pairs differ by a few prompts, or where domains do by many.
    most = max(len(drawn.rows) for drawn in draws.values())
    return {pair: drawn.padded(most) for pair, drawn in draws.items()}


def _bootstrap_counts(
    rng: np.random.Generator, repeats: int, sizes: tuple[int, ...]
) -> Float[np.ndarray, "R 1 N"]:
    """Prompts redrawn with replacement inside each domain and inside the contrast set."""
    D = len(sizes) // 2
    strata = (*sizes[:D], sum(sizes[D:]))
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=repeats) for n in strata]
    return np.concatenate(counts, axis=1)[:, None].astype(np.float32)


def _half_counts(
    rng: np.random.Generator, repeats: int, sizes: tuple[int, ...]
) -> Float[np.ndarray, "R 2 N"]:
    """Every group split in two at random: which prompts are in which half."""
    first = [rng.permuted(np.tile(np.arange(n) < n - n // 2, (repeats, 1)), axis=1) for n in sizes]
    inside = np.concatenate(first, axis=1)
    return np.stack([inside, ~inside], axis=1).astype(np.float32)


def _half_weights(
    kind: str, sizes: Float[np.ndarray, "R 2 G"], D: int
) -> Float[np.ndarray, "R halves domains"]:
    """The domains' vectors from first halves, then from second ones, over groups by half.

    Raw ones do not split the contrast set, since the observed cosine shares it between its two
    vectors too; the others have no prompt in common.
    """
    both = concept_weights(kind, sizes, D)  # [R, 2, D, G]
    nothing = np.zeros_like(both[:, 0])
    if kind != "raw":
        rows = [np.concatenate(pair, -1) for pair in ((both[:, 0], nothing), (nothing, both[:, 1]))]
        return np.concatenate(rows, axis=1)
    # Chosen and not multiplied by 0: a half without a contrast prompt has infinite weights there.
    own = np.arange(2 * D) < D
    contrast = np.where(own, 0.0, concept_weights("raw", sizes.sum(axis=1), D))
    domains = np.where(own, both, 0.0)
    rows = [
        np.concatenate([domains[:, 0] + contrast, contrast], -1),
        np.concatenate([contrast, domains[:, 1] + contrast], -1),
    ]
    return np.concatenate(rows, axis=1)


def _spread(z: Float[np.ndarray, "R D D"]) -> Float[np.ndarray, "D D"]:
    """Standard deviation over the draws in which a similarity is defined."""
    defined = np.isfinite(z)
    count = defined.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(defined, z, 0).sum(axis=0) / count
        return np.sqrt(np.where(defined, np.square(z - mean), 0).sum(axis=0) / (count - 1))


def _ceiling(half_cosines: Float[np.ndarray, "R D"]) -> Float[np.ndarray, "D D"]:
    """Geometric means of split-half reliabilities, each stepped up by Spearman-Brown."""
    half = np.maximum(half_cosines.mean(axis=0, dtype=np.float64), 0.0)
    reliability = 2 * half / (1 + half)
    return np.sqrt(np.outer(reliability, reliability))


def fisher_interval(
    observed: Float[np.ndarray, "D D"], spread: Float[np.ndarray, "D D"]
) -> Float[np.ndarray, "D D 2"]:
    """Normal interval on Fisher's z scale, of which `spread` is the bootstrap's deviation.

    Not percentiles of the bootstrap: redrawing adds sampling noise a second time, which pulls
    cosines of noisy means to their null and can leave the observed value outside.
    """
    z = arctanh(observed)
    return np.tanh(np.stack([z - 1.96 * spread, z + 1.96 * spread], axis=-1))


def arctanh(x: np.ndarray) -> np.ndarray:
    """Fisher's z, finite at cosines of one."""
    return np.arctanh(np.clip(np.asarray(x, np.float64), -1 + 1e-6, 1 - 1e-6))
