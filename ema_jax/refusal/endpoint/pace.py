"""Rate limit, retries and time limits of requests to an endpoint."""

import datetime
import email.utils
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import tenacity

from ema_jax.errors import UserError
from ema_jax.refusal.endpoint.errors import PassingError
from ema_jax.refusal.judge_options import check_positive
from ema_jax.refusal.verdicts import Verdict

LONGEST_SECONDS = 86_400
MOST_AT_ONCE = 1000


@dataclass(frozen=True)
class Pace:
    """Limits on requests; times in seconds."""

    requests_per_minute: float = 300.0
    concurrency: int = 8
    timeout: float = 60.0
    max_retries: int = 6
    backoff: float = 1.0
    longest_backoff: float = 60.0
    longest_wait: float = 600.0  # a server that asks for more stops the run

    def check(self) -> None:
        """Refuses limits that cannot be kept to.

        Raises:
            UserError: naming the option.
        """
        check_positive(
            "endpoint",
            requests_per_minute=self.requests_per_minute,
            concurrency=self.concurrency,
            timeout=self.timeout,
        )
        if self.max_retries < 0 or not 0 <= self.backoff <= LONGEST_SECONDS:
            raise UserError(
                "judge 'endpoint': max_retries and backoff are 0 or more, backoff at most "
                f"{LONGEST_SECONDS} s"
            )
        if max(self.timeout, 60.0 / self.requests_per_minute) > LONGEST_SECONDS:
            raise UserError(
                "judge 'endpoint': timeout, or the time between two requests "
                f"(60 / requests_per_minute), is more than a day ({LONGEST_SECONDS} s)"
            )
        if self.concurrency > MOST_AT_ONCE:
            raise UserError(f"judge 'endpoint': concurrency is more than {MOST_AT_ONCE}")


class Pacer:
    """Spaces requests of several threads evenly, retries them, and stops all of them at once."""

    def __init__(self, pace: Pace):
        self._pace = pace
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._next = time.monotonic()

    def retry(self, request: Callable[[], Verdict]) -> Verdict:
        """Sends a request in its turn, and again after each `PassingError` until retries run out.

        The wait is what the server asked for, and no less than a jittered, doubling time.

        Raises:
            PassingError: no answer, and the last failure names no verdict to use instead.
            concurrent.futures.CancelledError: the run is over.
        """
        limits = self._pace
        doubling = tenacity.wait_exponential(limits.backoff, max=limits.longest_backoff)

        def asked(state: Any) -> float:
            return state.outcome.exception().wait_seconds

        return tenacity.Retrying(
            before=lambda state: self.wait_for_turn(),
            retry=tenacity.retry_if_exception_type(PassingError),
            wait=lambda state: max(asked(state), doubling(state) * random.uniform(0.5, 1.5)),
            stop=lambda state: (
                state.attempt_number > limits.max_retries or asked(state) > limits.longest_wait
            ),
            before_sleep=lambda state: self._hold_back(asked(state)),
            sleep=self._sleep,
            retry_error_callback=self._give_up,
        )(request)

    def wait_for_turn(self) -> None:
        """Returns when the next request may start.

        Raises:
            concurrent.futures.CancelledError: the run is over.
        """
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + 60.0 / self._pace.requests_per_minute
        self._sleep(turn - time.monotonic())

    def stop(self) -> None:
        """Ends every wait, now and later."""
        self._stopped.set()

    def _hold_back(self, seconds: float) -> None:
        """Holds the other threads back as well where the server asked to wait."""
        if seconds:
            with self._lock:
                self._next = max(self._next, time.monotonic() + seconds)

    def _give_up(self, state: Any) -> Verdict:
        error, attempts = state.outcome.exception(), state.attempt_number
        if attempts > self._pace.max_retries and error.otherwise is not None:
            return error.otherwise
        wait = error.wait_seconds
        asked = f"; it asks to wait {wait:.0f} s" if 0 < wait < math.inf else ""
        tries = f"{attempts} attempt{'s' if attempts > 1 else ''}"
        raise PassingError(f"no answer after {tries} ({error}{asked})")

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(max(seconds, 0.0)):
            raise CancelledError


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a `Retry-After` header asks to wait (a number, or an HTTP date); 0 without one.

    Source: RFC 9110, section 10.2.3.
    """
    text = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(text)
        seconds = moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp() - time.time()
    except OverflowError:  # beyond the years that Python has
        return math.inf
    except (ValueError, TypeError, IndexError):
        return 0.0
    return max(0.0, seconds)
