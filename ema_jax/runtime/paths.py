"""Paths that a user writes: `~` is expanded, and what is no path of this machine is refused."""

import os
import re
from pathlib import Path

from ema_jax.errors import UserError

# gs://bucket, S3:/bucket, hdfs:folder, but not C:/folder or runs/a:b.
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/|(?:gs|gcs|s3|s3a|hdfs|file|abfss?|az|https?|hf):", re.I)
_LONGEST_NAME = 255  # bytes, on nearly every file system


def local_path(text: str | os.PathLike[str], what: str) -> Path:
    """A path of this machine as a user wrote it, with `~` expanded.

    Args:
        text: what was given.
        what: the flag or field that holds it, for messages.

    Raises:
        UserError: it is empty, a URL (which would become a folder of that name), the home of nobody
            here, or has a name that no file system takes.
    """
    text = os.fspath(text)
    if not text.strip():
        raise UserError(f"{what}: empty; name a path")
    if _URL.match(text.strip()):
        raise UserError(
            f"{what}: {text!r:.200} is a URL; name a path on this machine (mount the store, or "
            "copy from and to it)"
        )
    if "\0" in text:
        raise UserError(f"{what}: {text!r:.200} holds a null character; name a path")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{what}: {text!r:.200}: no such user; write the path out") from None
    longest = max(path.parts, key=len, default="")
    if len(os.fsencode(longest)) > _LONGEST_NAME or len(os.fsencode(path)) > 4095:
        raise UserError(f"{what}: {text[:60]!r}… is too long for a path; choose a shorter one")
    return path
