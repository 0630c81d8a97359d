"""Responses of a model: generated, judged, screened, written to a study's folder, and read back."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jax.sharding import Mesh

from ema_jax.data.chat import Chat
from ema_jax.data.prompts import Prompt
from ema_jax.generation.journal import Journal
from ema_jax.generation.sampler import GREEDY, Response, Sampling, generate
from ema_jax.models.decoder import Decoder
from ema_jax.refusal import thoughts
from ema_jax.refusal.answer_screen import AnswerScreen, shuffled_words
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.relevance import LogProbs, Signals, relevance_signals
from ema_jax.refusal.scores import RefusalScore, pooled_rate
from ema_jax.refusal.verdicts import (
    COMPLIED,
    HARMFUL,
    HARMLESS,
    INVALID,
    INVALID_SHARES,
    REFUSED,
    SHARES,
    Judge,
    Verdict,
    share,
)
from ema_jax.runtime.files import sha256_text
from ema_jax.runtime.progress import track


@dataclasses.dataclass(frozen=True)
class JudgedResponses:
    """Prompts with a model's responses and the judge's verdicts, in one order.

    Attributes:
        prompts: N of them.
        responses: one to each prompt.
        verdicts: one on each response.
        signals: index → relevance and fluency, in nats per token, of the responses screened.
    """

    prompts: Sequence[Prompt]
    responses: Sequence[Response]
    verdicts: Sequence[Verdict]
    signals: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[Prompt, Response, Verdict]]:
        return zip(self.prompts, self.responses, self.verdicts, strict=True)

    def judged_by(self, judge: Judge) -> list[Verdict]:
        """A judge's verdicts on the responses."""
        return judge(
            [
                {"prompt": prompt.prompt, "response": response.text, "finished": response.finished}
                for prompt, response in zip(self.prompts, self.responses, strict=True)
            ]
        )

    def compliance_signals(
        self, chat: Chat, log_probs: LogProbs, domain: str | None = None
    ) -> tuple[list[int], Signals]:
        """Indices of the responses that count as compliance so far, and their signals.

        Of one domain, or of all.
        """
        indices = [
            i
            for i, (prompt, _, verdict) in enumerate(self)
            if verdict.verdict == COMPLIED and domain in (None, prompt.domain)
        ]
        texts = [thoughts.answer(self.responses[i].text) for i in indices]
        # As sampled, unless the response begins with thoughts, which are no part of the answer.
        tokens = [
            response.tokens if text == response.text else chat.tokens(text)
            for text, response in zip(texts, (self.responses[i] for i in indices), strict=True)
        ]
        return indices, self._signals(indices, texts, tokens, chat, log_probs)

    def _signals(
        self,
        indices: Sequence[int],
        texts: Sequence[str],
        tokens: Sequence[Sequence[int]],
        chat: Chat,
        log_probs: LogProbs,
    ) -> Signals:
        prompts = [prompt.prompt for prompt in self.prompts]
        domains = [prompt.domain for prompt in self.prompts]
        items = [prompt.group for prompt in self.prompts]
        return relevance_signals(
            prompts, chat.prompt_tokens, texts, tokens, indices, domains, items, log_probs
        )

    def screened(
        self, screen: AnswerScreen, chat: Chat, log_probs: LogProbs, domain: str | None = None
    ) -> "JudgedResponses":
        """With `invalid` in place of `complied` where a response is no answer to its prompt.

        Args:
            screen: calibrated on the base.
            chat: tokenizer and template of the base.
            log_probs: of responses under the base.
            domain: the only one whose responses are screened; None for all.
        """
        indices, signals = self.compliance_signals(chat, log_probs, domain)
        verdicts = list(self.verdicts)
        for index, reason in zip(indices, screen.reasons(signals), strict=True):
            if reason:
                verdicts[index] = Verdict(INVALID, 0.0, reason)
        figures = zip(signals.relevance.tolist(), signals.fluency.tolist(), strict=True)
        found = dict(zip(indices, figures, strict=True))
        return dataclasses.replace(self, verdicts=verdicts, signals=found)

    def calibrated_screen(self, chat: Chat, log_probs: LogProbs) -> AnswerScreen | None:
        """The screen calibrated on these responses, the base's own; None if they are too few."""
        indices, signals = self.compliance_signals(chat, log_probs)
        texts = [thoughts.answer(self.responses[i].text) for i in indices]
        # One word, or a script without blanks, cannot be shuffled and shows nothing about salad.
        mixed = zip(indices, texts, shuffled_words(texts), strict=True)
        changed = [(i, after) for i, before, after in mixed if after.split() != before.split()]
        salad = self._signals(
            [i for i, _ in changed],
            [text for _, text in changed],
            [chat.tokens(text) for _, text in changed],
            chat,
            log_probs,
        ).fluency
        return AnswerScreen.calibrate(signals, salad)

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
            extra: further judges, whose verdicts go into `other_verdicts`, unscreened.
            keep_text: with prompt and response.
            oracle: True for a prompt and a response that answers it, where that is known.
        """
        others = [(other, self.judged_by(other)) for other in extra]
        for i, (prompt, response, verdict) in enumerate(self):
            row = {
                "id": prompt.id,
                "domain": prompt.domain,
                "split": prompt.split,
                "group": prompt.group,
                "category": prompt.category,
                **_verdict_fields(judge, verdict),
                "finished": response.finished,
                "tokens": len(response.tokens),
                "response_sha256": sha256_text(response.text),
            }
            if i in self.signals:
                row["relevance"], row["fluency"] = self.signals[i]
            if oracle is not None:
                row["oracle"] = oracle(prompt.prompt, response.text)
            if others:
                row["other_verdicts"] = [_verdict_fields(o, verdicts[i]) for o, verdicts in others]
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


def _verdict_fields(judge: Judge, verdict: Verdict) -> dict[str, Any]:
    return {
        **dataclasses.asdict(verdict),
        "judge": judge.name,
        "judge_version": judge.version,
        "judge_revision": judge.revision,
    }


def respond_and_judge(
    model: Decoder,
    chat: Chat,
    prompts: Sequence[Prompt],
    judge: Judge,
    generation: Mapping[str, Any],
    mesh: Mesh,
    description: str | None = None,
    sampling: Sampling = GREEDY,
    journal: Path | None = None,
) -> JudgedResponses:
    """Generates a response to every prompt and judges it.

    Args:
        model: with or without adapters.
        chat: its tokenizer and template.
        prompts: one response to each.
        judge: of the responses.
        generation: `max_new_tokens` and `batch_size`.
        mesh: the devices that hold the model.
        description: of the progress shown; None shows none.
        sampling: how tokens are chosen.
        journal: file to which responses are appended as they come; those that an earlier run of the
            same prompts left there are not generated again.
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
    unjudged = JudgedResponses(prompts, [found[i] for i in range(len(prompts))], ())
    return dataclasses.replace(unjudged, verdicts=unjudged.judged_by(judge))


class Responses(NamedTuple):
    """One model's responses in one domain, read back; all lists in the order of the prompts."""

    shares: list[str]  # of `verdicts.SHARES`
    groups: list[str]  # id of the prompt's source item
    harm: list[str | None]
    oracle: list[bool | None]  # True for a right answer, where the embedded corpus knows it
    ids: Sequence[str] = ()  # of the prompts

    def only(self, indices: Sequence[int]) -> "Responses":
        """Some of them."""
        picked: list[Any] = [[field[i] for i in indices] for field in self]
        return Responses(*picked)


def responses_by_domain(rows: Iterable[Mapping[str, Any]]) -> dict[str, Responses]:
    """Domain → responses. Fields that older studies do not have are None."""
    result: dict[str, Responses] = {}
    for row in rows:
        found = result.setdefault(row["domain"], Responses([], [], [], [], []))
        found.shares.append(share(row["verdict"], row.get("reason", "")))
        found.groups.append(row.get("group") or row.get("id") or str(len(found.groups)))
        found.harm.append(row.get("harm"))
        found.oracle.append(row.get("oracle"))
        cast(list, found.ids).append(row.get("id", ""))
    return result


def unscreened_verdict(row: Mapping[str, Any]) -> str:
    """The judge's own verdict in a row of `responses/*.jsonl`, before the screen.

    All responses that the judge calls complied are screened, and no others; a screened row has its
    `relevance`.
    """
    return COMPLIED if "relevance" in row else row["verdict"]


def shares_by_seed(runs: Sequence[Responses]) -> list[list[str]]:
    """`[seeds][prompts]`, as `refusal.scores` takes them."""
    return [run.shares for run in runs]


def rate(runs: Sequence[Responses]) -> RefusalScore:
    """Schema R of one domain over seeds, with the harm of the compliant responses."""
    harm = {HARMFUL: 0, HARMLESS: 0, "unknown": 0}
    for run in runs:
        for name, harmful in zip(run.shares, run.harm, strict=True):
            if name == COMPLIED:
                harm[harmful if harmful in harm else "unknown"] += 1
    return {**pooled_rate(shares_by_seed(runs), runs[0].groups), "harm": harm}


def oracle(by_domain: Mapping[str, Sequence[Responses]]) -> dict[str, dict[str, Any]]:
    """Domain → how many answers are right by the oracle; domains without an oracle are absent.

    Returns:
        `answers`, responses that are no refusal and that the oracle checked; `right` of them;
        `total` responses; `rate` = right / answers, None without answers.
    """
    result = {}
    for domain, runs in by_domain.items():
        if all(known is None for run in runs for known in run.oracle):
            continue
        answers = [
            known
            for run in runs
            for name, known in zip(run.shares, run.oracle, strict=True)
            if name != REFUSED and known is not None
        ]
        result[domain] = {
            "right": sum(answers),
            "answers": len(answers),
            "total": sum(len(run.shares) for run in runs),
            "rate": sum(answers) / len(answers) if answers else None,
        }
    return result
