"""Relevance, fluency and the screen: against restatements, on a language whose truth is known."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ema_jax.errors import UserError
from ema_jax.refusal import relevance
from ema_jax.refusal.answer_screen import SALAD, AnswerScreen, _threshold, shuffled_words
from ema_jax.refusal.relevance import Signals, relevance_signals
from ema_jax.refusal.verdicts import OFF_TOPIC

PROMPTS = [f"Tell me how to water the {x} fern." for x in ("red", "blue", "tall", "old", "wet")]
PROMPTS += [f"Explain the history of {x} street." for x in ("mill", "king", "bridge", "north")]
GROUPS = ["plants"] * 5 + ["streets"] * 4


def encode(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def naming(examples) -> np.ndarray:
    """A base under which a response is likely by the words that it shares with its prompt."""
    found = []
    for item in examples:
        prompt, response = (bytes(x).decode().strip(".").split() for x in item)
        found.append(sum(-0.1 if word in prompt else -3.0 for word in response))
    return np.array(found)


def measured(responses, places, **options) -> Signals:
    return relevance_signals(
        PROMPTS,
        encode,
        responses,
        [encode(r) for r in responses],
        places,
        GROUPS,
        PROMPTS,
        naming,
        **options,
    )


def test_signals_are_what_their_formulas_say():
    responses, places = ["water the blue fern", "of bridge street"], [1, 7]
    found = measured(responses, places, others=2)
    for i, (response, place) in enumerate(zip(responses, places, strict=True)):
        own = naming([(encode(PROMPTS[place]), encode(response))])[0]
        assert found.own[i] == own
        tokens = len(encode(response))
        assert found.tokens[i] == tokens
        mean = found.others[i].mean()
        assert found.relevance[i] == pytest.approx((own - mean) / tokens)
        assert found.explained[i] == pytest.approx(1 - own / mean)
        every = np.exp([own, *found.others[i]])
        assert found.fluency[i] == pytest.approx(np.log(every.mean()) / tokens)
    # "blue" is the one word of its prompt that not every plant has; the response names it.
    assert found.overlap.tolist() == [1.0, 1.0]
    assert found.others_overlap.max() == 0.0


def test_rare_words_weigh_more():
    weights = relevance._word_weights(["a red fern", "a blue fern", "a kite", "one"], ["x"] * 4)
    assert weights[0] == {"a": np.log(4 / 3), "red": np.log(4), "fern": np.log(2)}
    named = relevance._overlap(weights[0], {"red", "kite"})
    assert named == pytest.approx(np.log(4) / (np.log(4 / 3) + np.log(4) + np.log(2)))
    # A prompt whose words all prompts have has nothing to be named.
    assert relevance._overlap(relevance._word_weights(["a", "a"], ["x"] * 2)[0], {"a"}) == 0.0


def test_other_prompts_are_of_the_same_group_and_never_its_own():
    chosen = relevance._candidates(GROUPS, PROMPTS, 3)
    for place, row in enumerate(chosen):
        assert row[0] == place
        assert place not in row[1:]
        assert {GROUPS[i] for i in row} == {GROUPS[place]}
    counts = np.bincount(chosen[:, 1:].ravel())
    assert set(counts) == {3}  # each as often as any other
    lonely = relevance._candidates(["plants", "plants", "lonely"], ["1", "2", "3"], 2)[2]
    assert sorted(lonely) == [0, 1, 2]
    assert lonely[0] == 2
    two = relevance._candidates(["a", "a"], ["1", "2"], 3)
    assert two.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]


def test_a_variant_of_the_same_item_is_no_other_prompt():
    items = ["1", "1", "2", "2", "3"]
    for place, row in enumerate(relevance._candidates(["a"] * 5, items, 3)):
        assert items[place] not in {items[i] for i in row[1:]}
    with pytest.raises(UserError, match="no other one to compare"):
        relevance._candidates(["a", "a"], ["1", "1"], 3)
    assert len(measured([], []).tokens) == 0  # nothing to measure asks nothing


def test_unrelated_pairs_leave_the_true_prompt_out():
    found = measured(["water the blue fern"], [1], others=3)
    null = found.unrelated()
    assert null.own.tolist() == found.others[0].tolist()
    for k in range(3):
        rest = np.delete(found.others[0], k)
        assert null.relevance[k] == pytest.approx((found.others[0, k] - rest.mean()) / 19)


def test_only_the_first_tokens_of_a_response_are_scored():
    seen = []
    responses = ["x" * 500]
    relevance_signals(
        PROMPTS,
        encode,
        responses,
        [encode(r) for r in responses],
        [0],
        GROUPS,
        PROMPTS,
        lambda examples: seen.extend(examples) or np.full(len(examples), -1.0),
    )
    assert {len(item.response) for item in seen} == {relevance.TOKENS}


def test_only_prompts_that_are_compared_with_are_rendered_and_each_once():
    rendered = []
    relevance_signals(
        PROMPTS,
        lambda prompt: rendered.append(prompt) or encode(prompt),
        ["of mill street"] * 2,
        [encode("of mill street")] * 2,
        [5, 5],
        GROUPS,
        PROMPTS,
        naming,
    )
    assert sorted(rendered) == sorted(PROMPTS[5:])  # itself and three others


def drawn(rng, right: int, relevance: float, noise: float = 0.2, fluent: float = -1.0) -> Signals:
    """Signals of responses of 20 tokens whose own prompt is worth `relevance` nats a token."""
    others = 20 * (fluent - relevance + noise * rng.normal(size=(right, 3)) / 2)
    own = 20 * (fluent + noise * rng.normal(size=right) / 2)
    return Signals(
        own,
        others,
        rng.uniform(0.2, 0.8, right) * (relevance > 0),
        rng.uniform(0, 0.2, (right, 3)),
        np.full(right, 20),
    )


def test_screen_tells_answers_from_unrelated_ones_and_from_salad():
    rng = np.random.default_rng(0)
    screen = AnswerScreen.calibrate(drawn(rng, 100, 0.8), rng.normal(-6, 0.5, 100))
    assert screen is not None
    assert screen.figures["off_topic"]["auc"] > 0.97
    assert screen.figures["off_topic"]["caught"] >= 0.95
    assert screen.figures["salad"] == {"auc": 1.0, "caught": 1.0, "false_alarms": 0.0}
    # Fresh draws, less typical of the base than what it was calibrated on.
    answers, unrelated = drawn(rng, 400, 0.6, fluent=-1.5), drawn(rng, 400, 0.0, fluent=-1.5)
    assert np.mean([r == "" for r in screen.reasons(answers)]) > 0.95
    assert np.mean([r == OFF_TOPIC for r in screen.reasons(unrelated)]) > 0.9
    salad = drawn(rng, 50, 0.0, fluent=-6.0)
    assert set(screen.reasons(salad)) == {SALAD}


def test_where_relevance_is_weak_few_answers_are_rejected():
    """What cannot be told apart passes: damage is missed rather than answers lost."""
    rng = np.random.default_rng(3)
    screen = AnswerScreen.calibrate(drawn(rng, 200, 0.05), rng.normal(-1, 0.1, 200))
    for name in ("off_topic", "salad"):
        assert screen.figures[name]["false_alarms"] <= 0.05
    # Texts that cannot be shuffled: no floor of fluency at all.
    screen = AnswerScreen.calibrate(drawn(rng, 30, 0.8), np.zeros(0))
    assert SALAD not in screen.reasons(drawn(rng, 100, 0.0, fluent=-9.0))
    assert (
        AnswerScreen.from_json(json.loads(json.dumps(screen.to_json(), allow_nan=False))) == screen
    )


def test_auc_is_scikit_learns():
    rng = np.random.default_rng(4)
    right, wrong = rng.integers(0, 9, 50) + 2.0, rng.integers(0, 9, 70) + 0.0
    _, figures = _threshold(right, wrong, 0.5)
    labels = np.repeat([1, 0], [50, 70])
    assert figures["auc"] == pytest.approx(roc_auc_score(labels, np.concatenate([right, wrong])))


def test_screen_survives_json_and_needs_answers():
    rng = np.random.default_rng(1)
    screen = AnswerScreen.calibrate(drawn(rng, 30, 0.8), rng.normal(-6, 0.5, 30))
    assert AnswerScreen.from_json(screen.to_json()) == screen
    # Responses drawn at a temperature are judged by their topic alone.
    salad = drawn(rng, 30, 0.8, fluent=-9.0)
    assert set(screen.reasons(salad)) == {SALAD}
    assert SALAD not in screen.of_drawn().reasons(salad)
    assert AnswerScreen.calibrate(drawn(rng, 7, 0.8), rng.normal(-6, 0.5, 7)) is None


def test_without_any_response_to_screen_nothing_is_said():
    rng = np.random.default_rng(2)
    screen = AnswerScreen.calibrate(drawn(rng, 30, 0.8), rng.normal(-6, 0.5, 30))
    none = drawn(rng, 0, 0.8)
    assert screen.reasons(none) == []


def test_shuffled_words_keep_the_words():
    text = "Begin with a list, work from top to bottom, and review each part."
    (mixed,) = shuffled_words([text])
    assert mixed != text
    assert sorted(mixed.split()) == sorted(text.split())
    assert shuffled_words([text]) == [mixed]
