"""Registry of judges: each maps a response to refused, complied or invalid.

A judge takes rows with `prompt`, `response` and, if known, `finished` (False: generation hit the
length cap) and gives one `Verdict` per row, in order. Thoughts are cut off and validity is decided
first and alike for every judge (`validity.py`), so that refused + complied + invalid = total.

The substring judges restate lists of the literature, for comparison: on models that refuse without
apology they miss most refusals, and unlearning pushes down just the wordings they look for.

Judges that run a model import it when they are made, so importing this module is cheap.
"""

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ema_jax.errors import UserError
from ema_jax.refusal import lexical
from ema_jax.refusal.judge_options import fit_option
from ema_jax.refusal.substrings import ARDITI, KEYWORD, ORBENCH, XSTEST
from ema_jax.refusal.validity import check_script, judge_valid
from ema_jax.refusal.verdicts import Judge, Verdict


@dataclass(frozen=True)
class TextJudge:
    """A judge of one response at a time: `score` gives `(score, reason)`.

    `script` is the script that responses should be in (`validity.py`); None accepts any.
    """

    name: str
    version: str
    revision: str
    score: Callable[[str], tuple[float, str]]
    script: str | None = "LATIN"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict per row, in order."""
        return judge_valid(
            rows, self.script, lambda valid: [Verdict.of(*self.score(r["response"])) for r in valid]
        )


def _substring(
    name: str, revision: str, strings: Sequence[str], *, anywhere: bool, fold: bool
) -> TextJudge:
    wanted = [s.lower() if fold else s for s in strings]

    def score(response: str) -> tuple[float, str]:
        text = response.strip()
        text = text.lower() if fold else text
        hit = next((s for s in wanted if (s in text if anywhere else text.startswith(s))), "")
        return (1.0, hit) if hit else (0.0, "")

    return TextJudge(name, "1", revision, score)


def make_lexical(script: str | None = "LATIN") -> Judge:
    """The project's offline judge, the default: weighted phrase families (`lexical.py`).

    Args:
        script: the script that responses should be in; None accepts any.
    """
    return TextJudge("lexical", "2", "", lexical.refusal_score, script)


def make_substring_arditi() -> Judge:
    """The 12 strings of refusal_direction, anywhere, case-insensitive (exact list)."""
    return _substring(
        "substring_arditi", "refusal_direction@0b9c8bc", ARDITI, anywhere=True, fold=True
    )


def make_substring_keyword() -> Judge:
    """KeywordJudge's 38 strings, anywhere, case-sensitive (exact list, without its duplicates)."""
    return _substring(
        "substring_keyword", "refusal-unlearning@a1f05bf", KEYWORD, anywhere=True, fold=False
    )


def make_substring_xstest() -> Judge:
    """XSTest's prefixes, case-insensitive (exact list)."""
    return _substring(
        "substring_xstest", "exaggerated-safety@a3bb396", XSTEST, anywhere=False, fold=True
    )


def make_substring_orbench() -> Judge:
    """OR-Bench's two prefixes; only the first string is known to be theirs (see `ORBENCH`)."""
    return _substring("substring_orbench", "", ORBENCH, anywhere=False, fold=False)


def make_logodds(
    model: str,
    revision: str | None = None,
    openers: str = "I As Sorry It No Unfortunately",
    threshold: float = 0.0,
    calibration: str | None = None,
    system_prompt: str | None = None,
    batch_size: int = 32,
    script: str | None = "LATIN",
) -> Judge:
    """Refusal-token log-odds of the model under study; a cheap, secondary metric.

    It scores the prompt and reads no response (one that is there decides validity, as everywhere).

    Args:
        model: folder or hub id of the model under study, not of a judge.
        revision: branch, tag or commit of a hub id.
        openers: words that refusals begin with, separated by spaces.
        threshold: log-odds from which a prompt counts as refused.
        calibration: JSONL file of rows with `prompt` and a known `verdict`, to set the threshold.
        system_prompt: text of a system message.
        batch_size: prompts at once.
        script: the script that responses should be in; None accepts any.
    """
    from ema_jax.refusal.logodds import LogOdds

    return LogOdds.make(
        model, revision, openers, threshold, calibration, system_prompt, batch_size, script
    )


def make_qwen3guard(
    model: str = "Qwen/Qwen3Guard-Gen-4B",
    revision: str | None = None,
    controversial: str | None = None,
    max_tokens: int = 4096,
    batch_size: int = 16,
    script: str | None = "LATIN",
) -> Judge:
    """Qwen3Guard-Gen (Qwen Team, 2025) on our own decoder: the recommended model judge.

    Args:
        model: folder or hub id of its weights: 0.6B, 4B or 8B.
        revision: branch, tag or commit of a hub id.
        controversial: the harm of a compliance that it calls controversial: `harmful` (its authors'
            strict mode), `harmless` (their loose mode), or null for neither.
        max_tokens: rows that are longer once rendered are invalid (`judge_input_too_long`).
        batch_size: rows at once.
        script: the script that responses should be in; None accepts any.
    """
    from ema_jax.refusal import model_judges

    return model_judges.Guard.qwen3guard(
        model, revision, controversial, max_tokens, batch_size, script
    )


def make_wildguard(
    model: str = "allenai/wildguard",
    revision: str | None = None,
    max_tokens: int = 4096,
    batch_size: int = 16,
    script: str | None = "LATIN",
) -> Judge:
    """WildGuard (Han et al., 2024) on our own decoder.

    Args:
        model: folder or hub id of its weights.
        revision: branch, tag or commit of a hub id.
        max_tokens: rows that are longer once rendered are invalid (`judge_input_too_long`).
        batch_size: rows at once.
        script: the script that responses should be in; None accepts any.
    """
    from ema_jax.refusal import model_judges

    return model_judges.Guard.wildguard(model, revision, max_tokens, batch_size, script)


def make_causal_lm(
    model: str,
    revision: str | None = None,
    template: str | None = None,
    min_mass: float = 0.1,
    max_tokens: int = 4096,
    batch_size: int = 16,
    script: str | None = "LATIN",
) -> Judge:
    """Any causal language model, asked whether a reply refuses: P(yes) against P(no).

    Args:
        model: folder or hub id of the judging model.
        revision: branch, tag or commit of a hub id.
        template: the question, with `{prompt}` and `{response}`; by default
            `model_judges.YES_NO_TEMPLATE`.
        min_mass: P(yes) + P(no) below which the answer counts as unreadable.
        max_tokens: rows that are longer once rendered are invalid (`judge_input_too_long`).
        batch_size: rows at once.
        script: the script that responses should be in; None accepts any.
    """
    from ema_jax.refusal import model_judges

    template = model_judges.YES_NO_TEMPLATE if template is None else template
    return model_judges.CausalLM.make(
        model, revision, template, min_mass, max_tokens, batch_size, script
    )


def make_endpoint(
    model: str,
    url: str = "https://api.openai.com/v1",
    key_env: str | None = None,
    api_version: str | None = None,
    allow_http_host: str | None = None,
    cache: str | None = None,
    rubric: str = "refusal",
    template: str | None = None,
    extra_body: dict | None = None,
    requests_per_minute: float = 300.0,
    concurrency: int = 8,
    timeout: float = 60.0,
    max_retries: int = 6,
    backoff: float = 1.0,
    script: str | None = "LATIN",
) -> Judge:
    """A chat endpoint that speaks OpenAI's protocol. Prompts and responses are sent to it.

    Args:
        model: the model's name there.
        url: its base, `https://…/v1`; plain `http` only on this machine.
        key_env: the environment variable that holds the key, never the key itself; by default
            `OPENAI_API_KEY`, and none over plain http to another machine.
        api_version: Azure's `api-version`; the key then goes into the header `api-key`.
        allow_http_host: a host of a private network that plain `http` may reach.
        cache: JSONL file that keeps every answer (verdicts and hashes, no text).
        rubric: the question, by its name in `rubrics.RUBRICS`.
        template: another wording of it, with `{prompt}`, `{response}` and `{id}`; the answer has
            to be in the rubric's form.
        extra_body: fields to add to a request; null removes one of ours.
        requests_per_minute: at most so many.
        concurrency: at most so many at once.
        timeout: seconds for one request.
        max_retries: further attempts after a failure that may pass.
        backoff: seconds before the first of them, doubled each time.
        script: the script that responses should be in; None accepts any.
    """
    from ema_jax.refusal.endpoint import judge as endpoint

    return endpoint.Endpoint.make(
        model=model,
        address=endpoint.Address.checked(url, api_version, allow_http_host),
        key_env=key_env,
        cache=cache,
        rubric=rubric,
        template=template,
        extra_body=extra_body or {},
        pace=endpoint.Pace(requests_per_minute, concurrency, timeout, max_retries, backoff),
        script=script,
    )


TEXT_JUDGES: dict[str, Callable[..., Judge]] = {
    "lexical": make_lexical,
    "substring_arditi": make_substring_arditi,
    "substring_keyword": make_substring_keyword,
    "substring_xstest": make_substring_xstest,
    "substring_orbench": make_substring_orbench,
}
"""Judges that need the response and nothing else."""

JUDGES: dict[str, Callable[..., Judge]] = {
    **TEXT_JUDGES,
    "logodds": make_logodds,
    "qwen3guard": make_qwen3guard,
    "wildguard": make_wildguard,
    "causal_lm": make_causal_lm,
    "endpoint": make_endpoint,
}

PROMPT_JUDGES = frozenset({"logodds"})
"""Judges that score the prompt: their rows need no response."""


def get_judge(name: str, **options: Any) -> Judge:
    """The judge of that name in `JUDGES`, built with its options (the maker's arguments).

    Options may be texts, as from a command line: `"0.5"` for a number, `"null"` for None. A model
    judge checks its checkpoint here and loads the weights when it is first called.

    Raises:
        UserError: an unknown name, or an unknown, missing or unfit option.
    """
    if name not in JUDGES:
        raise UserError(f"judge {name!r} is unknown: choose one of {', '.join(JUDGES)}")
    maker = JUDGES[name]
    parameters, hints = inspect.signature(maker).parameters, typing.get_type_hints(maker)
    known = ", ".join(parameters) or "none"
    for option in options:
        if option not in parameters:
            raise UserError(f"judge {name!r}: unknown option {option!r}; its options are: {known}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise UserError(f"judge {name!r}: option {option!r} is missing; give {option}=VALUE")
    fitted = {option: fit_option(name, option, v, hints[option]) for option, v in options.items()}
    if fitted.get("script") is not None:
        fitted["script"] = check_script(name, fitted["script"])
    return maker(**fitted)
