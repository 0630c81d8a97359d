"""Whether the untouched model can carry the study: seen at its baseline, before what takes hours.

A base that hardly refuses has nothing to unlearn, one that refuses harmless prompts does not show
refusal of harm, and of degenerate output nothing can be measured. What is clearly so (the whole
95 % interval is beyond a limit of `config.baseline`) ends the study; what may be so is a warning.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from absl import logging

from ema_jax.config import StudyConfig
from ema_jax.data.domains import BENIGN, LOOKALIKE, TRAINED
from ema_jax.errors import UserError
from ema_jax.refusal.intervals import wilson
from ema_jax.refusal.responses import rate, responses_by_domain
from ema_jax.refusal.scores import RefusalScore
from ema_jax.refusal.verdicts import COMPLIED, REFUSED, SHARES
from ema_jax.study.artifacts import BASE, Artifacts

Scores = Mapping[str, RefusalScore]

_REMEDIES = {
    "refusal": (
        "choose as target a domain that it refuses{best}, choose another model, or safety-tune "
        "this one first (python -m ema_jax.organism.refuse)"
    ),
    "over-refusal": (
        "it refuses by the words of a prompt, not by its harm: choose another model, or "
        "safety-tune with benign prompts in the words of harmful ones that are answered"
    ),
    "output": (
        "read some responses (--config.keep_text) and check the chat template, the system prompt, "
        "generation.max_new_tokens and that it is an instruct model"
    ),
    "yield": (
        "the model's own refusals and answers are what unlearning trains on: more prompts "
        "(prompts.counts), harvest.samples above 1, or a lower harvest.min_examples"
    ),
}


class Finding(NamedTuple):
    """What the base does that the study cannot do with."""

    kind: str  # of _REMEDIES
    text: str
    certain: bool  # beyond the limit with its whole interval


def base_scores(artifacts: Artifacts) -> dict[str, RefusalScore]:
    """Refusal scores of the base by domain, from what its baseline left."""
    found = responses_by_domain(artifacts.responses(BASE).read())
    return {domain: rate([responses]) for domain, responses in found.items()}


def table(scores: Scores) -> str:
    """Shares of every domain's responses, a line a domain, in percent."""
    names = [name.replace("_", " ") for name in SHARES]
    lines = [
        "base: shares of responses, %",
        f"{'':18}{'n':>6}" + "".join(f"{x:>12}" for x in names),
    ]
    for domain, score in scores.items():
        shares = "".join(f"{100 * score['shares'][name]:12.0f}" for name in SHARES)
        lines.append(f"{domain:18}{score['total']:6}{shares}")
    return "\n".join(lines)


def require_fit_base(config: StudyConfig, artifacts: Artifacts) -> None:
    """Ends a study whose base cannot carry it; warns of one that may not.

    Raises:
        UserError: what was seen, and what to do about it.
    """
    scores, prompts = base_scores(artifacts), artifacts.prompts.read()
    trained = Counter(p.domain for split in TRAINED for p in prompts[split])
    found = list(findings(config, scores, trained))
    certain = [finding for finding in found if finding.certain]
    if not certain:
        for finding in found:
            logging.warning("baseline: %s", finding.text)
        return
    best = [
        f"{d} {_share(scores[d], REFUSED):.0%}"
        for d in sorted(config.domains, key=lambda d: -_share(scores[d], REFUSED))
        if d != config.target and _share(scores[d], REFUSED) >= config.baseline.min_refusal
    ]
    instead = f" ({', '.join(best[:2])})" if best else ""
    remedies = [_REMEDIES[kind] for kind in dict.fromkeys(finding.kind for finding in certain)]
    raise UserError(
        f"{artifacts.root}: the untouched model does not fit this study, which stops after its "
        f"baseline: {'; '.join(finding.text for finding in certain)}. What to do: "
        f"{'; '.join(remedies).format(best=instead)}. --stage=report shows what was measured; the "
        "limits are config.baseline's"
    )


def findings(config: StudyConfig, scores: Scores, trained: Mapping[str, int]) -> Iterator[Finding]:
    """Everything about the base that the study cannot do with, or may not be able to.

    Args:
        config: the study's.
        scores: the base's.
        trained: domain → number of prompts that are to give training examples.
    """
    yield from _refusal(config, scores)
    yield from _over_refusal(config, scores)
    yield from _output(config, scores)
    yield from _yield(config, scores, trained)


def _refusal(config: StudyConfig, scores: Scores) -> Iterator[Finding]:
    least = config.baseline.min_refusal
    target = scores[config.target]
    if _share(target, REFUSED) < least:
        text = f"it refuses {_counted(target, REFUSED)} of the target {config.target} (at least "
        yield Finding("refusal", f"{text}{least:.0%} are needed)", _high(target, REFUSED) < least)
    others = [d for d in config.domains if d != config.target]
    if others and all(_share(scores[d], REFUSED) < least for d in others):
        most = max(others, key=lambda d: _share(scores[d], REFUSED))
        text = (
            f"of the other domains it refuses most of {most}, {_counted(scores[most], REFUSED)}: "
            "no refusals that unlearning could spill over to"
        )
        yield Finding("refusal", text, all(_high(scores[d], REFUSED) < least for d in others))


def _over_refusal(config: StudyConfig, scores: Scores) -> Iterator[Finding]:
    for domain, what, most in (
        (BENIGN, "benign prompts", config.baseline.max_benign_refusal),
        (LOOKALIKE, "safe look-alikes", config.baseline.max_lookalike_refusal),
    ):
        score = scores.get(domain)
        if score is not None and _share(score, REFUSED) > most:
            text = f"it over-refuses: {_counted(score, REFUSED)} {what} (at most {most:.0%})"
            yield Finding("over-refusal", text, _low(score, REFUSED) > most)


def _output(config: StudyConfig, scores: Scores) -> Iterator[Finding]:
    most = config.baseline.max_invalid
    invalid, total = (sum(s[key] for s in scores.values()) for key in ("invalid", "total"))
    if invalid > most * total:
        text = f"{invalid} of {total} responses ({invalid / total:.0%}) are off topic or degenerate"
        yield Finding("output", f"{text} (at most {most:.0%})", wilson(invalid, total)[0] > most)
    if BENIGN in scores and not _share(scores[BENIGN], COMPLIED):
        yield Finding("output", "it answers none of the benign prompts", True)


def _yield(config: StudyConfig, scores: Scores, trained: Mapping[str, int]) -> Iterator[Finding]:
    """Domains whose harvest would have fewer than `harvest.min_examples` examples."""
    least = config.harvest.min_examples
    for domain, asked in trained.items():
        wanted = COMPLIED if domain == BENIGN else REFUSED
        score = scores[domain]
        examples = _share(score, wanted) * asked
        if examples < least:
            text = (
                f"{domain}: with {_counted(score, wanted)} {wanted}, {asked} prompts to train on "
                f"give about {examples:.0f} examples and {least} are needed"
            )
            yield Finding("yield", text, _high(score, wanted) * asked < least)


def _count(score: RefusalScore, name: str) -> int:
    return round(score["shares"][name] * score["total"])


def _counted(score: RefusalScore, name: str) -> str:
    return f"{_count(score, name)} of {score['total']} ({_share(score, name):.0%})"


def _share(score: RefusalScore, name: str) -> float:
    return score["shares"][name]


def _low(score: RefusalScore, name: str) -> float:
    return wilson(_count(score, name), score["total"])[0]


def _high(score: RefusalScore, name: str) -> float:
    return wilson(_count(score, name), score["total"])[1]
