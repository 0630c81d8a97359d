"""How fast an endpoint is asked: a rate limit, backoff, and bounds on time."""

import datetime
import email.utils
import random
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass
from email.message import Message


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


class Pacer:
    """Spaces requests of several threads evenly, and holds all of them back when asked to."""

    def __init__(self, pace: Pace):
        self._pace = pace
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._next = time.monotonic()

    def wait_for_turn(self) -> None:
        """Returns when the next request may start.

        Raises:
            concurrent.futures.CancelledError: the run is over.
        """
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + 60.0 / self._pace.requests_per_minute
        self._sleep_until(turn)

    def back_off(self, attempt: int, asked_seconds: float) -> None:
        """Waits after a failure: as long as asked, and no less than a jittered, doubling time.

        A wait that the server asked for holds back the other threads as well.
        """
        doubled = min(self._pace.backoff * 2.0 ** min(attempt, 30), self._pace.longest_backoff)
        now = time.monotonic()
        if asked_seconds:
            with self._lock:
                self._next = max(self._next, now + asked_seconds)
        self._sleep_until(now + max(asked_seconds, doubled * random.uniform(0.5, 1.5)))

    def stop(self) -> None:
        """Ends every wait, now and later."""
        self._stopped.set()

    def _sleep_until(self, moment: float) -> None:
        if self._stopped.wait(max(moment - time.monotonic(), 0.0)):
            raise CancelledError


def retry_after(headers: Message) -> float:
    """Seconds that a `Retry-After` header asks to wait (a number, or an HTTP date); 0 without one.

    Source: RFC 9110, section 10.2.3.
    """
    text = (headers.get("Retry-After") or "").strip()
    try:
        return max(float(text), 0.0) if text and text != "nan" else 0.0
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max((moment - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
