"""Thoughts are cut off before a response is judged; what only talks of their markers stays."""

import itertools
import time

import pytest

from ema_jax.refusal.judges import TEXT_JUDGES, get_judge
from ema_jax.refusal.thoughts import answer
from ema_jax.refusal.validity import judge_valid
from ema_jax.refusal.verdicts import Verdict

THOUGHT = "The user asks for the station.\nI cannot help with that? I can: it is a mild question."
ANSWER = "The station is on the left, behind the old mill."

PAIRS = [
    ("<think>", "</think>"),
    ("<THINK>", "</Think>"),
    ("< think >", "</ think >"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<thoughts>", "</thoughts>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<inner_monologue>", "</inner_monologue>"),
    ("<|think|>", "<|/think|>"),
    ("[THINK]", "[/THINK]"),
    ("[think]", "[/think]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<unused94>thought", "<unused95>"),
    ("◁think▷", "◁/think▷"),
]


@pytest.mark.parametrize(("opens", "closes"), PAIRS)
def test_thoughts_of_every_family_are_cut(opens, closes):
    for between, before in itertools.product(("\n", "\n\n", " "), ("", "\n", " ")):
        closed = f"{before}{opens}{between}{THOUGHT}{between}{closes}{between}{ANSWER}\n"
        assert answer(closed) == ANSWER
        assert answer(f"{before}{THOUGHT}{between}{closes}{between}{ANSWER}") == ANSWER
        assert answer(f"{before}{opens}{between}{THOUGHT} And then") == ""
        assert answer(f"{before}{opens}{between}{closes}{between}{ANSWER}") == ANSWER
    assert answer(f"Sure.\n{opens}\n{THOUGHT}\n{closes}\n{ANSWER}") == f"Sure.\n\n{ANSWER}"
    assert answer(f"Sure.\n{opens}\n{THOUGHT}") == "Sure."
    assert answer(f"{opens}{THOUGHT}{closes}") == ""
    twice = f"{opens}{THOUGHT}{closes}\n{opens}{THOUGHT}{closes}\n{ANSWER}"
    assert answer(twice) == ANSWER


WRAPPED = [
    f"<|begin_of_thought|>{THOUGHT}<|end_of_thought|>\n"
    f"<|begin_of_solution|>\n{ANSWER}\n<|end_of_solution|>",
    f"<think>{THOUGHT}</think>\n<answer>\n{ANSWER}</answer>",
    f"<think>{THOUGHT}</think><response>{ANSWER}</response>\n",
    f"<thinking>{THOUGHT}</thinking><output>{ANSWER}",
    f"<|START_THINKING|>{THOUGHT}<|END_THINKING|><|START_RESPONSE|>{ANSWER}<|END_RESPONSE|>",
    f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
    f"<|channel|>final<|message|>{ANSWER}<|return|>",
    f"{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}",
    f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>commentary "
    f"to=functions.map <|constrain|>json<|message|>{{}}<|call|><|start|>assistant"
    f"<|channel|>final<|message|>{ANSWER}<|end|>",
    f"analysis{THOUGHT}assistantfinal{ANSWER}",
    f"Here is my thought process: {THOUGHT}\n\nHere is my response:\n{ANSWER}",
    f"<seed:think>{THOUGHT}<seed:cot_budget_reflect>12 tokens.</seed:cot_budget_reflect>"
    f"</seed:think>{ANSWER}",
    f"<think>{THOUGHT} <think>once more</think> so:</think>{ANSWER}",
    f"<think>The marker `</think>` ends it, they say.\n</think>\n{ANSWER}",
    f"<think>\n```python\nprint(1)\n</think>\n{ANSWER}",
    f"<think>\n\n</think>\n\n</think>\n\n{ANSWER}",
    f"<thinking>{THOUGHT}<reflection>Right.</reflection></thinking>{ANSWER}",
]


@pytest.mark.parametrize("text", WRAPPED)
def test_the_answer_alone_is_left(text):
    assert answer(text) == ANSWER


@pytest.mark.parametrize(
    "text",
    [
        f"<|channel|>analysis<|message|>{THOUGHT}",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|>",
        f"Here is my thought process: {THOUGHT}",
        "<think>",
        "\n <think>\n",
        "</think>",
        "<think></think>",
        f"{THOUGHT}</think>",
        f"<think>{THOUGHT} <think> {THOUGHT}",
    ],
)
def test_nothing_but_thoughts_is_nothing(text):
    assert answer(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        ANSWER,
        f"  {ANSWER}\n\n",
        "Some models write <think> before they answer, others do not.",
        "Use `<think>` to open a thought and `</think>` to close it.",
        'The tokens "<think>" and "</think>" are single ones.',
        "A template:\n```\n<think>\nA thought.\n</think>\nAn answer.\n```\nThat is all.",
        "~~~xml\n<reasoning>\nA thought.\n</reasoning>\n~~~\nThat is all.",
        "I think </ b> is a typing error, and 3 < 4 > 2.",
        "He closed the [thinking] with a nod.",
        "analysis of the final text, by an assistant",
        "The channel is named in `<|channel|>final<|message|>x<|end|>`.",
        "<b>Think</b> of <reasons> why.",
        "A thought process: begin, then end.",
        "<table><tr><td>1</td></tr></table>",
    ],
)
def test_a_text_without_thoughts_comes_back_as_it_is(text):
    assert answer(text) == text


def test_a_mention_after_the_thoughts_stays():
    text = "The marker </think> closes a thought, `<think>` opens one."
    assert answer(f"<think>{THOUGHT}</think>\n{text}") == text
    assert answer("Sure. <think>hm</think> Paris.").split() == ["Sure.", "Paris."]


@pytest.mark.parametrize(
    "text",
    [
        "`" * 20_000,
        "<" + " " * 20_000,
        "< " * 10_000,
        "a <think> " * 1000,
        "<|channel|>" + "a" * 20_000,
        "<|channel|>analysis<|message|>" * 1000,
        "</think>" * 3000,
        "```" * 5001,
        "".join("`" * (i % 7 + 1) + "x" for i in range(5000)),
        " " * 20_000,
    ],
)
def test_no_text_is_slow(text):
    start = time.process_time()
    answer(text)
    assert time.process_time() - start < 2


def test_every_judge_sees_the_answer_and_the_rows_stay_as_they_are():
    thinking = {"prompt": "Where?", "response": f"<think>I cannot help.</think>{ANSWER}", "id": 1}
    declining = {"prompt": "Where?", "response": "<think>Easy!</think>I cannot help with that."}
    cut = {"prompt": "Where?", "response": f"<think>{THOUGHT}", "finished": False}
    rows = [thinking, declining, cut, {"prompt": "no response"}]
    before = [dict(row) for row in rows]
    seen = []

    def judge(valid):
        seen.extend(valid)
        return [Verdict.of(0.0)] * len(valid)

    verdicts = judge_valid(rows, "LATIN", judge)
    assert rows == before
    assert seen == [
        {**thinking, "response": ANSWER},
        {**declining, "response": "I cannot help with that."},
        {"prompt": "no response"},
    ]
    assert [v.verdict for v in verdicts] == ["complied", "complied", "invalid", "complied"]
    assert verdicts[2].reason == "empty"

    for name in TEXT_JUDGES:
        bare = [{"prompt": "Where?", "response": answer(row["response"])} for row in rows[:3]]
        assert get_judge(name)(rows[:3]) == get_judge(name)(bare)
    assert [v.verdict for v in get_judge("lexical")(rows[:3])] == ["complied", "refused", "invalid"]
