"""Leases on units of work in a shared folder, without a coordinator.

A lease is a file that only one process can create. Its holder touches it regularly; after `expiry`
seconds without that it is void, and the process that creates the file of the next generation holds
the unit. In the worst case (a holder that was suspended past its expiry) two processes do the same
unit: what they write has to be equal, and written by renaming.
"""

import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType


class Lease:
    """A unit that this process holds; a context manager that renews and releases the lease."""

    def __init__(self, path: Path, expiry: float):
        self.path = path
        self._expiry = expiry
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def _renew(self) -> None:
        while not self._ended.wait(self._expiry / 4):
            try:
                os.utime(self.path)
            except (
                OSError
            ):  # the file system is briefly unreachable, or the file was removed by hand
                continue

    def __enter__(self) -> "Lease":
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


class Leases:
    """The leases in one folder."""

    def __init__(self, folder: Path, expiry: float):
        self._folder, self._expiry = folder, expiry
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, unit: str) -> Lease | None:
        """Acquires a unit; None if another live process holds it."""
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
        return Lease(path, self._expiry)

    def _expired(self, path: Path) -> bool:
        try:
            touched = path.stat().st_mtime
        except FileNotFoundError:  # just released
            return True
        # Both times are the file server's, as the clocks of machines differ.
        probe = self._folder / f".{uuid.uuid4().hex}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - touched > self._expiry
