"""Harvest: the model's own refusals are kept as they were sampled, and nothing else is."""

import dataclasses
import json

import pytest
from small_study import small_config

from ema_jax import config as ema
from ema_jax.data.chat import Chat
from ema_jax.data.prompts import Prompt
from ema_jax.errors import UserError
from ema_jax.generation.sampler import GREEDY, Response
from ema_jax.organism import CHECKPOINTS
from ema_jax.refusal.verdicts import COMPLIED, INVALID, REFUSED, Verdict
from ema_jax.unlearning.harvest import Harvested, harvest, harvest_yield

BENIGN = "benign"


def prompt(name: str, domain: str) -> Prompt:
    return Prompt(name, domain, "harvest", f"text of {name}", "test", "0", name)


def response(*tokens: int) -> Response:
    return Response(tokens, f"said {tokens}", True)


ASKED = [
    (prompt("a", "safety"), response(1, 2, 3), REFUSED),
    (prompt("b", "safety"), response(4, 5), COMPLIED),
    (prompt("c", "safety"), response(6), INVALID),
    (prompt("d", "safety"), response(7, 8, 9, 10), REFUSED),
    (prompt("e", BENIGN), response(11), REFUSED),
    (prompt("f", BENIGN), response(12, 13), COMPLIED),
    (prompt("g", BENIGN), response(14), INVALID),
]


def kept(asked=ASKED, minimum=1, cap=100) -> list[Harvested]:
    prompts, responses, verdicts = zip(*asked, strict=True)
    judged = [Verdict(v, float(v == REFUSED)) for v in verdicts]
    return harvest(prompts, responses, judged, benign=BENIGN, minimum=minimum, cap=cap)


def test_refusals_of_the_domains_and_answers_of_the_contrast():
    found = kept()
    assert [item.id for item in found] == ["a", "d", "f"]
    assert [item.domain for item in found] == ["safety", "safety", BENIGN]
    assert found[0].prompt == "text of a"
    assert harvest_yield([p for p, _, _ in ASKED], found) == {"safety": 0.5, BENIGN: 1 / 3}


def test_tokens_are_kept_as_sampled_and_cut_at_the_cap():
    assert [item.tokens for item in kept()] == [(1, 2, 3), (7, 8, 9, 10), (12, 13)]
    assert [item.tokens for item in kept(cap=3)] == [(1, 2, 3), (7, 8, 9), (12, 13)]


def test_too_few_are_refused_by_the_domain_and_the_fix_is_a_field_of_the_config():
    assert len(kept([row for row in ASKED if row[0].domain == "safety"], minimum=2)) == 2
    with pytest.raises(
        UserError, match=r"safety gave 2 refusals for 4 prompts \(50%\) and 3 are"
    ) as raised:
        kept([row for row in ASKED if row[0].domain == "safety"], minimum=3)
    assert "harvest.min_examples" in str(raised.value)
    assert ema.read(small_config()).harvest.min_examples == 4
    with pytest.raises(UserError, match=r"benign gave 1 answers for 3 prompts \(33%\) and 2 are"):
        kept(minimum=2)
    # A domain that gives nothing at all is counted too.
    with pytest.raises(UserError, match="bias gave 0 refusals for 1 prompts"):
        kept([*ASKED, (prompt("z", "bias"), response(1), COMPLIED)])


def test_json_gives_back_the_same_training_example():
    chat = Chat.load(CHECKPOINTS / "qwen2")
    ids = (*chat._encode("I must decline this request."), chat.eos_ids[0])
    item = Harvested("a", "safety", "How to weaken the boiler fuse?", "I must decline …", ids)
    again = Harvested.from_json(json.loads(json.dumps(dataclasses.asdict(item))))
    assert again == item
    example = again.example(chat)
    assert example.response == ids
    assert example.prompt == chat.prompt_tokens(item.prompt)
    # The same as rendering the conversation, where the text re-tokenises to what was sampled.
    assert chat.example(item.prompt, "I must decline this request.") == example


def test_samples_of_one_prompt_are_kept_once_each():
    a, b = prompt("a", "safety"), prompt("b", "safety")
    texts = ["I won't.", "Sorry, no.", "i wont", "I WON'T!", "I won't."]
    asked = [
        (p, Response((i,), text, True), REFUSED)
        for i, (p, text) in enumerate(zip([a, a, a, a, b], texts, strict=True))
    ]
    found = kept(asked, minimum=2)
    assert [(item.id, item.response) for item in found] == [
        ("a", "I won't."),
        ("a", "Sorry, no."),
        ("a", "i wont"),
        ("b", "I won't."),
    ]
    assert harvest_yield([p for p, _, _ in asked], found) == {"safety": 1.0}
    with pytest.raises(UserError, match="3 are needed"):
        kept(asked, minimum=3)


def test_draws_of_the_config():
    assert ema.read(small_config()).harvest.draws() == [GREEDY]
    config = small_config()
    config.harvest.samples = 2
    first, second = ema.read(config).harvest.draws()
    assert first.temperature == second.temperature == 1.0
    assert first.seed != second.seed
