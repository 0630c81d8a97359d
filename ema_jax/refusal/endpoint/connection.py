"""Requests that end in time, whatever the server does meanwhile."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx


class Connection:
    """An HTTP client of one thread, whose socket is cut when a request's time is over.

    httpx limits the time of single reads: a server that sends a byte now and then, or one
    `100 Continue` after another, keeps within it for ever.

    Args:
        client: used by nobody else, so that it has one connection at a time.
        seconds: for a whole request, from connecting to the end of the body.
    """

    def __init__(self, client: httpx.Client, seconds: float):
        self._client, self._seconds = client, seconds
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None  # the connection's, under another descriptor
        self._request: object = None
        self._over = False

    @contextlib.contextmanager
    def post(self, url: str, data: bytes) -> Iterator[httpx.Response]:
        """The response, whose body is to be read within the block.

        Raises:
            TimeoutError: the time was over before the block ended.
        """
        request = object()
        timer = threading.Timer(self._seconds, self._cut, (request,))
        timer.daemon = True
        with self._lock:
            self._request, self._over = request, False
        timer.start()
        try:
            extensions: dict[str, Any] = {"trace": self._trace}
            with self._client.stream("POST", url, content=data, extensions=extensions) as reply:
                yield reply
        except (httpx.HTTPError, OSError):
            if not self._over:
                raise
        finally:
            timer.cancel()
            with self._lock:
                self._request = None
        if self._over:
            raise TimeoutError

    def close(self) -> None:
        """Closes the client and its connection."""
        self._client.close()
        if self._socket is not None:
            self._socket.close()

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        if not event.endswith("connect_tcp.complete"):
            return
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            # A duplicate, which stays the connection's when TLS takes the descriptor over.
            self._socket = info["return_value"].get_extra_info("socket").dup()
        if self._over:
            self._cut(self._request)

    def _cut(self, request: object) -> None:
        with self._lock:
            if request is not self._request:  # a timer that was too late
                return
            self._over = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # closed by the server already
                    self._socket.shutdown(socket.SHUT_RDWR)
