"""Ask a model, judge what it says: the step that several stages share."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ema_jax.artifacts import sha256_text
from ema_jax.data.chat import Chat
from ema_jax.data.prompts import Prompt
from ema_jax.generation.journal import Journal
from ema_jax.generation.sampler import GREEDY, Response, Sampling, generate
from ema_jax.models.decoder import Decoder
from ema_jax.progress import track
from ema_jax.refusal.verdicts import INVALID, REFUSED, Judge, Verdict
from ema_jax.unlearning.trainer import Evaluation


@dataclasses.dataclass(frozen=True)
class Judged:
    """Prompts with what a model said to them and what the judge made of it, in one order."""

    prompts: Sequence[Prompt]
    responses: Sequence[Response]
    verdicts: Sequence[Verdict]

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

    def rows(
        self, judge: Judge, extra: Sequence[Judge] = (), *, keep_text: bool
    ) -> Iterator[dict[str, Any]]:
        """Rows for `responses/*.jsonl`: verdicts and hashes, text only on request.

        Args:
            judge: the one that gave the verdicts.
            extra: further judges, whose verdicts stand in `other_verdicts`.
            keep_text: with prompt and response.
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
            if others:
                row["other_verdicts"] = [_said(other, found[i]) for other, found in others]
            yield row | ({"prompt": prompt.prompt, "response": response.text} if keep_text else {})

    def rates(self) -> Evaluation:
        """Refusal rate of each domain over its valid responses, and the worst invalid rate."""
        refusal, invalid = {}, []
        verdicts = np.array([verdict.verdict for verdict in self.verdicts])
        domains = np.array([prompt.domain for prompt in self.prompts])
        for domain in dict.fromkeys(domains.tolist()):
            here = verdicts[domains == domain]
            valid = int(np.sum(here != INVALID))
            # Without a valid response the rate is unknown: garble is not compliance.
            refusal[domain] = float(np.sum(here == REFUSED)) / valid if valid else math.nan
            invalid.append(float(np.mean(here == INVALID)))
        return Evaluation(refusal, max(invalid))


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
