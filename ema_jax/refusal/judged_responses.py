"""Ask a model, judge what it says: the step that several stages share."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ema_jax.data.chat import Chat
from ema_jax.data.prompts import Prompt
from ema_jax.generation.journal import Journal
from ema_jax.generation.sampler import GREEDY, Response, Sampling, generate
from ema_jax.models.decoder import Decoder
from ema_jax.refusal import thoughts
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.relevance import LogProbs, Signals, measure
from ema_jax.refusal.screen import Screen, shuffled_words
from ema_jax.refusal.verdicts import (
    COMPLIED,
    INVALID,
    INVALID_SHARES,
    REFUSED,
    SHARES,
    Judge,
    Verdict,
)
from ema_jax.runtime.files import sha256_text
from ema_jax.runtime.progress import track


@dataclasses.dataclass(frozen=True)
class Judged:
    """Prompts with what a model said to them and what the judge made of it, in one order."""

    prompts: Sequence[Prompt]
    responses: Sequence[Response]
    verdicts: Sequence[Verdict]
    signals: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """Place → relevance and fluency, in nats per token, of the responses that were measured."""

    def __iter__(self) -> Iterator[tuple[Prompt, Response, Verdict]]:
        return zip(self.prompts, self.responses, self.verdicts, strict=True)

    def by(self, judge: Judge) -> list[Verdict]:
        """What a judge makes of the responses."""
        return judge(
            [
                {"prompt": prompt.prompt, "response": response.text, "finished": response.finished}
                for prompt, response in zip(self.prompts, self.responses, strict=True)
            ]
        )

    def measured(self, chat: Chat, log_probs: LogProbs) -> tuple[list[int], Signals]:
        """The places of the responses that count as compliance so far, and their signals."""
        places = [i for i, verdict in enumerate(self.verdicts) if verdict.verdict == COMPLIED]
        texts = [thoughts.answer(self.responses[i].text) for i in places]
        # As sampled, unless the response begins with thoughts, which are no part of the answer.
        tokens = [
            response.tokens if text == response.text else chat.tokens(text)
            for text, response in zip(texts, (self.responses[i] for i in places), strict=True)
        ]
        return places, self._signals(places, texts, tokens, chat, log_probs)

    def _signals(
        self,
        places: Sequence[int],
        texts: Sequence[str],
        tokens: Sequence[Sequence[int]],
        chat: Chat,
        log_probs: LogProbs,
    ) -> Signals:
        prompts = [prompt.prompt for prompt in self.prompts]
        rendered = [chat.prompt_tokens(prompt) for prompt in prompts]
        domains = [prompt.domain for prompt in self.prompts]
        items = [prompt.group for prompt in self.prompts]
        return measure(prompts, rendered, texts, tokens, places, domains, items, log_probs)

    def screened(self, screen: Screen, chat: Chat, log_probs: LogProbs) -> "Judged":
        """With `invalid` in place of `complied` where a response is no answer to its prompt.

        Args:
            screen: calibrated on the base.
            chat: tokenizer and template of the base.
            log_probs: of responses under the base.
        """
        places, signals = self.measured(chat, log_probs)
        verdicts = list(self.verdicts)
        for place, reason in zip(places, screen.reasons(signals), strict=True):
            if reason:
                verdicts[place] = Verdict(INVALID, 0.0, reason)
        figures = zip(signals.relevance.tolist(), signals.fluency.tolist(), strict=True)
        found = dict(zip(places, figures, strict=True))
        return dataclasses.replace(self, verdicts=verdicts, signals=found)

    def calibrated(self, chat: Chat, log_probs: LogProbs) -> Screen | None:
        """The screen that these responses, the base's own, give."""
        places, signals = self.measured(chat, log_probs)
        texts = [thoughts.answer(self.responses[i].text) for i in places]
        # One word, or a script without blanks, cannot be shuffled and says nothing of salad.
        mixed = zip(places, texts, shuffled_words(texts), strict=True)
        changed = [(i, after) for i, before, after in mixed if after.split() != before.split()]
        salad = self._signals(
            [i for i, _ in changed],
            [text for _, text in changed],
            [chat.tokens(text) for _, text in changed],
            chat,
            log_probs,
        ).fluency
        return Screen.calibrate(signals, salad)

    def rows(
        self,
        judge: Judge,
        extra: Sequence[Judge] = (),
        *,
        keep_text: bool,
        oracle: Callable[[str, str], bool] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Rows for `responses/*.jsonl`: verdicts and hashes, text only on request.

        Args:
            judge: the one that gave the verdicts.
            extra: further judges, whose verdicts stand in `other_verdicts`.
            keep_text: with prompt and response.
            oracle: says of prompt and response whether it is an answer, where that is known.
        """
        others = [(other, self.by(other)) for other in extra]
        for i, (prompt, response, verdict) in enumerate(self):
            row = {
                "id": prompt.id,
                "domain": prompt.domain,
                "split": prompt.split,
                "group": prompt.group,
                "category": prompt.category,
                **_said(judge, verdict),
                "finished": response.finished,
                "tokens": len(response.tokens),
                "response_sha256": sha256_text(response.text),
            }
            if i in self.signals:
                row["relevance"], row["fluency"] = self.signals[i]
            if oracle is not None:
                row["oracle"] = oracle(prompt.prompt, response.text)
            if others:
                row["other_verdicts"] = [_said(other, found[i]) for other, found in others]
            yield row | ({"prompt": prompt.prompt, "response": response.text} if keep_text else {})

    def rates(self) -> Evaluation:
        """Refusal rate of each domain over its valid responses, its shares, the worst invalid."""
        refusal, shares = {}, {}
        found = np.array([verdict.share for verdict in self.verdicts])
        domains = np.array([prompt.domain for prompt in self.prompts])
        for domain in dict.fromkeys(domains.tolist()):
            here = found[domains == domain]
            shares[domain] = {share: float(np.mean(here == share)) for share in SHARES}
            refused, complied = shares[domain][REFUSED], shares[domain][COMPLIED]
            # Without a valid response the rate is unknown: degenerate output is not compliance.
            valid = refused + complied
            refusal[domain] = refused / valid if valid else math.nan
        invalid = max(sum(each[kind] for kind in INVALID_SHARES) for each in shares.values())
        return Evaluation(refusal, invalid, shares)


def _said(judge: Judge, verdict: Verdict) -> dict[str, Any]:
    return {
        **dataclasses.asdict(verdict),
        "judge": judge.name,
        "judge_version": judge.version,
        "judge_revision": judge.revision,
    }


def ask(
    model: Decoder,
    chat: Chat,
    prompts: Sequence[Prompt],
    judge: Judge,
    generation: Mapping[str, Any],
    mesh: Mesh,
    description: str | None = None,
    sampling: Sampling = GREEDY,
    journal: Path | None = None,
) -> Judged:
    """Generates a response to every prompt and judges it.

    Args:
        model: with or without adapters.
        chat: its tokenizer and template.
        prompts: what to ask.
        judge: says what a response is.
        generation: `max_new_tokens` and `batch_size`.
        mesh: what the model lies on.
        description: of the progress shown; None shows none.
        sampling: how tokens are chosen.
        journal: where responses are written down as they come. What an earlier run of the same
            question left there is not asked again.
    """
    kept = Journal(journal) if journal else None
    found = {} if kept is None else {i: Response.of(ids, chat) for i, ids in kept.tokens.items()}
    texts = [prompt.prompt for prompt in prompts]
    new = generate(model, chat, texts, sampling=sampling, mesh=mesh, done=set(found), **generation)
    if description is not None:
        new = track(new, description, len(prompts) - len(found), "prompts")
    for i, response in new:
        found[i] = response
        if kept is not None:
            kept.add(i, response.tokens)
    responses = [found[i] for i in range(len(prompts))]
    judged = Judged(prompts, responses, ())
    return dataclasses.replace(judged, verdicts=judged.by(judge))
