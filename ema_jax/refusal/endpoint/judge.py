"""Judge `endpoint`: any chat endpoint that speaks OpenAI's protocol.

The standard library speaks HTTP here, so that the project needs no client of its own and nothing
logs a request behind our back. The key is read from the environment, goes into one header, and
appears in no message, log or cache; server text appears in none of them either, because a server
may echo the key. Redirects are not followed.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import json
import math
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from absl import logging

from ema_jax.errors import RunStoppedError, UserError
from ema_jax.refusal.endpoint.address import Address, read_key
from ema_jax.refusal.endpoint.answer_cache import AnswerCache
from ema_jax.refusal.endpoint.errors import FILTERED, ServerError
from ema_jax.refusal.endpoint.pace import Pace, Pacer, retry_after
from ema_jax.refusal.endpoint.rubrics import RUBRICS, Rubric
from ema_jax.refusal.judging import check_positive, check_template, judge_valid
from ema_jax.refusal.verdicts import INVALID, JUDGE_FAILED, UNREADABLE, Verdict
from ema_jax.runtime.files import sha256_json
from ema_jax.runtime.progress import Progress

MAX_BODY_BYTES = 1 << 20
ANSWER_ATTEMPTS = 2  # an unusable answer is asked for once more before it counts as unreadable

_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)


class _PassingError(Exception):
    """A failure that may be gone the next time.

    Holds what to say of it, how long to wait, and what the row is if it stays.
    """

    def __init__(self, what: str, wait_seconds: float = 0.0, otherwise: Verdict | None = None):
        super().__init__(what)
        self.wait_seconds, self.otherwise = wait_seconds, otherwise


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follows none: the key is for the address that the user gave."""


class _Question(NamedTuple):
    hash: str
    prompt: str
    response: str

    @property
    def id(self) -> str:
        return self.hash[:8]


@dataclass(frozen=True)
class Endpoint:
    """A judge that asks an endpoint; `make` checks its settings."""

    model: str
    url: str
    key: str = field(repr=False)
    key_env: str
    key_header: str
    cache: str | None
    rubric: Rubric
    extra_body: Mapping[str, Any]
    pace: Pace
    script: str | None
    version: str
    name: str = "endpoint"

    @classmethod
    def make(
        cls,
        *,
        model: str,
        address: Address,
        key_env: str | None,
        key_header: str,
        cache: str | None,
        rubric: str,
        template: str | None,
        extra_body: Mapping[str, Any],
        pace: Pace,
        script: str | None,
    ) -> "Endpoint":
        """Checks everything that can be checked without asking; see `judges.make_endpoint`.

        Raises:
            UserError: an unsafe or malformed address, no key, a bad template or number.
        """
        check_positive(
            "endpoint",
            requests_per_minute=pace.requests_per_minute,
            concurrency=pace.concurrency,
            timeout=pace.timeout,
        )
        if pace.max_retries < 0 or not 0 <= pace.backoff < math.inf:
            raise UserError("judge 'endpoint': max_retries and backoff are 0 or more")
        if rubric not in RUBRICS:
            raise UserError(
                f"judge 'endpoint': rubric {rubric!r} is unknown; choose {', '.join(RUBRICS)}"
            )
        asked = RUBRICS[rubric]
        if template is not None:
            check_template("endpoint", template, ("id", "prompt", "response"))
            asked = dataclasses.replace(asked, template=template)
        key, key_env = read_key(key_env, address)
        settings: tuple = (asked.template, ANSWER_ATTEMPTS, dict(extra_body))
        # The first rubric stands in no hash: it was the only one once, and its answers are kept.
        settings += () if rubric == next(iter(RUBRICS)) else (rubric,)
        version = f"1/{sha256_json(settings)[:12]}"
        if cache is not None:
            AnswerCache.check(cache)
        return cls(
            model,
            address.url,
            key,
            key_env,
            key_header,
            cache,
            asked,
            extra_body,
            pace,
            script,
            version,
        )

    @property
    def revision(self) -> str:
        """The model's name at the endpoint's host; what stands behind it is the host's word."""
        return f"{self.model}@{urllib.parse.urlsplit(self.url).netloc}"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict a row, in order.

        Raises:
            UserError: the endpoint refuses the key, the model or every request alike.
            RunStoppedError: it stays out of reach; what was answered is in the cache.
        """
        return judge_valid(rows, self.script, self._judge)

    def _judge(self, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        questions = [self._question(row) for row in rows]
        cache = AnswerCache(self.cache)
        waiting = list({q.hash: q for q in questions if q.hash not in cache}.values())
        known = len({q.hash for q in questions}) - len(waiting)
        if known:
            logging.info("endpoint: %d answers are in the cache, %d to ask", known, len(waiting))
        if waiting:
            self._ask_all(waiting, cache)
        return [cache[question.hash] for question in questions]

    def _question(self, row: Mapping[str, Any]) -> _Question:
        identity = (self.url, self.model, self.version, row["prompt"], row["response"])
        return _Question(sha256_json(identity), row["prompt"], row["response"])

    def _ask_all(self, questions: Sequence[_Question], cache: AnswerCache) -> None:
        """Asks concurrently; every answer goes into the cache as it comes."""
        pacer = Pacer(self.pace)
        pool = concurrent.futures.ThreadPoolExecutor(self.pace.concurrency)
        futures = [pool.submit(self._ask, question, pacer, cache) for question in questions]
        try:
            with Progress(self.name, len(questions), "rows") as progress:
                for future in concurrent.futures.as_completed(futures):
                    # Of several failures the first ends the run; the rest were called off by it.
                    with contextlib.suppress(concurrent.futures.CancelledError):
                        future.result()
                        progress.update()
        except _PassingError as error:
            kept = f"the answers so far are in {self.cache}" if self.cache else "nothing was kept"
            advice = "run again to resume" if self.cache else "give cache=FILE and run again"
            raise RunStoppedError(f"{self.url}: {error}; {kept}; {advice}") from None
        finally:
            # Requests under way are paid for: they are let finish, and their answers kept.
            pacer.stop()
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, question: _Question, pacer: Pacer, cache: AnswerCache) -> None:
        try:
            for _ in range(ANSWER_ATTEMPTS):
                verdict = self._answer(question, pacer)
                if verdict != UNREADABLE:
                    break
            cache.add(question.hash, verdict)
        except BaseException:
            pacer.stop()  # before another question is sent in vain
            raise

    def _answer(self, question: _Question, pacer: Pacer) -> Verdict:
        """One answer, with retries; raises the last failure when they are used up."""
        text = self.rubric.template.format(
            id=question.id, prompt=question.prompt, response=question.response
        )
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 32,
            **self.extra_body,
        }
        data = json.dumps({k: v for k, v in body.items() if v is not None}).encode()
        attempt = 0
        while True:
            pacer.wait_for_turn()
            try:
                return self._post(data, question.id)
            except _PassingError as error:
                given_up = attempt == self.pace.max_retries
                if given_up and error.otherwise is not None:
                    return error.otherwise
                if given_up or error.wait_seconds > self.pace.longest_wait:
                    wait = error.wait_seconds
                    asked = f"; it asks to wait {wait:.0f} s" if 0 < wait < math.inf else ""
                    tries = f"{attempt + 1} attempt{'s' if attempt else ''}"
                    raise _PassingError(f"no answer after {tries} ({error}{asked})") from None
                pacer.back_off(attempt, error.wait_seconds)
                attempt += 1

    def _post(self, data: bytes, question_id: str) -> Verdict:
        headers = {"Content-Type": "application/json", "User-Agent": "ema_jax"}
        if self.key:
            bearer = self.key_header == "Authorization"
            headers[self.key_header] = f"Bearer {self.key}" if bearer else self.key
        request = urllib.request.Request(self.url, data, headers)
        # Errors are dealt with outside of the handler: what is raised there would carry the
        # server's words along as its context.
        failure: Exception
        try:
            with self._opener.open(request, timeout=self.pace.timeout) as reply:
                body = _body(reply, self.pace)
        except (OSError, http.client.HTTPException) as error:
            failure = error
        else:
            return self._read(body, question_id)
        if isinstance(failure, urllib.error.HTTPError):
            with failure:
                reported = _error(failure, self.pace)
                return self._failed(reported, retry_after(failure.headers))
        reason = getattr(failure, "reason", None)
        cause = reason if isinstance(reason, Exception) else failure
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise UserError(
                f"{self.url}: its certificate is not valid here; correct url, or add the "
                "authority to SSL_CERT_FILE"
            )
        raise _PassingError(type(cause).__name__)

    @functools.cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        # A proxy of the environment is for the outside: to it, plain http would show the key.
        plain = self.url.startswith("http:")
        return urllib.request.build_opener(
            _NoRedirect, *([urllib.request.ProxyHandler({})] if plain else [])
        )

    def _failed(self, error: ServerError, wait_seconds: float = 0.0) -> Verdict:
        """What an error means: try again, an invalid row, or the end."""
        status, code = error.status, error.code
        code = "" if self.key and self.key in code else code
        said = f"HTTP {status}{f', {code}' if code else ''}"
        if error.declined:
            return _declined(error.declined)
        if code == "insufficient_quota":
            # To wait for it, longer than anyone does: the account has to be topped up first.
            raise _PassingError(said + "; the account's credit is used up", math.inf)
        if status == 200:
            raise _PassingError("an error in place of an answer")
        if status in _PASSING:
            reason = error.declined_in_passing
            raise _PassingError(said, wait_seconds, _declined(reason) if reason else None)
        if status in (401, 403):
            named = f"the key in {self.key_env} is not accepted ({said}); set a valid one"
            none = f"wants a key ({said}); put one into the environment and name it with key_env"
            raise UserError(f"{self.url}: {named if self.key_env else none}")
        if status == 404:
            raise UserError(
                f"{self.url}: no model {self.model!r} or no such address ({said}); correct model "
                "and url (a base such as https://api.openai.com/v1)"
            )
        if 300 <= status < 400:
            raise UserError(f"{self.url}: redirects ({said}); give the address it leads to as url")
        raise UserError(
            f"{self.url}: refuses the request ({said}); see whether the model takes its fields "
            '(extra_body adds some, and removes one with null, such as {"max_tokens": null})'
        )

    def _read(self, body: bytes, question_id: str) -> Verdict:
        """The answer in a body that came with success, which some servers send with errors too."""
        error, content, filtered = None, None, False
        try:
            reply = json.loads(body)
            if "choices" not in reply:
                error = reply["error"]
            else:
                choice = reply["choices"][0]
                error = choice.get("error")
                filtered = choice.get("finish_reason") == FILTERED
                content = choice["message"]["content"] if error is None else None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _PassingError("not a chat completion") from None
        if error is not None:
            return self._failed(ServerError.of(200, {"error": error}))
        return self.rubric.read(content, question_id) if content or not filtered else _DECLINED


def _declined(reason: str) -> Verdict:
    return Verdict(INVALID, 0.0, f"{JUDGE_FAILED}declined: {reason}")


_DECLINED = _declined(FILTERED)


def _body(reply: Any, pace: Pace) -> bytes:
    """The whole body, within bounds of size and time that hold against a server that dawdles."""
    parts, size, deadline = [], 0, time.monotonic() + pace.timeout
    while chunk := reply.read1(1 << 16):
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise _PassingError(f"an answer of more than {MAX_BODY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise _PassingError("an answer that takes too long")
    return b"".join(parts)


def _error(failure: urllib.error.HTTPError, pace: Pace) -> ServerError:
    try:
        return ServerError.read(failure.code, _body(failure, pace))
    except (OSError, _PassingError, http.client.HTTPException):
        return ServerError(failure.code)
