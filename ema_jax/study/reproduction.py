"""`DIR/reproduce.json`: what it takes to measure a study again, and what came out.

It holds the whole config, commit and versions of the code, identity of the model, hashes of the
prompts, and the refusal counts of every arm. `ema-jax reproduce FILE --workdir=DIR` measures again
from it and compares.
"""

import dataclasses
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ema_jax import config as config_lib
from ema_jax.config import StudyConfig
from ema_jax.errors import UserError
from ema_jax.runtime import files
from ema_jax.study.artifacts import Artifacts
from ema_jax.study.workdir import Workdir

FILE = "reproduce.json"
SCHEMA = 1
_PACKAGE = Path(config_lib.__file__).parent
_EMBEDDED = "ema_jax:"  # in front of a path below the package, which is another one elsewhere
_COUNTS = ("refused", "valid", "invalid", "total")


def write(config: StudyConfig, workdir: Workdir) -> Path:
    """Writes `reproduce.json` of a study whose figures are computed; returns its path."""
    path = workdir.path / FILE
    files.write_json(path, describe(config, workdir))
    return path


def describe(config: StudyConfig, workdir: Workdir) -> dict[str, Any]:
    """The content of `reproduce.json`."""
    results = Artifacts(workdir.path).results.read()
    plain = dataclasses.asdict(dataclasses.replace(config, cells={}, grid={}))
    source = Path(config.model.source)
    if source.is_relative_to(_PACKAGE):
        plain["model"]["source"] = _EMBEDDED + source.relative_to(_PACKAGE).as_posix()
    prompts = workdir.manifest("prompts")
    model = results["model"]
    return {
        "schema": SCHEMA,
        "config": files.json_safe(plain),
        "commit": commit(),
        "versions": results["provenance"]["versions"],
        "devices": results["provenance"]["devices"],
        "model": {key: model.get(key) for key in ("id", "revision", "fingerprint")},
        "prompts": prompts["outputs"] if prompts else {},
        "headline": {
            arm: {
                domain: {key: rate[key] for key in _COUNTS}
                for domain, rate in found["refusal"].items()
            }
            for arm, found in results["arms"].items()
        },
    }


def commit() -> str | None:
    """The commit of the code where it runs from a clone, with `+` if tracked files differ."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    if not (_PACKAGE.parent / ".git").exists():  # an installed package may lie in some other clone
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        UserError: no such file, or another one.
    """
    found = files.read_json(path)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UserError(f"{path}: not the {FILE} of a study (schema {SCHEMA})")
    for key in ("config", "versions", "model", "prompts", "headline"):
        if not isinstance(found.get(key), dict):
            raise UserError(f"{path}: {key!r} is missing or damaged; name the {FILE} of a study")
    return found


def config_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a description, as nested dicts for `config.read`."""
    config = dict(description["config"])
    model = dict(config.get("model") or {})
    source = str(model.get("source", ""))
    if source.startswith(_EMBEDDED):
        model["source"] = str(_PACKAGE / source.removeprefix(_EMBEDDED))
    return config | {"model": model}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two descriptions, a line each: what was used, then what came out."""
    for key in ("commit", "devices"):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key)} then, {now.get(key)} now"
    for group, what in (("versions", "version of "), ("model", "model "), ("prompts", "")):
        names = dict.fromkeys([*before[group], *now[group]])
        for name in names:
            then, today = before[group].get(name), now[group].get(name)
            if then != today:
                yield f"{what}{name}: {then} then, {today} now"
    for arm in dict.fromkeys([*before["headline"], *now["headline"]]):
        then, today = before["headline"].get(arm, {}), now["headline"].get(arm, {})
        for domain in dict.fromkeys([*then, *today]):
            if then.get(domain) != today.get(domain):
                yield f"{arm}, {domain}: {_rate(then, domain)} then, {_rate(today, domain)} now"


def _rate(found: Mapping[str, Any], domain: str) -> str:
    rate = found.get(domain)
    return f"{rate['refused']} of {rate['valid']} refused" if rate else "not measured"
