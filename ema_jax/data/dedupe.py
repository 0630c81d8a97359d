"""Exact and near duplicates among prompts.

Two prompts are near duplicates when the Jaccard similarity of their sets of word 3-shingles
(lower case, punctuation dropped, padded at both ends) reaches a threshold. Three words rather than
the usual five because prompts are short: at five, one changed word in a sentence of twelve already
shares almost nothing. At 0.8, two prompts of thirty words that differ in one are duplicates; two
of twelve words that differ in one are not.

The comparison is exact, not hashed: with shingles ordered from rare to common, two sets of
similarity t share one among the first n - ceil(t n) + 1 of each (prefix filtering: Bayardo, Ma and
Srikant, "Scaling up all pairs similarity search", 2007), so that only those need an index.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_WORDS = re.compile(r"\w+")
_WIDTH = 3


def normalise(text: str) -> str:
    """Lower-case words joined by single blanks; of wordless text, the text itself."""
    return " ".join(_WORDS.findall(text.casefold())) or text.strip()


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The set of word 3-shingles of `text`, with a pad at both ends."""
    words = ["", *normalise(text).split(" "), ""]
    return frozenset(tuple(words[i : i + _WIDTH]) for i in range(max(1, len(words) - _WIDTH + 1)))


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int | None]:
    """For each text, the index of an earlier kept text it repeats, or None if it is kept.

    Args:
        texts: in order of precedence: of two duplicates the first is kept.
        threshold: Jaccard similarity in (0, 1] from which two texts are duplicates.
    """
    sets = [shingles(text) for text in texts]
    frequency = Counter(shingle for items in sets for shingle in items)
    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    result: list[int | None] = []
    for i, items in enumerate(sets):
        ordered = sorted(items, key=lambda shingle: (frequency[shingle], shingle))
        prefix = ordered[: len(ordered) - math.ceil(threshold * len(ordered) - 1e-9) + 1]
        candidates = sorted({j for shingle in prefix for j in index[shingle]})
        original = next((j for j in candidates if _similar(items, sets[j], threshold)), None)
        result.append(original)
        if original is None:
            for shingle in prefix:
                index[shingle].append(i)
    return result


def _similar(a: frozenset, b: frozenset, threshold: float) -> bool:
    shared = len(a & b)
    return shared >= threshold * (len(a) + len(b) - shared) - 1e-9
