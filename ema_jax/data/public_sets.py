"""Rows of the public prompt sets (`sources`): from files as published, or from the hub."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from ema_jax.data import published
from ema_jax.data.domains import Row
from ema_jax.data.sources import SOURCES, Source
from ema_jax.errors import UserError
from ema_jax.runtime.files import sha256_text

_REACHED_SECONDS = 10

Loader = Callable[..., Any]


def load_rows(
    name: str,
    domains: Sequence[str],
    *,
    path: str | Path | None = None,
    max_chars: int = 8000,
    load_dataset: Loader | None = None,
) -> list[Row]:
    """Reads the prompts of `domains` from a public set.

    Args:
        name: a key of `SOURCES`.
        domains: the domains wanted; each must be covered by the set.
        path: its file as it is published, or a folder that holds it under its own name; without
            one there the set is loaded from the hub.
        max_chars: longer prompts are left out (and counted in the log).
        load_dataset: in place of `datasets.load_dataset`.

    Raises:
        UserError: the set is out of reach, or is not what its registry row says.
    """
    source = SOURCES[name]
    missing = [domain for domain in domains if domain not in source.used]
    if missing:
        raise UserError(
            f"source {name!r} has no prompts for {', '.join(missing)}; it covers "
            f"{', '.join(source.used)}: choose another source or bring a local file"
        )
    files = _published(name, source, path)
    if files:
        data: Any = [record for file in files for record in _records(name, source, file)]
    else:
        data = _download(name, source, load_dataset)
        _check_columns(name, source, data.column_names, str(source.hub_id))
    known = {label for used in source.used.values() for label in used} | set(source.unused)
    seen: set[str] = set()
    rows, skipped = [], Counter[str]()
    for record in data:
        found = _labels(source, record)
        for label in (*found, *_flags(source, record)):
            if label not in known:
                raise UserError(
                    f"source {name!r}: unknown label {label!r:.80} in column {source.category!r}; "
                    "the data set has changed: assign the label in ema_jax.data.sources"
                )
        seen |= set(found)
        domain = _domain(source, record, found)
        prompt = _text(record[source.prompt])
        if domain is None or domain not in domains:
            continue
        if any(record[c] != v for c, v in source.keep.items()):
            continue
        if not prompt or len(prompt) > max_chars:
            skipped["longer than max_chars" if prompt else "empty"] += 1
            continue
        rows.append(_row(name, source, record, domain, prompt, found))
    absent = [label for domain in domains for label in source.used[domain] if label not in seen]
    if absent:
        raise UserError(
            f"source {name!r}: no row has the label {absent[0]!r} in column {source.category!r}; "
            "the data set has changed: pin its revision or correct ema_jax.data.sources"
        )
    logging.info("%s: %d prompts read, skipped: %s", name, len(rows), dict(skipped) or "none")
    return rows


def is_published(name: str, path: str | Path | None) -> bool:
    """Whether the file of a set, as its authors publish it, is at a path or in the folder there."""
    file = SOURCES[name].file
    return file is not None and path is not None and bool(published.find(path, file))


def is_cached(name: str) -> bool:
    """Whether a set was loaded from the hub before, and is in the cache of `datasets`."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    source = SOURCES[name]
    owner, _, rest = (source.hub_id or "").rpartition("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(rest)}"
    # The library writes this file last.
    return any(folder.glob(f"{source.config or '*'}/*/*/dataset_info.json"))


def _published(name: str, source: Source, path: str | Path | None) -> list[Path]:
    """Files of the set below a path; none where it is to be loaded from the hub."""
    files = [] if path is None or source.file is None else published.find(path, source.file)
    if not files and source.hub_id is None:
        raise UserError(
            f"source {name!r}: is read from the file that its authors publish, {source.file}; set "
            "prompts.path to it, or to a folder that holds it"
        )
    if not files and path is not None and not Path(path).is_dir():
        raise UserError(f"source {name!r}: is read from the hub alone; leave prompts.path unset")
    return files


def _records(name: str, source: Source, file: Path) -> list[Mapping[str, Any]]:
    found = published.read_records(file)
    try:
        rows = found if source.flatten is None else list(source.flatten(found))
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{file}: is not nested as the file of source {name!r} is; bring it as it was published"
        ) from None
    if not rows:
        raise UserError(f"{file}: no rows in it")
    for row in rows:
        _check_columns(name, source, row, str(file))
    return rows


def _download(name: str, source: Source, load_dataset: Loader | None) -> Any:
    load_dataset = load_dataset or _load_dataset
    try:
        return load_dataset(
            source.hub_id, source.config, split=source.split, revision=source.revision
        )
    except Exception as error:  # the libraries below raise many kinds, httpx's among them
        # The error's own text stays out: it can hold request headers and signed addresses.
        kind = type(error).__name__
        if source.gated or "gated" in str(error).lower():
            fix = (
                f"the set is gated: accept its licence at https://huggingface.co/datasets/"
                f"{source.hub_id} and set HF_TOKEN (offline: HF_HOME at a cache of it)"
            )
        else:
            fix = (
                "check the network, or point HF_HOME at a cache that holds it, "
                "or use a local file (source='file')"
            )
        raise UserError(
            f"source {name!r}: cannot load {source.hub_id} ({source.config or 'default'}, "
            f"{source.split}; {kind}); {fix}"
        ) from None


def _load_dataset(hub_id: Any, config: str | None, **arguments: Any) -> Any:
    """`datasets.load_dataset`, which takes minutes to see by itself that there is no network."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    offline = datasets.config.HF_HUB_OFFLINE
    try:
        huggingface_hub.HfApi().dataset_info(hub_id, timeout=_REACHED_SECONDS)
    except HfHubHTTPError:
        pass  # the hub answers; what is wrong, the loader says
    except Exception:  # kinds of the HTTP library that the hub's client uses
        datasets.config.HF_HUB_OFFLINE = True  # from its cache, or not at all
    try:
        return datasets.load_dataset(hub_id, config, **arguments)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _check_columns(name: str, source: Source, columns: Iterable[str], place: str) -> None:
    needed = [source.prompt, source.category, source.id, source.group, *source.also, *source.keep]
    needed += [column for column, _ in source.refine.values()]
    for column in needed:
        if column is not None and column not in columns:
            raise UserError(
                f"source {name!r}: column {column!r} is missing from {place} (found "
                f"{', '.join(columns)}); the data set has changed: pin its revision"
            )


def _labels(source: Source, record: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels a record carries."""
    if source.category is None:
        return ()
    value = record[source.category]
    if isinstance(value, Mapping):
        return tuple(label for label, flag in value.items() if flag)
    if source.numbered and str(value).isdecimal() and 1 <= int(value) <= len(source.numbered):
        return (source.numbered[int(value) - 1],)
    return (str(value),)


def _flags(source: Source, record: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a multi-label record's flags, set or not."""
    value = record[source.category] if source.category else None
    return tuple(value) if isinstance(value, Mapping) else ()


def _domain(source: Source, record: Mapping[str, Any], found: Sequence[str]) -> str | None:
    """The one domain a record belongs to; None for none or several."""
    if source.category is None:
        return next(iter(source.used))
    matches = [domain for domain, used in source.used.items() if set(found) & set(used)]
    if len(matches) != 1:
        return None
    column, allowed = source.refine.get(matches[0], (None, ()))
    return matches[0] if column is None or record[column] in allowed else None


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    return value.strip() if isinstance(value, str) else ""


def _row(
    name: str,
    source: Source,
    record: Mapping[str, Any],
    domain: str,
    prompt: str,
    found: tuple[str, ...],
) -> Row:
    key = str(record[source.id]) if source.id else sha256_text(prompt)[:16]
    return Row(
        id=f"{name}/{key}",
        domain=domain,
        prompt=prompt,
        source=name,
        group=f"{name}/{record[source.group]}" if source.group else f"{name}/{key}",
        contrast=_text(record.get(source.contrast)) if source.contrast else "",
        categories=found + tuple(str(record[column]) for column in source.also),
    )
