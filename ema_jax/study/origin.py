"""What a study was made with and by: settings, judge, command, commit and date."""

import contextlib
import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from ema_jax.config import StudyConfig
from ema_jax.refusal.verdicts import RULES_VERSION
from ema_jax.runtime.files import json_safe

_PACKAGE = Path(__file__).parents[1]


def origin(config: StudyConfig, responses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `provenance` says besides versions, hashes and times.

    Args:
        config: the study's.
        responses: rows of the base's responses, which name the judge's version.
    """
    first: Mapping[str, Any] = responses[0] if responses else {}
    return {
        "settings": settings(config),
        "judging": {
            "judge": config.judge,
            "version": first.get("judge_version"),
            "revision": first.get("judge_revision"),
            "rules": RULES_VERSION,
        },
        "command": command(sys.argv),
        "commit": commit(_PACKAGE),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def settings(config: StudyConfig) -> dict[str, Any]:
    """Every field of a study's config as JSON, the arms with what they share filled in."""
    plain = dataclasses.asdict(dataclasses.replace(config, cells={}, grid={}))
    for field in ("cells", "grid", "unlearn"):
        del plain[field]
    plain["arms"] = {name: dataclasses.asdict(config.arm(name)) for name in config.arms}
    return json_safe(plain)


def command(argv: Sequence[str]) -> str | None:
    """The command line, of every absolute path the last part; None in another program."""
    program = PurePath(argv[0]) if argv else PurePath()
    if program.name == "ema-jax":
        words = ["ema-jax"]
    elif _PACKAGE.name in program.parts and program.suffix == ".py":
        place = PurePath(
            *program.parts[len(program.parts) - program.parts[::-1].index("ema_jax") :]
        )
        inner = [part for part in place.with_suffix("").parts if part != "__main__"]
        words = ["python", "-m", ".".join([_PACKAGE.name, *inner])]
    else:
        return None
    return shlex.join([*words, *map(_without_folders, argv[1:])])


def _without_folders(word: str) -> str:
    name, sign, value = word.rpartition("=")
    return f"{name}{sign}{PurePath(value).name}" if value.startswith(("/", "~")) else word


def commit(package: Path) -> str | None:
    """The commit of a package's checkout, with `-dirty` where it was changed; None outside one."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # A virtual environment may lie in somebody else's repository.
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
