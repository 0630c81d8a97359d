"""Claims on units of work in a shared folder, without a coordinator.

A claim is a file that only one process can create. While its holder lives it is touched; one that
was not touched for `expiry` seconds is void, and whoever creates the file of the next generation
holds the unit. Two processes may in the worst case (a holder that slept past its expiry) do the
same unit: what they write has to be the same and written by renaming.
"""

import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType


class Claim:
    """A unit that this process holds; a context manager that keeps it alive and lets it go."""

    def __init__(self, path: Path, expiry: float):
        self.path = path
        self._expiry = expiry
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def _keep(self) -> None:
        while not self._ended.wait(self._expiry / 4):
            try:
                os.utime(self.path)
            except OSError:  # a file system that is away for a moment, or the file removed by hand
                continue

    def __enter__(self) -> "Claim":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)


class Claims:
    """The claims in one folder."""

    def __init__(self, folder: Path, expiry: float):
        self._folder, self._expiry = folder, expiry
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, unit: str) -> Claim | None:
        """The unit, or None where a living process holds it."""
        held = [int(path.suffix[1:]) for path in self._folder.glob(f"{unit}.*")]
        last = max(held, default=-1)
        if held and not self._expired(self._folder / f"{unit}.{last}"):
            return None
        path = self._folder / f"{unit}.{last + 1}"
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}\n")
        except FileExistsError:
            return None
        return Claim(path, self._expiry)

    def _expired(self, path: Path) -> bool:
        try:
            touched = path.stat().st_mtime
        except FileNotFoundError:  # let go a moment ago
            return True
        # Both times are the file server's: clocks of machines differ.
        probe = self._folder / f".{uuid.uuid4().hex}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - touched > self._expiry
