"""Harvest, the paper's first phase: the model's own refusals become the forget and retain sets."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ema_jax.data.chat import Chat, TokenExample
from ema_jax.data.dedupe import normalise
from ema_jax.data.prompts import Prompt
from ema_jax.errors import UserError
from ema_jax.generation.sampler import Response
from ema_jax.refusal.verdicts import COMPLIED, REFUSED, Verdict


@dataclasses.dataclass(frozen=True)
class Harvested:
    """A prompt with the model's own response to it, kept as a training example."""

    id: str
    domain: str
    prompt: str
    response: str
    tokens: tuple[int, ...]  # as sampled, so that no re-tokenising shifts them

    def example(self, chat: Chat) -> TokenExample:
        """Token ids to train on."""
        return TokenExample(chat.prompt_tokens(self.prompt), self.tokens)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Harvested":
        """The inverse of `dataclasses.asdict`, as read from JSON lines."""
        return cls(**{**row, "tokens": tuple(row["tokens"])})


def harvest(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    verdicts: Sequence[Verdict],
    *,
    benign: str,
    minimum: int,
    cap: int,
) -> list[Harvested]:
    """The refusals in the responsible-AI domains and the valid answers to the benign contrast.

    Args:
        prompts: the prompts, each as often as it has a response.
        responses: the model's, in the same order; of responses to one prompt that differ in case,
            blanks or punctuation only, the first is kept.
        verdicts: the judge's, in the same order.
        benign: name of the contrast, whose answers (not refusals) are kept.
        minimum: fewest prompts with an example per domain.
        cap: longest response kept, in tokens; a longer one is cut and has no end of sequence.

    Raises:
        UserError: a domain gives examples for fewer than `minimum` prompts.
    """
    kept: dict[tuple[str, str], Harvested] = {}
    for prompt, response, verdict in zip(prompts, responses, verdicts, strict=True):
        if verdict.verdict == (COMPLIED if prompt.domain == benign else REFUSED):
            tokens = response.tokens[:cap]
            item = Harvested(prompt.id, prompt.domain, prompt.prompt, response.text, tokens)
            kept.setdefault((prompt.id, normalise(response.text)), item)
    asked, got = _by_domain(prompts), _by_domain(kept.values())
    for domain in asked:
        if got[domain] < minimum:
            kind = "answers" if domain == benign else "refusals"
            raise UserError(
                f"harvest: {domain} gave {got[domain]} {kind} for {asked[domain]} prompts "
                f"({got[domain] / asked[domain]:.0%}) and {minimum} are needed; ask more prompts "
                "(prompts.counts), draw several responses (harvest.samples), or lower "
                "harvest.min_examples"
            )
    return list(kept.values())


def harvest_yield(prompts: Sequence[Prompt], kept: Sequence[Harvested]) -> dict[str, float]:
    """Share of each domain's prompts that gave an example."""
    asked, got = _by_domain(prompts), _by_domain(kept)
    return {domain: got[domain] / number for domain, number in asked.items()}


def retained(kept: Sequence[Harvested], counts: Mapping[str, int]) -> list[Harvested]:
    """The retain set of an arm.

    Args:
        kept: all that was harvested.
        counts: domain → largest number of its examples, the first ones; empty takes all.

    Raises:
        UserError: a domain that has no example.
    """
    if not counts:
        return list(kept)
    taken: Counter[str] = Counter()
    chosen = []
    for item in kept:
        if taken[item.domain] < counts.get(item.domain, 0):
            taken[item.domain] += 1
            chosen.append(item)
    for domain in counts:
        if not taken[domain]:
            there = ", ".join(dict.fromkeys(item.domain for item in kept))
            raise UserError(f"retain_counts: {domain} has no retain example; there are: {there}")
    return chosen


def _by_domain(items: Iterable[Prompt | Harvested]) -> Counter[str]:
    """Domain → number of distinct prompts."""
    return Counter(domain for domain, _ in {(item.domain, item.id) for item in items})
