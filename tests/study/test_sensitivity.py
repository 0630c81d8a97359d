"""Ways of asking: draws, longer responses, and the ranges of what they give."""

import pytest

from ema_jax import config as ema
from ema_jax.config import SensitivityConfig, StudyConfig
from ema_jax.data.prompts import Prompt
from ema_jax.errors import UserError
from ema_jax.generation.sampler import GREEDY, Response, Sampling
from ema_jax.refusal.responses import JudgedResponses
from ema_jax.refusal.verdicts import Verdict
from ema_jax.report.sensitivity import sensitivity as table
from ema_jax.study import stage_bodies
from ema_jax.study.sensitivity import measure, ranges
from ema_jax.study.workdir import StageContext

REFUSES, ANSWERS = Verdict("refused", 1.0), Verdict("complied", 0.0)
WANDERS = Verdict("invalid", 0.0, "off_topic")


def prompts(n):
    return [Prompt(str(i), "ab"[i % 2], "eval", f"Text {i}.", "x", "", str(i)) for i in range(n)]


def judged(asked, verdicts, finished=True):
    responses = [Response((1,), "text", finished) for _ in asked]
    return JudgedResponses(asked, responses, verdicts)


def whole(judged):
    """A screen that changes nothing, and sees all prompts at once."""
    assert len(judged.prompts) in (2, 4, 8)
    return judged


def test_off_asks_nothing():
    made = measure(judged(prompts(2), [REFUSES, ANSWERS]), SensitivityConfig(), None, None)
    assert list(made) == ["greedy"]


def test_every_way_is_asked_for_and_only_cut_responses_again():
    asked, calls = prompts(8), []
    greedy = judged(asked, [REFUSES, ANSWERS] * 4)
    cut = [Response((1,), "text", finished=i not in (1, 3)) for i in range(8)]
    greedy = JudgedResponses(asked, cut, greedy.verdicts)

    def ask(way, some, sampling, cap):
        calls.append((way, [p.id for p in some], sampling, cap))
        return judged(some, [WANDERS if sampling == GREEDY else ANSWERS] * len(some))

    made = measure(greedy, SensitivityConfig(samples=2, long_tokens=300), ask, whole)
    everyone = [p.id for p in asked]
    assert calls == [
        ("sample.0", everyone, Sampling(1.0, seed=0), None),
        ("sample.1", everyone, Sampling(1.0, seed=1), None),
        ("long", ["1", "3"], GREEDY, 300),
    ]
    assert list(made) == ["greedy", "sample.0", "sample.1", "long"]
    assert made["greedy"]["a"]["refused"] == 4
    assert made["sample.1"]["a"] == made["greedy"]["b"]
    assert (made["long"]["b"]["complied"], made["long"]["b"]["off_topic"]) == (2, 2)


def test_nothing_cut_is_not_asked_again():
    made = measure(judged(prompts(2), [REFUSES] * 2), SensitivityConfig(long_tokens=9), None, whole)
    assert made["long"] == made["greedy"]


def test_ranges_pool_seeds():
    config = SensitivityConfig(samples=1)

    def run(*given):
        drawn = judged(prompts(4), given)
        return measure(judged(prompts(4), [REFUSES] * 4), config, lambda *_: drawn, whole)

    runs = [run(REFUSES, ANSWERS, ANSWERS, ANSWERS), run(ANSWERS, WANDERS, ANSWERS, WANDERS)]
    found = ranges(runs, ["a", "b"])
    assert found["a"]["rate"] == [0.25, 1.0]
    assert found["a"]["ways"]["sample.0"]["rate"] == 0.25
    assert found["b"]["shares"]["off_topic"] == [0.0, 0.5]
    assert found["b"]["shares"]["refused"] == [0.0, 1.0]
    invalid = [measure(judged(prompts(2), [WANDERS] * 2), SensitivityConfig(), None, None)]
    assert ranges(invalid, ["a"])["a"]["rate"] == [None, None]
    (arm, rows), *_ = table({"sensitivity": {"base": found}}).groups
    assert (arm, rows[0].cells[:3]) == ("base", ("A", "100.0\u202f%", "[25.0, 100.0]"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("samples", -1, "sensitivity.samples = -1 is below zero"),
        ("long_tokens", 20, "long_tokens = 20 is not above generation.max_new_tokens = 256"),
    ],
)
def test_a_wrong_setting_is_named(field, value, message):
    config = ema.default()
    config.sensitivity[field] = value
    with pytest.raises(UserError, match=message):
        ema.read(config)


def test_what_a_kill_leaves_is_not_asked_again(tmp_path):
    """Every way has a journal of its own in the stage's folder."""
    asked = prompts(4)
    journals = []

    class Session:
        config = StudyConfig(sensitivity=SensitivityConfig(samples=2, long_tokens=300))

        def respond_and_judge(self, model, some, *_, journal, **__):
            journals.append(journal)
            return judged(some, [ANSWERS] * len(some))

        def screened(self, judged, screen):
            return judged

    context = StageContext({}, {}, tmp_path)
    greedy = judged(asked, [REFUSES] * 4, finished=False)
    stage_bodies._sensitivity(Session(), context, None, greedy, None)
    names = ("sample.0", "sample.1", "long")
    assert journals == [tmp_path / f"sensitivity.{name}.jsonl" for name in names]
