"""SIGTERM and Ctrl-C: they end a command at once, or after its next step where that is safer.

A command installs handlers that raise (`raise_on_signals`); training and runs of several processes
note the signal instead (`Noted`) and stop where their state is whole. A second signal ends those at
once, too.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

_ECHO_SECONDS = 1.0


class StopRequested(KeyboardInterrupt):
    """Ctrl-C. Like its base, so that nothing takes it for a failure of what it interrupts."""

    by = "Ctrl-C"


class Terminated(StopRequested):
    """SIGTERM."""

    by = "SIGTERM"


_RAISED = {signal.SIGINT: StopRequested, signal.SIGTERM: Terminated}


class Noted:
    """A handler that notes the first signal and raises on the next.

    What a terminal and a launcher both send within a second counts once.
    """

    def __init__(self) -> None:
        self._first: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if self._first is None:
            self._first = time.monotonic()
        elif time.monotonic() - self._first > _ECHO_SECONDS:
            _raise(number)

    def asked(self) -> bool:
        """Whether a signal came."""
        return self._first is not None


def install(handler: Any) -> dict[signal.Signals, Any]:
    """Makes a handler that of both signals, unless they are ignored (`nohup`); returns the old."""
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in _RAISED}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    return before


@contextlib.contextmanager
def noting() -> Iterator[Noted]:
    """Notes the signals of a block. Outside of the main thread there are none to be noted."""
    noted = Noted()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = install(noted)
    try:
        yield noted
    finally:
        for number, old in before.items():
            if old is not None:  # one that Python has not installed
                signal.signal(number, old)


def raise_on_signals() -> list[type[StopRequested]]:
    """Raises `StopRequested` in the main thread on either signal, for the rest of the process.

    Returns:
        What was raised so far. In a comparison that JAX calls from C++ it comes out as another
        exception (a ValueError), so that whatever ends a process after it is to be taken for it.
    """
    last, asked = -_ECHO_SECONDS, list[type[StopRequested]]()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last
        echo, last = time.monotonic() - last < _ECHO_SECONDS, time.monotonic()
        if not echo:
            asked.append(_RAISED[signal.Signals(number)])
            raise asked[-1]

    install(handle)
    report = sys.unraisablehook

    def unraisable(found: Any) -> None:
        frame = sys._getframe().f_back  # of the code that was called back from
        if isinstance(found.exc_value, StopRequested) and frame is not None:
            _raise_in(frame, type(found.exc_value))
        else:
            report(found)

    sys.unraisablehook = unraisable
    return asked


def _raise_in(frame: FrameType, kind: type[StopRequested]) -> None:
    """Raises at the next line of a frame of this thread what was raised where nothing can be.

    In destructors and in callbacks of the garbage collector (JAX has one) Python drops exceptions.
    To send the signal again does not help where most of the time is spent in them.
    """

    def trace(*_: Any) -> NoReturn:
        sys.settrace(None)
        raise kind

    frame.f_trace = trace
    sys.settrace(lambda *_: None)  # a thread's frames are traced only while this is set


def _raise(number: int) -> NoReturn:
    raise _RAISED[signal.Signals(number)]
