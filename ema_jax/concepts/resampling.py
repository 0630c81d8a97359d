"""Cosines of group means under regrouped prompts: permutation nulls, split halves, bootstrap.

Group means enter a cosine only through inner products of prompts. So each layer is reduced once to
its N×N Gram matrix, and a regrouping costs O(groups · N²) whatever the width of the model: 1,000
permutations of 1,024 prompts at width 4,096 take well under a second a layer on a laptop.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

_BOOTSTRAPS = 400
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

    def cosines(self, gram: Float[jax.Array, "N N"]) -> Float[np.ndarray, "R vectors vectors"]:
        """Cosines between all vectors under every regrouping; NaN where a vector is zero."""
        chunk = _CHUNK_ELEMENTS // (self.labels.shape[1] * self.contrasts.shape[1])
        inside = gram[np.ix_(self.rows, self.rows)]
        return np.asarray(
            _regrouped_cosines(
                inside,
                self.labels.astype(np.int32),
                self.counts.astype(np.float32),
                self.contrasts.astype(np.float32),
                chunk=max(1, min(len(self.labels), chunk)),
            )
        )


@partial(jax.jit, static_argnames="chunk")
def _regrouped_cosines(
    gram: Float[jax.Array, "n n"],
    labels: Int[jax.Array, "R n"],
    counts: Float[jax.Array, "R n"],
    contrasts: Float[jax.Array, "v g"],
    chunk: int,
) -> Float[jax.Array, "R v v"]:
    groups = jnp.arange(contrasts.shape[1])

    def one(regrouping: tuple[jax.Array, jax.Array]) -> jax.Array:
        label, count = regrouping
        weights = jnp.where(label == groups[:, None], count, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
        inner = contrasts @ (weights @ gram @ weights.T) @ contrasts.T
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


def bootstraps_of(
    rng: np.random.Generator, repeats: int, sizes: Sequence[int], contrasts: np.ndarray
) -> Regroupings:
    """Prompts redrawn with replacement inside each group."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=repeats) for n in sizes]
    return Regroupings(
        rows=np.arange(len(labels)),
        labels=np.tile(labels, (repeats, 1)),
        counts=np.concatenate(counts, axis=1),
        contrasts=contrasts,
    )


def halves_of(rng: np.random.Generator, repeats: int, sizes: Sequence[int]) -> Regroupings:
    """Every domain split in two: vectors are raw and centred ones, of first and second halves.

    With D domains the vectors come in four blocks of D: raw first and second halves, centred first
    and second halves. The raw halves keep the contrast set whole, since the observed cosine shares
    it between its two vectors too; the centred halves have no prompt in common.
    """
    D = len(sizes) - 1
    labels = np.tile(np.repeat(np.arange(D + 1), sizes), (repeats, 1))
    for d, rows in enumerate(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])[:D]):
        shuffled = rng.permuted(np.tile(rows, (repeats, 1)), axis=1)
        second = D + 1 + d
        np.put_along_axis(labels, shuffled[:, : len(rows) // 2], second, axis=1)
    raw, centred = raw_contrasts(D), centred_contrasts(D)
    blocks = [
        block
        for contrast in (raw, centred)
        for block in (
            np.hstack([contrast, np.zeros((D, D))]),
            np.hstack([np.zeros((D, D)), contrast[:, -1:], contrast[:, :-1]]),
        )
    ]
    return Regroupings(np.arange(sum(sizes)), labels, np.ones(labels.shape), np.vstack(blocks))


def calibrate(
    layers: Iterable[Float[np.ndarray, "N d"]],
    sizes: Sequence[int],
    target: int,
    *,
    permutations: int,
    splits: int,
    seed: int,
) -> dict[str, dict[str, Float[np.ndarray, "L+1 D"]]]:
    """Null, ceiling and bootstrap spread of the cosines with one domain, at every layer.

    Args:
      layers: rows by layer, near the origin; the groups one after the other, contrast set last.
      sizes: rows of each of the D domains and of the contrast set.
      target: number of the domain the others are compared with.
      permutations: label permutations behind each null.
      splits: random splits behind each ceiling.
      seed: of all regroupings, which are drawn once and used at every layer.

    Returns:
      For `cosine` and `cosine_centred`, `[L+1, D]` each: `null95` and `null_mean`; `ceiling`, the
      geometric mean of two split-half reliabilities stepped up by Spearman-Brown; `spread`, the
      bootstrap standard deviation on Fisher's z scale.
    """
    D = len(sizes) - 1
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(D + 1), sizes)
    in_domains = np.flatnonzero(labels < D)
    centred_null = permutations_of(
        rng, permutations, in_domains, labels[in_domains], centred_contrasts(D)[:, :D]
    )
    raw_nulls = {}
    for d in (d for d in range(D) if d != target):
        rows = np.flatnonzero(np.isin(labels, (target, d, D)))
        trio = np.select([labels[rows] == target, labels[rows] == d], [0, 1], 2)
        raw_nulls[d] = permutations_of(rng, permutations, rows, trio, raw_contrasts(2))
    both = np.vstack([raw_contrasts(D), centred_contrasts(D)])
    bootstraps = bootstraps_of(rng, _BOOTSTRAPS, sizes, both)
    halves = halves_of(rng, splits, sizes)

    by_layer: dict[str, list[dict[str, np.ndarray]]] = {"cosine": [], "cosine_centred": []}
    for x in layers:
        gram = gram_matrix(x)
        raw_null = np.full((permutations, D), np.nan)
        for d, regroupings in raw_nulls.items():
            raw_null[:, d] = regroupings.cosines(gram)[:, 0, 1]
        nulls = {"cosine": raw_null, "cosine_centred": centred_null.cosines(gram)[:, target]}
        redrawn, split = arctanh(bootstraps.cosines(gram)), halves.cosines(gram)
        for block, (name, null) in enumerate(nulls.items()):
            own = slice(block * D, (block + 1) * D)
            first, second = 2 * block * D + np.arange(D), (2 * block + 1) * D + np.arange(D)
            by_layer[name].append(
                {
                    "null95": np.quantile(null, 0.95, axis=0),
                    "null_mean": null.mean(axis=0, dtype=np.float64),
                    "ceiling": _ceiling(split[:, first, second], target),
                    "spread": redrawn[:, own.start + target, own].std(axis=0, ddof=1),
                }
            )
    return {
        name: {key: np.stack([figures[key] for figures in rows]) for key in rows[0]}
        for name, rows in by_layer.items()
    }


def _ceiling(half_cosines: Float[np.ndarray, "R D"], target: int) -> Float[np.ndarray, " D"]:
    half = np.maximum(half_cosines.mean(axis=0, dtype=np.float64), 0.0)
    reliability = 2 * half / (1 + half)
    return np.sqrt(reliability * reliability[target])


def arctanh(x: np.ndarray) -> np.ndarray:
    """Fisher's z, finite at cosines of one."""
    return np.arctanh(np.clip(np.asarray(x, np.float64), -1 + 1e-6, 1 - 1e-6))
