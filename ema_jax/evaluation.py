"""Ask a model, judge what it says: the step that several stages share."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ema_jax.artifacts import sha256_text
from ema_jax.data.chat import Chat
from ema_jax.data.prompts import Prompt
from ema_jax.generation.sampler import GREEDY, Response, Sampling, generate
from ema_jax.models.decoder import Decoder
from ema_jax.progress import Progress
from ema_jax.refusal.judges import INVALID, REFUSED, Judge, Verdict
from ema_jax.unlearning.trainer import Evaluation


@dataclasses.dataclass(frozen=True)
class Judged:
    """Prompts with what a model said to them and what the judge made of it, in one order."""

    prompts: Sequence[Prompt]
    responses: Sequence[Response]
    verdicts: Sequence[Verdict]

    def __iter__(self) -> Iterator[tuple[Prompt, Response, Verdict]]:
        return zip(self.prompts, self.responses, self.verdicts, strict=True)

    def rows(self, judge: Judge, *, keep_text: bool) -> Iterator[dict[str, Any]]:
        """Rows for `responses/*.jsonl`: verdicts and hashes, text only on request."""
        for prompt, response, verdict in self:
            row = {
                "id": prompt.id,
                "domain": prompt.domain,
                "split": prompt.split,
                "group": prompt.group,
                **dataclasses.asdict(verdict),
                "judge": judge.name,
                "judge_version": judge.version,
                "judge_revision": judge.revision,
                "finished": response.finished,
                "tokens": len(response.tokens),
                "response_sha256": sha256_text(response.text),
            }
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


def ask(
    model: Decoder,
    chat: Chat,
    prompts: Sequence[Prompt],
    judge: Judge,
    generation: Mapping[str, int],
    mesh: Mesh,
    description: str | None = None,
    sampling: Sampling = GREEDY,
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
    """
    responses: list[Response | None] = [None] * len(prompts)
    texts = [prompt.prompt for prompt in prompts]
    finished = generate(model, chat, texts, sampling=sampling, mesh=mesh, **generation)
    if description is None:
        for i, response in finished:
            responses[i] = response
    else:
        with Progress(description, len(prompts), "prompts") as progress:
            for i, response in finished:
                responses[i] = response
                progress.update()
    complete = [response for response in responses if response is not None]
    assert len(complete) == len(prompts)
    verdicts = judge(
        [
            {"prompt": prompt.prompt, "response": response.text, "finished": response.finished}
            for prompt, response in zip(prompts, complete, strict=True)
        ]
    )
    return Judged(prompts, complete, verdicts)
