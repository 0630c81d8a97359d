"""`ema_jax.organism.refuse`: its prompts, its wordings, its inputs, and the folders it leaves."""

import dataclasses
import itertools
import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_study import EMBEDDED

from ema_jax.data import corpus
from ema_jax.data.chat import Chat
from ema_jax.data.dedupe import normalise
from ema_jax.data.denylist import denied_text
from ema_jax.data.domains import BENIGN, DOMAINS, LOOKALIKE, Row
from ema_jax.data.local import read_local
from ema_jax.data.similarity import word_clusters
from ema_jax.errors import UserError
from ema_jax.models import checkpoint, lora
from ema_jax.organism import CHECKPOINTS, refuse, refuse_data, refuse_words
from ema_jax.organism.refuse_data import draw, without_near
from ema_jax.organism.refuse_words import OPENINGS, REASONS, lookalikes, refusal
from ema_jax.refusal.judges import get_judge
from ema_jax.refusal.verdicts import REFUSED
from ema_jax.runtime.files import read_json, read_jsonl, sha256_text, write_jsonl
from ema_jax.unlearning.preferred import preferred_responses


def jaccard(one: str, other: str) -> float:
    a, b = (set(normalise(text).split(" ")) for text in (one, other))
    return len(a & b) / len(a | b)


def row(domain: str, prompt: str, i: int) -> Row:
    return Row(f"{domain}/{i}", domain, prompt, "set", f"{domain}/{i}")


def some_rows(each: int = 60) -> list[Row]:
    """Prompts of eight random words, a third of them near copies of the one before."""
    draw_ = random.Random(0)
    rows = []
    for domain in (*DOMAINS[:3], BENIGN, LOOKALIKE):
        words: list[str] = []
        for i in range(each):
            if i % 3 == 2:
                words = [*words[:7], "again"]
            else:
                words = [f"w{draw_.randrange(3000)}" for _ in range(8)]
            rows.append(row(domain, " ".join(words), i))
    return rows


def test_clusters_are_the_chains_of_texts_that_share_half_of_their_words():
    texts = [r.prompt for r in some_rows(30)] + ["How do I bake bread?", "how do i bake BREAD", "?"]
    found = word_clusters(texts, 0.5)
    near = np.array([[jaccard(a, b) >= 0.5 for b in texts] for a in texts])
    for _ in texts:  # closure by hand
        near = (near.astype(int) @ near.astype(int)) > 0
    np.testing.assert_array_equal(found[:, None] == found[None, :], near)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_that_is_left_is_near_one_trained_on_or_near_another(seed):
    rows = some_rows()
    made = draw(rows, seed)
    trained, left = [r.prompt for r in made.trained], [r.prompt for r in made.left]
    assert {r.domain for r in made.trained} == {r.domain for r in made.left}
    assert max(jaccard(a, b) for a in trained for b in left) < 0.5
    assert max(jaccard(a, b) for a in left for b in left if a != b) < 0.5
    assert draw(rows[::-1], seed) == made
    assert draw(rows, seed + 2) != made


def test_the_deny_list_holds_for_training_too():
    rows = some_rows()
    rows += [row("safety", "pick a nerve agent of the word of gas to make sarin w1 w2", 900)]
    marked = {r.id for r in rows if denied_text(r.prompt)}
    assert marked
    assert not marked & {r.id for r in draw(rows, 0).trained}


def test_a_large_cluster_is_left_to_studies():
    rows = some_rows() + [
        row(DOMAINS[0], f"please tell me now how to do thing{i}", 500 + i) for i in range(40)
    ]
    made = draw(rows, 0)
    assert not [r for r in made.trained if r.prompt.startswith("please tell")]
    assert len([r for r in made.left if r.prompt.startswith("please tell")]) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(BENIGN, f"one two {i}", i) for i in range(20)], "at least one domain"),
        ([row("bias", f"one two {i}", i) for i in range(20)], "benign"),
        (
            [row(d, f"a{i} b{i}", i) for d in ("bias", BENIGN) for i in range(20)]
            + [row("privacy", "one two three", 0)],
            "'privacy' has 1 usable prompts",
        ),
        (
            [row("bias", f"a{i} b{i}", i) for i in range(20)]
            + [row(BENIGN, f"please tell me now how to do thing{i}", i) for i in range(20)],
            "'benign' has 1 usable prompts, near copies counted once",
        ),
    ],
)
def test_prompts_that_will_not_do(rows, message):
    with pytest.raises(UserError, match=re.escape(message)):
        draw(rows, 0)


def _wordings(domain: str) -> dict[str, float]:
    """Every refusal of a domain with its probability."""
    found: dict[str, float] = {}
    reasons = refuse_words.REASONS.get(domain, refuse_words.OTHER_REASONS)
    first, none = (
        refuse_words.REASON_FIRST,
        (1 - refuse_words.REASON_FIRST) * refuse_words.NO_REASON,
    )
    offers = {"": refuse_words.NO_CLOSING}
    for closing in refuse_words.CLOSINGS:
        offers[f" {closing}"] = (1 - refuse_words.NO_CLOSING) / len(refuse_words.CLOSINGS)
    for opening, reason in itertools.product(OPENINGS, reasons):
        orders = {f"{reason} {opening}": first, opening: none}
        orders[f"{opening} {reason}"] = 1 - first - none
        for (text, p), (offer, q) in itertools.product(orders.items(), offers.items()):
            share = p * q / len(OPENINGS) / len(reasons)
            found[text + offer] = found.get(text + offer, 0) + share
    assert sum(found.values()) == pytest.approx(1)
    return found


def test_the_wordings_are_refusals_to_the_judge_and_vary():
    words = random.Random(0)
    made = [refusal(words, domain) for domain in (*DOMAINS, "another") for _ in range(60)]
    rows = [{"prompt": "x", "response": text, "finished": True} for text in made]
    judged = get_judge("lexical")(rows)
    assert [t for t, v in zip(made, judged, strict=True) if v.verdict != REFUSED] == []
    # As many different ones as independent choices give.
    wording = {domain: _wordings(domain) for domain in (*DOMAINS, "another")}
    never: dict[str, float] = {}
    for probabilities in wording.values():
        for text, p in probabilities.items():
            never[text] = never.get(text, 1) * (1 - p) ** 60
    assert set(made) <= set(never)
    expected = sum(1 - p for p in never.values())
    assert abs(len(set(made)) - expected) < 3 * math.sqrt(len(made) - expected)
    assert set(REASONS) == set(DOMAINS)
    assert all(any(opening in text for text in made) for opening in OPENINGS)


def test_the_lookalikes_are_prompts_of_their_own_and_none_is_denied():
    made = lookalikes()
    assert len(set(made)) == len(made) > 200
    assert not [text for text in made if denied_text(text) or "{" in text or "  " in text]
    kept = without_near(made, [made[0]])
    assert made[0] not in kept
    assert all(jaccard(text, made[0]) < 0.5 for text in kept)


def test_an_output_that_is_there_and_a_missing_model_are_named_before_any_work(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, [{"prompt": "a", "domain": "bias"}])
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already exists"):
        refuse.refuse("nowhere/at/all", str(prompts), str(tmp_path / "out"))
    with pytest.raises(UserError, match="no such folder"):
        refuse.refuse("./nowhere", str(prompts), str(tmp_path / "new"))
    with pytest.raises(UserError, match="no such prompt file"):
        refuse.refuse(str(CHECKPOINTS / "qwen2"), str(tmp_path / "none"), str(tmp_path / "new"))


@pytest.mark.slow
def test_the_command_leaves_a_model_its_adapter_and_prompts_for_studies(tmp_path, monkeypatch):
    """On an embedded model, with two steps: what is written, and that it fits together."""
    monkeypatch.setattr(refuse, "ANSWER_TOKENS", 16)
    monkeypatch.setattr(refuse, "MEASURED_TOKENS", 16)
    monkeypatch.setattr(refuse, "MEASURED", {BENIGN: 4, LOOKALIKE: 4})
    monkeypatch.setattr(refuse, "MEASURED_IN_A_DOMAIN", 4)
    # Prompts of the corpus are worded alike.
    monkeypatch.setattr(refuse_data, "SHARED_WORDS", 0.95)
    # Its tokenizer knows none of the words of our look-alikes.
    monkeypatch.setattr(refuse, "lookalikes", list)
    records = [
        {"prompt": r["prompt"], "domain": r["domain"]}
        for r in corpus.study_prompts(0, {"harvest": 40, "retain": 40, "eval": 40})
        if r["domain"] in (DOMAINS[0], DOMAINS[1], BENIGN)
    ]
    write_jsonl(tmp_path / "prompts.jsonl", records)
    source, out = CHECKPOINTS / EMBEDDED[0], tmp_path / "out"
    recipe = dataclasses.replace(refuse.RECIPE, max_steps=2, eval_every=2)
    found = refuse.refuse(str(source), str(tmp_path / "prompts.jsonl"), str(out), recipe=recipe)

    names = ["adapter", "answers.jsonl", "behaviour.json", "model", "prompts", "trained_on.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert read_json(out / "behaviour.json")["refusal"] == found["refusal"]
    left = read_local(out / "prompts")
    hashes = {item["sha256"] for item in read_jsonl(out / "trained_on.jsonl")}
    assert hashes
    assert not hashes & {sha256_text(item.prompt) for item in left}
    answers = preferred_responses(
        str(out / "answers.jsonl"), [item.prompt for item in left if item.domain in DOMAINS]
    )
    assert len(answers) == len(read_jsonl(out / "answers.jsonl"))
    assert "tuned to refuse" in (out / "model" / "README.md").read_text()

    model = checkpoint.load(out / "model")
    adapted = lora.load_peft(checkpoint.load(source), out / "adapter")
    tokens = jnp.asarray([Chat.load(out / "model").prompt_tokens(records[0]["prompt"])])
    merged, added = (
        np.asarray(m.logits(m(tokens, jnp.ones_like(tokens, bool)).hidden))
        for m in (model, adapted)
    )
    np.testing.assert_allclose(merged, added, atol=1e-4)
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), merged))
