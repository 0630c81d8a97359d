"""Likeness of prompts against scikit-learn and against all pairs."""

import random

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from ema_jax.data.similarity import NEAR, clusters, leakage, nearest, shared_words, tfidf

_OPENINGS = ("How do I", "What is a good way to", "Please tell me how to", "Can I")
_THINGS = ("prune a pear tree", "repair a bicycle's chain", "bake rye bread", "paint a fence", "go")


def _texts(count, seed=0):
    rng = random.Random(seed)
    return [
        f"{rng.choice(_OPENINGS)} {rng.choice(_THINGS)} in {rng.randint(1, 40)} days, ÄRGERLICH?"
        for _ in range(count)
    ]


def test_tfidf_is_sklearns():
    texts = [*_texts(700), "a", "", "  ", "Ab abc abcd abcde abcdef", "tab\tand\nbreak"]
    theirs = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    expected = theirs.fit_transform(texts)
    ours = tfidf(texts)
    assert ours.shape == expected.shape
    difference = (ours @ ours.T) - (expected @ expected.T)
    assert abs(difference).max() < 1e-9
    half = len(texts) // 2
    best = (expected[:half] @ expected[half:].T).toarray().max(axis=1)
    np.testing.assert_allclose(nearest(texts[:half], texts[half:]), best, atol=1e-9, rtol=0)


def test_clusters_join_chains_and_nothing_else():
    texts = _texts(60)
    found = clusters(texts, NEAR)
    cosines = (tfidf(texts) @ tfidf(texts).T).toarray()
    expected = list(range(len(texts)))  # by merging, pair by pair
    for i in range(len(texts)):
        for j in range(i):
            if cosines[i, j] >= NEAR and expected[i] != expected[j]:
                old, new = expected[i], expected[j]
                expected = [new if x == old else x for x in expected]
    same = np.equal.outer(expected, expected)
    np.testing.assert_array_equal(np.equal.outer(found, found), same)
    assert 1 < len(set(found)) < len(texts)
    assert len(clusters([], NEAR)) == 0


def test_words_shared_with_the_nearest():
    texts = ["Red apples, please!", "a b c d", "?!"]
    others = ["green apples please", "c d e f", "nothing"]
    assert shared_words(texts, others) == pytest.approx([2 / 4, 2 / 6, 0])
    assert shared_words(texts, []).tolist() == [0, 0, 0]
    assert nearest(texts, []).tolist() == [0, 0, 0]


def test_leakage_by_domain():
    copied, new = "How do I prune a pear tree?", "Zebras yawn."
    found = leakage({"gardens": [copied, new], "none": []}, [copied, "Which paint for a fence?"])
    assert list(found) == ["gardens"]
    assert found["gardens"]["n"] == 2
    assert found["gardens"]["near"] == found["gardens"]["words_half"] == 0.5
    assert found["gardens"]["cosine_p95"] > 0.9
