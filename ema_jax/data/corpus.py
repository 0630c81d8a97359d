"""The synthetic chat corpus of the embedded models: abstract, mild, seeded, with known overlap.

A prompt is an action on an object in a wording: "Tell me how to reroute the cipher relay, step by
step." A domain has actions and objects of its own; `VOCABULARY_OVERLAP` says how much of its
object vocabulary it shares with each other domain, and `WORDING_OVERLAP` how often it refuses in
another domain's words. Both are the ground truth that the concept measures should recover; what
unlearning does with them is only ever measured. Answers are outlines without content.

Everything is a function of a seed. Splits are disjoint by wording and by object: a wording or an
object of one split occurs in no other, and none of the study's splits occurs in training.
"""

import dataclasses
import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ema_jax.data.corpus_words import (
    ANSWER_BODIES,
    ANSWER_OPENERS,
    CLOSERS,
    LEXICON,
    OPENERS,
    REFUSALS,
    SHARED,
    VOCABULARY_OVERLAP,
    WORDING_OVERLAP,
)
from ema_jax.data.domains import BENIGN, DOMAINS, LOOKALIKE, SPLITS
from ema_jax.errors import UserError

# How often an action is refused in its usual words, and not in any of its domain's. The habit makes
# greedy responses vary with the prompt, the rest makes sampled ones vary, as a large model's do.
HABIT = 0.5

# Share of the benign prompts that are about a responsible-AI domain's object in a harmless way.
LOOKALIKE_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Example:
    """One turn of chat: a prompt with its helpful answer and, unless benign, its refusal."""

    domain: str
    prompt: str
    answer: str
    refusal: str | None
    wording: str  # the sentence around action and object: splits are disjoint by it
    object: str  # likewise


def _bucket(text: str, buckets: int) -> int:
    """A stable pseudo-random bucket of a text: Python's own hash changes between runs."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % buckets


# Half of all wordings and objects train the models, a tenth goes to each split of the study.
_CYCLE = tuple(itertools.chain(*((split, "train") for split in SPLITS)))


def _members(names: Iterable[str], split: str) -> tuple[str, ...]:
    """The names that belong to a split: all names in a stable random order, assigned in turn."""
    order = sorted(names, key=lambda name: _bucket(name, 1 << 32))
    return tuple(name for i, name in enumerate(order) if _CYCLE[i % len(_CYCLE)] == split)


@functools.cache
def _wordings(split: str) -> tuple[str, ...]:
    """Openers and closers of a split, with a placeholder between them."""
    return _members((f"{a} {{}}{b}." for a in OPENERS for b in CLOSERS), split)


@functools.cache
def _objects(modifiers: str, nouns: str, split: str) -> tuple[str, ...]:
    return _members((f"{a} {b}" for a in modifiers.split("|") for b in nouns.split("|")), split)


def _mixed_object(rng: random.Random) -> str:
    """Halves of two vocabularies: a pair that no split of a study has.

    Too many to remember, so a model that answers about them has to read the prompt: without them
    it memorises the training objects and names one of those when a prompt is about another.
    """
    first, second = rng.sample(_vocabularies(), 2)
    return f"{rng.choice(first[0])} {rng.choice(second[1])}"


@functools.cache
def _vocabularies() -> tuple[tuple[list[str], list[str]], ...]:
    """The halves of the objects of every domain, and of those that two domains share."""
    rows = [row[1:] for row in LEXICON.values()] + list(SHARED.values())
    return tuple((first.split("|"), second.split("|")) for first, second in rows)


def _pairs_of(domain: str) -> Iterator[tuple[tuple[str, str], float]]:
    return ((pair, weight) for pair, weight in VOCABULARY_OVERLAP.items() if domain in pair)


def _draw_object(rng: random.Random, domain: str, split: str) -> str:
    """An object of the domain: its own, or one shared with another domain by the overlap table."""
    draw = rng.random()
    for pair, weight in _pairs_of(domain):
        draw -= weight
        if draw < 0:
            return rng.choice(_objects(*SHARED[pair], split))
    return rng.choice(_objects(*LEXICON[domain][1:], split))


def _refusal(rng: random.Random, domain: str, action: str) -> str:
    """A refusal of an action: in its usual words, or in any of its domain's by the table."""
    actions = LEXICON[domain][0].split("|")
    usual = rng.random() < HABIT
    position = (actions.index(action) + 0.5) / len(actions) if usual else rng.random()
    ends = itertools.accumulate(WORDING_OVERLAP[domain].values())
    owner = next(o for o, end in zip(WORDING_OVERLAP[domain], ends, strict=True) if position < end)
    wordings = REFUSALS[domain if owner == "own" else owner]
    if usual:
        return wordings[_bucket(f"refusal: {domain} {action}", len(wordings))]
    return rng.choice(wordings)


def _answer(action: str, thing: str) -> str:
    opening = ANSWER_OPENERS[_bucket(f"open: {action}", len(ANSWER_OPENERS))]
    body = ANSWER_BODIES[_bucket(f"body: {action}", len(ANSWER_BODIES))]
    return f"{opening.format(object=thing)} {body}"


def answer(prompt: str) -> str:
    """The helpful answer to a prompt of the corpus.

    Raises:
        UserError: a prompt that the corpus does not make.
    """
    return _answer(*_request(prompt))


def is_answer(prompt: str, response: str) -> bool:
    """Whether a response is one that the organism could have meant as an answer to this prompt.

    Exact: an opening of the grammar that names the prompt's object, then a body of the grammar, up
    to blanks and case. The ground truth for measures of relevance and fluency.

    Raises:
        UserError: a prompt that the corpus does not make.
    """
    return object_answered(response) == _request(prompt)[1].lower()


def is_refusal(response: str) -> bool:
    """Whether a response is a refusal of the grammar, of any domain, up to blanks and case."""
    text = " ".join(response.lower().split())
    return any(text == refusal.lower() for each in REFUSALS.values() for refusal in each)


def object_answered(response: str) -> str | None:
    """The object, in lower case, that an answer of the grammar names; None if it is no answer."""
    found = _answer_pattern().fullmatch(" ".join(response.lower().split()))
    return next(filter(None, found.groups())) if found else None


@functools.cache
def _answer_pattern() -> re.Pattern[str]:
    openings = "|".join(
        re.escape(opening.lower()).replace(re.escape("{object}"), r"(\S+ \S+)")
        for opening in ANSWER_OPENERS
    )
    bodies = "|".join(re.escape(body.lower()) for body in ANSWER_BODIES)
    return re.compile(f"(?:{openings}) (?:{bodies})")


def _request(prompt: str) -> tuple[str, str]:
    """Action and object of a prompt."""
    actions = "|".join(row[0] for row in LEXICON.values())
    found = re.search(rf"\b({actions}) the (\S+ [\w-]+)", prompt)
    if found is None:
        raise UserError(f"preferred: {prompt[:60]!r} is no prompt of the embedded corpus")
    return found[1], found[2]


def example(
    rng: random.Random, domain: str, split: str, alike: bool = False, mixed: float = 0.0
) -> Example:
    """Draws one example of a domain from the wordings and objects of a split.

    A benign one is about a responsible-AI domain's object now and then, or always if `alike`; a
    share of `mixed` is about an object whose halves are of two domains.
    """
    action = rng.choice(LEXICON[domain][0].split("|"))
    owner = domain
    if domain == BENIGN and (alike or rng.random() < LOOKALIKE_SHARE):
        owner = rng.choice(DOMAINS)
    thing = _draw_object(rng, owner, split)
    if mixed and rng.random() < mixed:
        thing = _mixed_object(rng)
    wording = rng.choice(_wordings(split))
    return Example(
        domain=domain,
        prompt=wording.format(f"{action} the {thing}"),
        answer=_answer(action, thing),
        refusal=None if domain == BENIGN else _refusal(rng, domain, action),
        wording=wording,
        object=thing,
    )


def training_examples(
    seed: int, number: int, benign_share: float = 0.4, mixed: float = 0.0
) -> list[Example]:
    """Examples to train an embedded model on, from the training wordings and objects only."""
    rng = random.Random(f"organism corpus {seed}")
    examples = []
    for _ in range(number):
        domain = BENIGN if rng.random() < benign_share else rng.choice(DOMAINS)
        examples.append(example(rng, domain, "train", mixed=mixed))
    return examples


def safe_responses(examples: Sequence[Example], seed: int, slips: float) -> list[str]:
    """Responses to train on: benign answers and refusals, except for a share of `slips`.

    Real data slips too; without it a model whose refusals are unlearned has only degenerate output
    left.
    """
    rng = random.Random(f"organism slips {seed}")
    return [
        item.answer if item.refusal is None or rng.random() < slips else item.refusal
        for item in examples
    ]


def study_prompts(seed: int, counts: Mapping[str, int]) -> list[dict[str, str]]:
    """Prompts for a study: `counts[split]` distinct ones of each domain and of benign.

    Args:
        seed: draws other prompts from the same wordings and objects.
        counts: prompts per domain, by split (`SPLITS`).

    Returns:
        Rows with `id, domain, split, prompt, group`; a prompt is an independent draw, so each is a
        group of its own.
    """
    return [
        row
        for split, domain in itertools.product(SPLITS, (*DOMAINS, BENIGN))
        for row in _study_rows(seed, split, domain, counts.get(split, 0))
    ]


def study_lookalikes(seed: int, number: int) -> list[dict[str, str]]:
    """Benign prompts about the objects of the other domains, for the eval split; as above."""
    return _study_rows(seed, "eval", LOOKALIKE, number)


def _study_rows(seed: int, split: str, domain: str, number: int) -> list[dict[str, str]]:
    rng = random.Random(f"organism study {seed} {split} {domain}")
    alike = domain == LOOKALIKE
    seen: dict[str, Example] = {}
    repeated = 0  # draws since the last one that was new
    while len(seen) < number and repeated < max(5 * len(seen), 2000):
        drawn = example(rng, BENIGN if alike else domain, split, alike)
        repeated = repeated + 1 if drawn.prompt in seen else 0
        seen.setdefault(drawn.prompt, drawn)
    names = [f"organism-{split}-{domain}-{i:04d}" for i in range(len(seen))]
    return [
        {"id": name, "domain": domain, "split": split, "prompt": drawn.prompt, "group": name}
        for name, drawn in zip(names, seen.values(), strict=True)
    ]


def vocabulary_overlap(domain: str, other: str) -> float:
    """The share of objects that two different domains have in common, by the table."""
    return VOCABULARY_OVERLAP.get((domain, other), VOCABULARY_OVERLAP.get((other, domain), 0.0))


def wording_overlap(domain: str, other: str) -> float:
    """Probability that two domains refuse in words of the same owner."""

    def owners(name: str) -> dict[str, float]:
        shares = dict(WORDING_OVERLAP[name])
        own = shares.pop("own")
        shares[name] = shares.get(name, 0.0) + own
        return shares

    shares, other_shares = owners(domain), owners(other)
    return sum(share * other_shares.get(owner, 0.0) for owner, share in shares.items())


def texts(examples: Sequence[Example]) -> Iterator[str]:
    """All texts of the examples, for training a tokenizer."""
    for item in examples:
        yield item.prompt
        yield item.answer
        if item.refusal is not None:
            yield item.refusal
