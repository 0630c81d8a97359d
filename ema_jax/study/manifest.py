"""The record of a finished stage: its settings, its inputs, and a hash of every file it wrote.

With each hash stands a stamp, the file's size and time of modification: a file whose stamp is
unchanged is not read again, however large it is. Older records have no stamps.
"""

import contextlib
from pathlib import Path, PurePath
from typing import Any

from absl import logging

from ema_jax.errors import UserError
from ema_jax.runtime import distributed
from ema_jax.runtime.files import read_json, sha256_file, write_json

Manifest = dict[str, Any]

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "settings": dict,
    "inputs": dict,
    "outputs": dict,
    "hash": str,
    "wall_seconds": (int, float),
}


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        UserError: it is damaged, or the record of something else.
    """
    again = "delete it and the stage is run again"
    try:
        found = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    problem = _problem(found, path)
    if problem:
        raise UserError(f"{path}: not the record of a finished stage ({problem}); {again}")
    return found


def _problem(found: Any, path: Path) -> str:
    """What makes parsed JSON no manifest, in words; "" where it is one."""
    if not isinstance(found, dict):
        return "no JSON object"
    for field, kind in _FIELDS.items():
        if not isinstance(found.get(field), kind):
            return f"{field!r} is missing" if field not in found else f"{field!r} is damaged"
    if found["stage"].replace("/", ".") != path.stem:
        return f"it is of the stage {found['stage'][:80]!r}"
    for name, digest in found["outputs"].items():
        place = PurePath(name)
        if place.is_absolute() or ".." in place.parts or not isinstance(digest, str):
            return f"its output {name[:80]!r} is damaged"
    stamps = found.get("stamps", {})
    if not isinstance(stamps, dict):
        return "'stamps' is damaged"
    return ""


def stamp(path: Path) -> list[int]:
    """Size in bytes and time of modification in nanoseconds, as JSON has them."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def verify(root: Path, path: Path, manifest: Manifest) -> None:
    """Checks the files that a stage left: they hold what it wrote, where they are there at all.

    Files with another stamp are hashed; if they are equal (a copied folder), the manifest gets the
    new stamps, so that this happens once.

    Args:
        root: the study's folder.
        path: of the manifest.
        manifest: its contents.

    Raises:
        UserError: a file was changed.
    """
    old = manifest.get("stamps", {})
    stamps = {}
    for name, digest in manifest["outputs"].items():
        file = root / name
        try:
            stamps[name] = stamp(file)
            changed = stamps[name] != old.get(name) and sha256_file(file) != digest
        except FileNotFoundError:
            continue  # whoever needs it makes it again
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); see to it") from None
        if changed:
            raise UserError(
                f"{file}: was changed after the stage {manifest['stage']} wrote it; bring back "
                "the old file, or delete it and run that stage again (the same command does)"
            )
    # Several processes may see times that differ, and only all of them together write a file.
    if any(old.get(name) != found for name, found in stamps.items()) and not distributed.several():
        logging.info("%s: its files were moved or copied, and are as they were", manifest["stage"])
        with contextlib.suppress(OSError):  # a folder that is only read
            write_json(path, manifest | {"stamps": old | stamps})
