"""Judge `endpoint`: any chat endpoint that speaks OpenAI's protocol.

The key is read from the environment, goes into one header, and appears in no message, log or cache;
server text appears in none of them either, because a server may echo the key. Redirects are not
followed, cookies not kept.
"""

import concurrent.futures
import contextlib
import dataclasses
import http.cookiejar
import json
import math
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING, getLogger
from typing import Any, NamedTuple

import httpx
from absl import logging

from ema_jax.errors import RunStoppedError, UserError
from ema_jax.refusal.endpoint.address import Address, read_key
from ema_jax.refusal.endpoint.answer_cache import AnswerCache
from ema_jax.refusal.endpoint.connection import Connection
from ema_jax.refusal.endpoint.errors import FILTERED, PassingError, ServerError, declined
from ema_jax.refusal.endpoint.pace import Pace, Pacer, retry_after
from ema_jax.refusal.endpoint.rubrics import RUBRICS, Rubric
from ema_jax.refusal.judge_options import check_template
from ema_jax.refusal.validity import judge_valid
from ema_jax.refusal.verdicts import UNREADABLE, Verdict
from ema_jax.runtime.files import sha256_json
from ema_jax.runtime.progress import Progress

MAX_BODY_BYTES = 1 << 20
ANSWER_ATTEMPTS = 2  # an unusable answer is asked for once more before it counts as unreadable

_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)


class _Question(NamedTuple):
    hash: str
    prompt: str
    response: str

    @property
    def id(self) -> str:
        return self.hash[:8]


@dataclass(frozen=True)
class Endpoint:
    """A judge that sends a question about each row to an endpoint; `make` checks its settings."""

    model: str
    url: str
    key: str = field(repr=False)
    key_env: str
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
        cache: str | None,
        rubric: str,
        template: str | None,
        extra_body: Mapping[str, Any],
        pace: Pace,
        script: str | None,
    ) -> "Endpoint":
        """Checks everything that can be checked without a request; see `judges.make_endpoint`.

        Raises:
            UserError: an unsafe or malformed address, no key, a bad template or number.
        """
        pace.check()
        try:
            json.dumps(dict(extra_body), allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise UserError("judge 'endpoint': extra_body is no JSON object") from None
        if rubric not in RUBRICS:
            raise UserError(
                f"judge 'endpoint': rubric {rubric!r} is unknown; choose {', '.join(RUBRICS)}"
            )
        question = RUBRICS[rubric]
        if template is not None:
            check_template("endpoint", template, ("id", "prompt", "response"))
            question = dataclasses.replace(question, template=template)
        key, key_env = read_key(key_env, address)
        settings: tuple = (question.template, ANSWER_ATTEMPTS, dict(extra_body))
        # The first rubric is in no hash: it was the only one once, and cached answers stay valid.
        settings += () if rubric == next(iter(RUBRICS)) else (rubric,)
        version = f"1/{sha256_json(settings)[:12]}"
        if cache is not None:
            AnswerCache.check(cache)
        return cls(
            model, address.url, key, key_env, cache, question, extra_body, pace, script, version
        )

    @property
    def revision(self) -> str:
        """The model's name and the endpoint's host; which weights it runs is the host's claim."""
        return f"{self.model}@{urllib.parse.urlsplit(self.url).netloc}"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict per row, in order.

        Raises:
            UserError: the endpoint refuses the key, the model or every request alike.
            RunStoppedError: it stays out of reach; the answers so far are in the cache.
        """
        return judge_valid(rows, self.script, self._judge)

    def _judge(self, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        questions = [self._question(row) for row in rows]
        cache = AnswerCache(self.cache)
        waiting = list({q.hash: q for q in questions if q.hash not in cache.verdicts}.values())
        known = len({q.hash for q in questions}) - len(waiting)
        if known:
            logging.info("endpoint: %d answers are in the cache, %d to ask", known, len(waiting))
        if waiting:
            self._ask_all(waiting, cache)
        return [cache.verdicts[question.hash] for question in questions]

    def _question(self, row: Mapping[str, Any]) -> _Question:
        identity = (self.url, self.model, self.version, row["prompt"], row["response"])
        return _Question(sha256_json(identity), row["prompt"], row["response"])

    def _ask_all(self, questions: Sequence[_Question], cache: AnswerCache) -> None:
        """Asks concurrently; every answer goes into the cache as it comes."""
        pacer = Pacer(self.pace)
        pool = concurrent.futures.ThreadPoolExecutor(self.pace.concurrency)
        with self._connections() as connection:
            futures = [pool.submit(self._ask, q, connection, pacer, cache) for q in questions]
            try:
                with Progress(self.name, len(questions), "rows") as progress:
                    for future in concurrent.futures.as_completed(futures):
                        # Of several failures the first ends the run and cancels the rest.
                        with contextlib.suppress(concurrent.futures.CancelledError):
                            future.result()
                            progress.update()
            except PassingError as error:
                advice = "nothing was kept; give cache=FILE and run again"
                if self.cache:
                    advice = f"the answers so far are in {self.cache}; run again to resume"
                raise RunStoppedError(f"{self.url}: {error}; {advice}") from None
            finally:
                # Requests under way are paid for: they finish, and their answers are kept.
                pacer.stop()
                pool.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def _connections(self) -> Iterator[Callable[[], Connection]]:
        """Gives every thread that asks a connection of its own; closes them at the end."""
        for name in ("httpx", "httpcore"):  # they log headers, in which a server may echo the key
            getLogger(name).setLevel(WARNING)
        thread, context = threading.local(), ssl.create_default_context()
        made: list[Connection] = []
        self._client(context).close()  # before any thread starts: it refuses a wrong proxy

        def connection() -> Connection:
            if not hasattr(thread, "connection"):
                thread.connection = Connection(self._client(context), self.pace.timeout)
                made.append(thread.connection)
            return thread.connection

        try:
            yield connection
        finally:
            for each in made:
                each.close()

    def _client(self, context: ssl.SSLContext) -> httpx.Client:
        headers = {"Content-Type": "application/json", "User-Agent": "ema_jax"}
        headers["Accept-Encoding"] = "identity"  # so that the bound on a body's size holds
        if self.key:
            azure = "?api-version=" in self.url
            headers |= {"api-key": self.key} if azure else {"Authorization": f"Bearer {self.key}"}
        try:
            client = httpx.Client(
                headers=headers,
                timeout=self.pace.timeout,
                verify=context,
                proxy=_proxy(self.url),
                trust_env=False,
            )
        except (ValueError, ImportError):
            raise UserError(
                "judge 'endpoint': https_proxy is not of a known kind; give http://HOST:PORT"
            ) from None
        client.cookies.jar.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=()))
        return client

    def _ask(
        self,
        question: _Question,
        connection: Callable[[], Connection],
        pacer: Pacer,
        cache: AnswerCache,
    ) -> None:
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
        try:
            for _ in range(ANSWER_ATTEMPTS):
                verdict = pacer.retry(lambda: self._post(connection(), data, question.id))
                if verdict != UNREADABLE:
                    break
            cache.add(question.hash, verdict)
        except BaseException:
            pacer.stop()  # before another question is sent in vain
            raise

    def _post(self, connection: Connection, data: bytes, question_id: str) -> Verdict:
        # Failures are handled outside of the handler: an error raised there would carry the
        # server's words as its context.
        reply, body = None, b""
        failure: BaseException | None = None
        try:
            with connection.post(self.url, data) as reply:
                body = _body(reply)
        except (httpx.HTTPError, OSError, PassingError) as error:
            failure = error
        if reply is not None and not reply.is_success:
            return self._failed(
                ServerError.read(reply.status_code, body), retry_after(reply.headers)
            )
        if failure is None:
            return self._read(body, question_id)
        if isinstance(failure, PassingError):
            raise failure
        # httpx gives up a silent server at the same moment as the connection is cut.
        if isinstance(failure, TimeoutError | httpx.TimeoutException):
            raise PassingError("an answer that takes too long")
        while cause := failure.__cause__ or failure.__context__:
            failure = cause
        if isinstance(failure, ssl.SSLCertVerificationError):
            raise UserError(
                f"{self.url}: its certificate is not valid here; correct url, or add the "
                "authority to SSL_CERT_FILE"
            )
        raise PassingError(type(failure).__name__)

    def _failed(self, error: ServerError, wait_seconds: float = 0.0) -> Verdict:
        """Sorts an error: try again, an invalid row, or the end of the run."""
        status, code = error.status, error.code
        code = "" if self.key and self.key in code else code
        shown = f"HTTP {status}{f', {code}' if code else ''}"
        if error.declined:
            return declined(error.declined)
        if code == "insufficient_quota":
            # No wait helps: the account has to be topped up first.
            raise PassingError(shown + "; the account's credit is used up", math.inf)
        if status == 200:
            raise PassingError("an error in place of an answer")
        if status in _PASSING:
            reason = error.declined_in_passing
            raise PassingError(shown, wait_seconds, declined(reason) if reason else None)
        if status in (401, 403):
            named = f"the key in {self.key_env} is not accepted ({shown}); set a valid one"
            none = f"wants a key ({shown}); put one into the environment and name it with key_env"
            raise UserError(f"{self.url}: {named if self.key_env else none}")
        if status == 404:
            raise UserError(
                f"{self.url}: no model {self.model!r} or no such address ({shown}); correct model "
                "and url (a base such as https://api.openai.com/v1)"
            )
        if 300 <= status < 400:
            raise UserError(f"{self.url}: redirects ({shown}); give the address it leads to as url")
        raise UserError(
            f"{self.url}: refuses the request ({shown}); see whether the model takes its fields "
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
            raise PassingError("not a chat completion") from None
        if error is not None:
            return self._failed(ServerError.of(200, {"error": error}))
        if filtered and not content:
            return declined(FILTERED)
        return self.rubric.read(content, question_id)


def _body(reply: httpx.Response) -> bytes:
    """The whole body, within bounds of size."""
    parts, size = [], 0
    for chunk in reply.iter_raw():
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise PassingError(f"an answer of more than {MAX_BODY_BYTES} bytes")
    return b"".join(parts)


def _proxy(url: str) -> str | None:
    """The environment's proxy for https; none for plain http, whose key it would see."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "http" or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = urllib.request.getproxies().get("https")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"
