"""Checkpoint folders of others: what stands in them is a file of theirs.

A link could lead to any file of this machine: it would be read, and copied into what people share.
The Hub's cache is made of links, into the `blobs` folder beside its snapshots.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from ema_jax.errors import UserError
from ema_jax.runtime.opening import kind

_SUBFOLDERS = ("parameters", "additional_chat_templates")  # those of which anything is read


def check(folder: str | Path) -> None:
    """Refuses links that lead out of a checkpoint folder, and what is neither file nor folder.

    The folder itself may be a link, and so may folders in it that are never read.

    Raises:
        UserError: naming the entry.
    """
    folder = Path(folder)
    root = Path(os.path.realpath(folder))
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else None
    if blobs is not None and blobs.is_symlink():
        blobs = None
    for path in _entries(folder):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if target.parent != blobs:
                raise UserError(
                    f"{path}: a link to {os.readlink(path)!r:.200}; put the file itself into the "
                    "folder (of links, only those of the Hub's cache into its blobs are followed)"
                )
        if (there := kind(path)) not in ("", "a folder"):
            raise UserError(f"{path}: is {there}, and a file is needed; remove it")


def _entries(folder: Path) -> Iterator[Path]:
    """Whatever may be read of a folder; links are not followed."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name in _SUBFOLDERS or not path.is_dir():
            yield path
    for name in _SUBFOLDERS:
        for place, folders, files in os.walk(folder / name):
            yield from (Path(place) / found for found in (*folders, *files))
