"""Judged responses: what the screen measures, what rows keep, and agreement before the screen."""

import numpy as np
import pytest

from ema_jax.data.prompts import Prompt
from ema_jax.generation.sampler import Response
from ema_jax.refusal.answer_screen import AnswerScreen
from ema_jax.refusal.judges import get_judge
from ema_jax.refusal.relevance import _candidates
from ema_jax.refusal.responses import JudgedResponses, unscreened_verdict

ANSWERS = ["Water the {x} fern in the morning.", "I cannot help with that.", "The {x} mill burned."]
NAMES = ["red", "blue", "tall", "old", "wet", "dry", "new", "low"]


class Characters:
    """A chat whose tokens are characters; counts what it renders."""

    def __init__(self):
        self.rendered = []

    def prompt_tokens(self, prompt):
        self.rendered.append(prompt)
        return self.tokens(prompt)

    def tokens(self, text):
        return tuple(map(ord, text))


def log_probs(examples):
    """A response is likelier the more characters its prompt shares with it."""
    return np.array(
        [-sum(0.5 + (t not in item.prompt) for t in item.response) for item in examples]
    )


@pytest.fixture
def judged():
    chat = Characters()
    prompts, responses = [], []
    for i, name in enumerate(NAMES * 3):
        domain = ("plants", "mills", "walks")[i // 8]
        text = f"Tell me of the {name} {domain}."
        prompts.append(Prompt(f"p{i}", domain, "eval", text, "test", "", f"g{i}"))
        answer = ANSWERS[1 if domain == "walks" else i % 3].format(x=name)
        responses.append(Response(chat.tokens(answer), answer, True))
    made = JudgedResponses(prompts, responses, ())
    return JudgedResponses(prompts, responses, made.judged_by(get_judge("lexical")))


def test_signals_are_those_of_every_prompt_rendered(judged):
    chat = Characters()
    indices, found = judged.compliance_signals(chat, log_probs)
    assert [judged.verdicts[i].verdict for i in indices] == ["complied"] * len(indices) != []
    texts = [p.prompt for p in judged.prompts]
    circle = _candidates([p.domain for p in judged.prompts], [p.group for p in judged.prompts], 3)
    for i, index in enumerate(indices):
        response = judged.responses[index].tokens[:48]
        each = [
            -sum(0.5 + (t not in chat.tokens(texts[c])) for t in response) for c in circle[index]
        ]
        assert [found.own[i], *found.others[i]] == each
    # Nothing complied in one domain, so that its prompts are not rendered; the others once each.
    assert sorted(chat.rendered) == sorted(t for t in texts if "walks" not in t)


def test_rows_keep_the_judges_own_verdict_under_the_screen(judged):
    """κ compares judges before the screen, which only the study's own judge passes through."""
    judges = [get_judge("lexical"), get_judge("substring_arditi")]
    screen = AnswerScreen((1.0, 0.0), (1.0, 2.0), (-1.0, 0.0), {})  # passes nothing
    screened = judged.screened(screen, Characters(), log_probs)
    rows = list(screened.rows(judges[0], judges[1:], keep_text=False))
    assert {row["verdict"] for row in rows} == {"refused", "invalid"}
    assert [unscreened_verdict(row) for row in rows] == [v.verdict for v in judged.verdicts]
    others = [unscreened_verdict(row["other_verdicts"][0]) for row in rows]
    assert others == [v.verdict for v in judged.judged_by(judges[1])]


def test_one_domain_is_screened_as_it_is_among_all(judged):
    screen = AnswerScreen((0.5, 0.5), (0.9, 1.0), (-2.0, 0.0), {})
    every, one = (judged.screened(screen, Characters(), log_probs, d) for d in (None, "plants"))
    assert {i for i in every.signals if i < 8} == set(one.signals) != set(every.signals)
    assert one.verdicts[:8] == every.verdicts[:8]
    assert one.verdicts[8:] == judged.verdicts[8:]
