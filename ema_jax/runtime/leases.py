"""Leases on units of work in a shared folder, without a coordinator; and the lock on a folder.

A lease is a file that only one process can create. Its holder renews it regularly, and removes it
at the end. A lease is void once its holder is known to be dead (a process of this machine), or once
it was watched for `expiry` seconds and not renewed: what is compared are two looks at the file, so
that clocks of machines and file servers may disagree. The process that creates the file of the next
generation then holds the unit. In the worst case (a holder that was suspended past its expiry) two
processes do the same unit: what they write has to be equal, and written by renaming.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from absl import logging

from ema_jax.errors import UserError
from ema_jax.runtime import distributed
from ema_jax.runtime.files import parse_json

LOCK_SECONDS = 60.0
"""Expiry of the lock on a folder."""

_LOCK_FOLDER, _LOCK = ".lock", "run"
_BEATS = 6  # renewals per expiry


class Holder(NamedTuple):
    """The process that holds a lease."""

    host: str
    process: int
    machine: str  # boot and process-id namespace, where the system tells them
    started: str  # of the process, as the system counts; process ids repeat

    @classmethod
    def this(cls) -> "Holder":
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _machine(), _started(os.getpid()))

    @classmethod
    def read(cls, text: str) -> "Holder | None":
        """The holder that a lease names; None for text of another kind."""
        try:
            return cls(**parse_json(text))
        except (ValueError, TypeError):
            return None

    def alive(self) -> bool | None:
        """Whether the process lives; None where it cannot be seen from here."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it is there, and another user's
            pass
        except (OSError, OverflowError, TypeError):
            return None
        return _started(self.process) == self.started

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def _machine() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(process: int) -> str:
    """When a process started, in clock ticks; "" where the system does not say."""
    with contextlib.suppress(OSError, IndexError):
        # The name of the program, in parentheses, may hold anything.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


class Lease:
    """A unit that this process holds; a context manager that renews and releases the lease."""

    def __init__(self, path: Path, expiry: float):
        self.path = path
        self._expiry = expiry
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def _renew(self) -> None:
        while not self._ended.wait(self._expiry / _BEATS):
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


class _Look(NamedTuple):
    """A lease as it was when it was first seen like that."""

    stamp: Any
    seconds: float  # by this process's own clock


def _read(path: Path) -> tuple[Holder | None, int]:
    """A lease's holder, and when it was renewed by the file server's clock."""
    # Opened, not only asked for its time: a network file system answers that from memory.
    with open(path, encoding="utf-8") as file:
        return Holder.read(file.read()), os.fstat(file.fileno()).st_mtime_ns


class Leases:
    """The leases in one folder."""

    def __init__(self, folder: Path, expiry: float):
        self._folder, self._expiry = folder, expiry
        self._looks: dict[Path, _Look] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, unit: str) -> Lease | None:
        """Acquires a unit; None if another process holds it that may be alive.

        Ask again: a lease that is not renewed is void after `expiry` seconds of asking.
        """
        held = self._generations(unit)
        last = max(held, default=-1)
        if held and not self._void(held[last]):
            return None
        path = self._folder / f"{unit}.{last + 1}"
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(Holder.this()._asdict(), file)
        except FileExistsError:
            return None
        except FileNotFoundError:  # a lock that was released took the folder with it
            self._folder.mkdir(parents=True, exist_ok=True)
            return None
        return Lease(path, self._expiry)

    def look(self, unit: str) -> tuple[Holder | None, Any]:
        """Who holds a unit, as far as its lease tells, and what changes when it is renewed."""
        held = self._generations(unit)
        try:
            holder, stamp = _read(held[max(held)])
        except (ValueError, OSError):  # released, or not readable now
            return None, None
        return holder, (max(held), stamp)

    def _generations(self, unit: str) -> dict[int, Path]:
        paths = (path for path in self._folder.glob(f"{unit}.*") if path.suffix[1:].isdecimal())
        return {int(path.suffix[1:]): path for path in paths if path.stem == unit}

    def _void(self, path: Path) -> bool:
        try:
            holder, stamp = _read(path)
        except FileNotFoundError:  # just released
            return True
        except (OSError, ValueError):  # not readable now
            return False
        if holder is not None and holder.alive() is False:
            return True
        look = self._looks.get(path)
        if look is None or look.stamp != stamp:
            look = self._looks[path] = _Look(stamp, time.monotonic())
        return time.monotonic() - look.seconds > self._expiry


@contextlib.contextmanager
def locked(folder: Path, expiry: float = LOCK_SECONDS) -> Iterator[None]:
    """Keeps other runs out of a folder. Of several processes of one run, the first one asks.

    A lock whose holder gives no sign of life is watched for as long as one that lives would take
    to give one, and taken over after `expiry` seconds.

    Raises:
        UserError: another run holds it; the message says whose it is.
    """
    if not distributed.is_first():
        yield
        return
    made, place = not folder.exists(), folder / _LOCK_FOLDER
    try:
        with _taken(folder, Leases(place, expiry), expiry):
            yield
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()
            if made:
                folder.rmdir()  # a run that was refused leaves nothing


def _taken(folder: Path, leases: Leases, expiry: float) -> Lease:
    first, logged = None, False
    while (lease := leases.take(_LOCK)) is None:
        holder, sign = leases.look(_LOCK)
        if (holder is not None and holder.alive()) or (first and sign and sign != first):
            raise UserError(
                f"{folder}: another run works in it ({holder or 'of an unknown process'}); wait "
                "for it, end it, or choose another --workdir"
            )
        if not logged:
            logging.info(
                "%s: locked by %s; waiting up to %.0f s for a sign of life",
                folder,
                holder or "an unknown process",
                expiry,
            )
        first, logged = first or sign, True
        time.sleep(expiry / 100)
    return lease
