"""A disk without room, however a library tells of it."""

import errno
import os

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Codes of the system for writes that find no room: disk, quota, or largest size of a file."""

_FULL_DISK_TEXTS = {os.strerror(code): code for code in FULL_DISK}
# NumPy's, which writes arrays without the system's code: "5 requested and 3 written".
_FULL_DISK_TEXTS[" requested and "] = errno.ENOSPC


def full_disk(error: BaseException) -> int | None:
    """The code of `FULL_DISK` that an error or its cause has, or tells of; None without one.

    Libraries that write by themselves (NumPy, TensorStore, safetensors) keep a text alone.
    """
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return error.errno
    for text, code in _FULL_DISK_TEXTS.items():
        if text in str(error):
            return code
    inner = [error.__cause__, error.__context__]
    inner += error.exceptions if isinstance(error, BaseExceptionGroup) else []
    found = (full_disk(other) for other in inner if other is not None)
    return next((code for code in found if code is not None), None)
