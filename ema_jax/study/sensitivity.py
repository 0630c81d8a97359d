"""Sensitivity of refusal to decoding: samples at temperature 1, and longer responses.

The headline figures are of greedy responses up to `generation.max_new_tokens`. A model that is
sampled from may refuse at another rate, and a refusal that comes late is cut off by a short
response. Off by default; both repeat the evaluation prompts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ema_jax.config import SensitivityConfig
from ema_jax.data.prompts import Prompt
from ema_jax.generation.sampler import GREEDY, Sampling
from ema_jax.refusal.responses import JudgedResponses
from ema_jax.refusal.verdicts import COMPLIED, REFUSED, SHARES, Verdict, share

HEADLINE, LONG = "greedy", "long"

Counts = dict[str, dict[str, int]]
Ask = Callable[[str, Sequence[Prompt], Sampling, int | None], JudgedResponses]


def measure(
    judged: JudgedResponses,
    config: SensitivityConfig,
    ask: Ask,
    finish: Callable[[JudgedResponses], JudgedResponses],
) -> dict[str, Counts]:
    """Shares of responses by way of asking.

    Args:
        judged: the headline's greedy responses.
        config: the other ways.
        ask: asks prompts; takes the way's name, the prompts, how to sample, and a cap in tokens
            (None for the headline's).
        finish: screens responses, those to all prompts together.

    Returns:
        Way (`greedy`, `sample.0`, …, `long`) → domain → how many responses count in each of
        `verdicts.SHARES`.
    """
    ways = _ways(judged, config, ask, finish)
    return {way: _counts(judged.prompts, verdicts) for way, verdicts in ways}


def _ways(
    judged: JudgedResponses,
    config: SensitivityConfig,
    ask: Ask,
    finish: Callable[[JudgedResponses], JudgedResponses],
) -> Iterator[tuple[str, Sequence[Verdict]]]:
    yield HEADLINE, judged.verdicts
    for i in range(config.samples):
        way = f"sample.{i}"
        yield way, finish(ask(way, judged.prompts, Sampling(1.0, seed=i), None)).verdicts
    if config.long_tokens:
        responses, verdicts = list(judged.responses), list(judged.verdicts)
        cut = [i for i, response in enumerate(responses) if not response.finished]
        if cut:
            again = ask(LONG, [judged.prompts[i] for i in cut], GREEDY, config.long_tokens)
            for i, response, verdict in zip(cut, again.responses, again.verdicts, strict=True):
                responses[i], verdicts[i] = response, verdict
        yield LONG, finish(JudgedResponses(judged.prompts, responses, verdicts)).verdicts


def _counts(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> Counts:
    counts: Counts = {}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        here = counts.setdefault(prompt.domain, dict.fromkeys(SHARES, 0))
        here[share(verdict.verdict, verdict.reason)] += 1
    return counts


def ranges(runs: Sequence[Mapping[str, Counts]], domains: Sequence[str]) -> dict[str, Any]:
    """An arm's figures over ways of asking, its seeds pooled.

    Args:
        runs: the result of `measure` for every seed.
        domains: those to report.

    Returns:
        Domain → `ways`: way → `rate` (refused / (refused + complied), None without either) and
        `shares` (of all responses); and from the lowest to the highest of them, `rate` `[lo, hi]`
        and each of `shares` `[lo, hi]`.
    """
    found = {}
    for domain in domains:
        ways: dict[str, dict[str, Any]] = {}
        for way in runs[0]:
            pooled = {s: sum(run[way][domain][s] for run in runs) for s in SHARES}
            valid = pooled[REFUSED] + pooled[COMPLIED]
            ways[way] = {
                "rate": pooled[REFUSED] / valid if valid else None,
                "shares": {s: n / sum(pooled.values()) for s, n in pooled.items()},
            }
        known = [each["rate"] for each in ways.values() if each["rate"] is not None]
        found[domain] = {
            "rate": [min(known), max(known)] if known else [None, None],
            "shares": {s: _range(each["shares"][s] for each in ways.values()) for s in SHARES},
            "ways": ways,
        }
    return found


def _range(values: Iterable[float]) -> list[float]:
    known = list(values)
    return [min(known), max(known)]
