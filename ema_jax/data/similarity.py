"""Likeness of short prompts: nearest ones, clusters of like ones, leakage between splits.

Two prompts are as alike as the cosine of their TF-IDF vectors over character 3- to 5-grams inside
words (Sparck Jones, 1972; n-grams as scikit-learn's `char_wb`): inflected and compounded words
count as alike, and what every prompt says ("Write a tutorial on how to") counts little. The word
3-shingles of `dedupe` find copies; in prompts of ten words they miss every rewording.

Beside it stands the share of words in common (Jaccard), coarser, and plain to a reader.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int
from typing_extensions import TypedDict

from ema_jax.data.dedupe import normalise

_WIDTHS = (3, 4, 5)
_BLOCK = 256
_FEWEST_SHARED = 0.5

NEAR = 0.6
"""Cosine from which two prompts are near duplicates.

Of 4,248 public prompts, pairs just above it reword one another ("Give step-by-step instructions
for", "Provide a tutorial on"), pairs at 0.5 are of one subject.
"""


def tfidf(texts: Sequence[str]) -> scipy.sparse.csr_matrix:
    """TF-IDF vectors of character n-grams, of length one: float64 `[texts, n-grams]`.

    Term frequencies are 1 + log n, document frequencies are smoothed by one of each.
    """
    grams_of: dict[str, tuple[str, ...]] = {}
    ids: dict[str, int] = {}
    indices: list[int] = []
    counts: list[int] = []
    ends = [0]
    for text in texts:
        found: Counter[str] = Counter()
        for word in text.lower().split():
            if word not in grams_of:
                grams_of[word] = tuple(_grams(f" {word} "))
            found.update(grams_of[word])
        indices += [ids.setdefault(gram, len(ids)) for gram in found]
        counts += found.values()
        ends.append(len(indices))
    data, columns = 1 + np.log(np.array(counts, np.float64)), np.array(indices, np.int64)
    in_texts = np.bincount(columns, minlength=len(ids))
    data *= (np.log((1 + len(texts)) / (1 + in_texts)) + 1)[columns]
    rows = scipy.sparse.csr_matrix((data, columns, ends), shape=(len(texts), len(ids)))
    lengths = np.sqrt(rows.multiply(rows).sum(axis=1)).A1
    scale = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return scipy.sparse.diags(scale).dot(rows).tocsr()


def _grams(word: str) -> Iterator[str]:
    for width in _WIDTHS:
        for start in range(max(1, len(word) - width + 1)):
            yield word[start : start + width]
        if len(word) <= width:  # wider ones would repeat the whole word
            return


def clusters(
    texts: Sequence[str], threshold: float, groups: Sequence[str] | None = None
) -> Int[np.ndarray, " texts"]:
    """Cluster number of each text: those that a chain of near duplicates joins are one.

    Args:
        texts: the texts.
        threshold: cosine from which two of them are near duplicates.
        groups: of the texts, if they have any; a group is in one cluster.
    """
    from scipy.sparse.csgraph import connected_components

    if not texts:
        return np.zeros(0, np.int64)
    rows, blocks = tfidf(texts), []
    for start in range(0, len(texts), _BLOCK):
        cosines = rows[start : start + _BLOCK] @ rows.T
        cosines.data = (cosines.data >= threshold - 1e-9).astype(np.float32)
        cosines.eliminate_zeros()
        blocks.append(cosines)
    linked = scipy.sparse.vstack(blocks).tocsr()
    if groups is not None:
        first: dict[str, int] = {}
        heads = [first.setdefault(group, i) for i, group in enumerate(groups)]
        ones = np.ones(len(heads), np.float32)
        linked = linked + scipy.sparse.csr_matrix(
            (ones, (np.arange(len(heads)), heads)), linked.shape
        )
    return connected_components(linked, directed=False)[1].astype(np.int64)


def word_clusters(texts: Sequence[str], threshold: float) -> Int[np.ndarray, " texts"]:
    """Cluster number of each text: those that a chain of pairs joins are one.

    Args:
        texts: the texts.
        threshold: Jaccard similarity of their sets of words from which two texts are a pair.
    """
    from scipy.sparse.csgraph import connected_components

    words, sizes = _words(texts)
    shared = (words @ words.T).tocoo()
    total = sizes[shared.row] + sizes[shared.col] - shared.data
    shared.data = (shared.data >= threshold * total - 1e-9).astype(np.float32)
    shared.eliminate_zeros()
    return connected_components(shared, directed=False)[1].astype(np.int64)


def _words(texts: Sequence[str]) -> tuple[scipy.sparse.csr_matrix, Int[np.ndarray, " texts"]]:
    """One where a text has a word, `[texts, words]`, and the number of words of each text."""
    ids: dict[str, int] = {}
    words = [sorted({ids.setdefault(w, len(ids)) for w in normalise(t).split()}) for t in texts]
    sizes = np.array([len(found) for found in words], np.int64)
    columns = np.fromiter(itertools.chain.from_iterable(words), np.int64)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    ones = np.ones(len(columns), np.float32)
    return scipy.sparse.csr_matrix((ones, columns, ends), shape=(len(texts), len(ids))), sizes


def nearest(texts: Sequence[str], others: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """Cosine of each text with the one of `others` that is most like it; 0 without any."""
    if not texts or not others:
        return np.zeros(len(texts))
    rows = tfidf([*texts, *others])
    found = [
        (rows[start : min(start + _BLOCK, len(texts))] @ rows[len(texts) :].T).max(axis=1).toarray()
        for start in range(0, len(texts), _BLOCK)
    ]
    return np.concatenate(found)[:, 0].astype(float)


def shared_words(texts: Sequence[str], others: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """Jaccard similarity of each text's words with those of the nearest of `others`; 0 if none."""
    rows, sizes = _words([*texts, *others])
    best = np.zeros(len(texts))
    for start in range(0, len(texts) if others else 0, _BLOCK):
        stop = min(start + _BLOCK, len(texts))
        shared = (rows[start:stop] @ rows[len(texts) :].T).toarray()
        total = sizes[start:stop, None] + sizes[None, len(texts) :] - shared
        best[start:stop] = (shared / np.maximum(total, 1)).max(axis=1)
    return best


class Leakage(TypedDict):
    """Likeness of some prompts to the nearest that a model is trained on (see `leakage`)."""

    n: int
    cosine_median: float
    cosine_p95: float
    near: float
    words_median: float
    words_half: float


def leakage(asked: Mapping[str, Sequence[str]], trained: Iterable[str]) -> dict[str, Leakage]:
    """How alike the prompts of each domain are to those that a model is trained on.

    Args:
        asked: domain → texts that are measured.
        trained: texts of the harvest and retain splits.

    Returns:
        By domain, of the nearest trained prompt of each: `cosine_median`, `cosine_p95` and `near`,
        the share at `NEAR` or above; `words_median` and `words_half`, the share of prompts with a
        Jaccard similarity of words of a half or more; `n` prompts.
    """
    domains = [domain for domain, texts in asked.items() for _ in texts]
    texts, others = [text for each in asked.values() for text in each], list(trained)
    cosine, words = nearest(texts, others), shared_words(texts, others)
    found: dict[str, Leakage] = {}
    for domain in asked:
        here = np.array([d == domain for d in domains], bool)
        if here.any():
            found[domain] = {
                "n": int(here.sum()),
                "cosine_median": float(np.median(cosine[here])),
                "cosine_p95": float(np.quantile(cosine[here], 0.95)),
                "near": float(np.mean(cosine[here] >= NEAR)),
                "words_median": float(np.median(words[here])),
                "words_half": float(np.mean(words[here] >= _FEWEST_SHARED)),
            }
    return found
