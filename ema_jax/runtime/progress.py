"""Progress of long work: a bar on a terminal, a log line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from absl import logging
from tqdm import tqdm

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts `total` units of work under a description; a context manager.

    On a terminal it draws a bar; elsewhere it logs a line every ten seconds and one at the end.
    """

    def __init__(self, description: str, total: int, unit: str = "it"):
        self._description, self._total, self._unit = description, total, unit
        self._done, self._logged, self._note = 0, -1, ""
        self._bar = (
            tqdm(total=total, desc=description, unit=unit, leave=False)
            if sys.stderr.isatty()
            else None
        )
        self._start = self._last_line = time.monotonic()

    def update(self, amount: int = 1, **notes: float | str) -> None:
        """Adds finished work, with figures to show."""
        self._done += amount
        shown = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in notes.items()}
        if notes:
            self._note = " ".join(f"{k} {v}" for k, v in shown.items())
        if self._bar is not None:
            self._bar.update(amount)
            if notes:
                self._bar.set_postfix_str(self._note)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._log()

    def _log(self) -> None:
        self._logged = self._done
        seconds = time.monotonic() - self._start
        logging.info(
            "%s: %d/%d %s, %.0f s%s",
            self._description,
            self._done,
            self._total,
            self._unit,
            seconds,
            f" ({self._note})" if self._note else "",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._done != self._logged:
            self._log()


def track(items: Iterable[T], description: str, total: int, unit: str = "it") -> Iterator[T]:
    """Iterates over `items`, counting each one when its turn is over."""
    with Progress(description, total, unit) as progress:
        for item in items:
            yield item
            progress.update()
