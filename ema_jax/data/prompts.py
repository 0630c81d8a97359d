"""The study's prompts: loaded, screened, deduplicated, split, hashed.

`harvest` is drawn for the target domain, `retain` for every other domain and the benign contrast,
`dev`, `eval` and `concept` for all; safe look-alikes are for `eval` alone. No group of rows, and no
near duplicate, is in two splits. Everything depends on the seed and on the set of rows, not on
their order.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

from absl import logging
from pydantic import Field, PositiveInt

from ema_jax.data import corpus
from ema_jax.data.dedupe import near_duplicates, normalise
from ema_jax.data.denylist import check_target, denied_category, denied_domain, screen
from ema_jax.data.domains import BENIGN, DEFINITIONS, LOOKALIKE, SPLITS, TRAINED, Row
from ema_jax.data.local import parse_record, read_local
from ema_jax.data.public_sets import Loader, is_published, load_rows
from ema_jax.data.similarity import NEAR, clusters
from ema_jax.data.sources import SOURCES
from ema_jax.data.splits import common_lengths, draw, fewest
from ema_jax.errors import UserError, did_you_mean
from ema_jax.runtime.files import read_jsonl, sha256_text, write_jsonl

DEFAULT_COUNTS = {"harvest": 128, "retain": 64, "dev": 32, "eval": 300, "concept": 128}
OWN_SOURCES = ("file", "organism")

Count = Annotated[int, Field(ge=0, le=100_000)]


@dataclass(frozen=True)
class Prompt:
    """One prompt of the study.

    Attributes:
        id: stable name.
        domain: its domain, or `benign`.
        split: one of `SPLITS`.
        prompt: the text.
        source: where it comes from.
        sha256: of the text.
        group: the source row that it and its variants come from: the cluster for statistics.
        category: the source's own label within the domain; empty if it has none.
        contrast: the same prompt rewritten to be benign; empty if the source has none.
    """

    id: str
    domain: str
    split: str
    prompt: str
    source: str
    sha256: str
    group: str
    category: str = ""
    contrast: str = ""


@dataclass(frozen=True)
class PromptConfig:
    """Selection of a study's prompts.

    Attributes:
        source: a public set (`ema_jax.data.sources.SOURCES`), `file` or `organism`.
        benign_source: the public set of the contrast, unless the source brings its own.
        path: the file or folder of source `file` (schema: `ema_jax.data.local`); for a public set,
            its file as published, or a folder of such files, where the sets below are looked for
            too before they are downloaded.
        counts: prompts per domain in each split; splits not named keep their default.
        seed: seed of the draw.
        max_chars: greatest length of a prompt, in characters.
        near_duplicate: Jaccard similarity from which two prompts are one (`ema_jax.data.dedupe`);
            1 keeps all but exact duplicates.
        near_split: cosine of character n-grams from which two prompts that are kept always lie in
            the same split (`ema_jax.data.similarity`); 1 for no such bond.
        match_length: match lengths over the domains and the contrast (`ema_jax.data.splits`).
        lookalike_source: a public set whose benign prompts look harmful (xstest, or_bench,
            jbb_benign), for over-refusal; `organism` with that source. Rows of a file whose domain
            is `safe_lookalike` serve too.
        eval_source: another public set for the `eval` split, for a test out of the source; its
            benign prompts come from there only if the set has some.
    """

    source: str = "salad"
    benign_source: str = "dolly"
    path: str | None = None
    counts: Mapping[str, Count] = field(default_factory=lambda: dict(DEFAULT_COUNTS))
    seed: int = 0
    max_chars: PositiveInt = 8000
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.8
    near_split: Annotated[float, Field(gt=0, le=1)] = NEAR
    match_length: bool = True
    lookalike_source: str | None = None
    eval_source: str | None = None


def build_prompts(
    config: PromptConfig,
    domains: Sequence[str],
    target: str,
    *,
    load_dataset: Loader | None = None,
) -> list[Prompt]:
    """The prompts of a study, in the order of splits and domains.

    Args:
        config: what to draw.
        domains: the responsible-AI domains; `benign` is added.
        target: the one whose refusals are to be unlearned.
        load_dataset: in place of `datasets.load_dataset`.

    Raises:
        UserError: the request, the source or a row is not as it must be, or a domain has too few
            prompts.
    """
    domains = [domain for domain in domains if domain not in (BENIGN, LOOKALIKE)]
    validate(config, domains, target)
    counts = DEFAULT_COUNTS | dict(config.counts)
    loaded = _load(config, [*domains, BENIGN], counts, load_dataset)
    _check_names(loaded, (*domains, BENIGN, LOOKALIKE))
    rows = [row for row in loaded if row.domain in (*domains, BENIGN, LOOKALIKE)]
    locked = _own_splits(rows)
    rows, removed = _clean(rows, config)
    rows, removed["near several splits"] = _bound(rows, config.near_split)
    locked |= _own_splits(rows)
    logging.info("prompts: %d rows left, removed or withheld: %s", len(rows), dict(removed))

    pools = {domain: [row for row in rows if row.domain == domain] for domain in (*domains, BENIGN)}
    for domain, pool in pools.items():
        if not pool:
            there = sorted({row.domain for row in loaded})
            raise UserError(
                f"prompts: domain {domain!r} has no prompts in source {config.source!r} (it has: "
                f"{', '.join(there):.300}){_meant(domain, there)}; rename the domain or bring "
                "prompts for it"
            )
        measured = sum(row.source == config.eval_source for row in pool)
        if config.eval_source and domain != BENIGN and measured < fewest("eval", counts["eval"]):
            raise UserError(
                f"prompts.eval_source: {config.eval_source!r} has {measured} usable prompts for "
                f"{domain!r} and {counts['eval']} are asked for; lower prompts.counts.eval"
            )
    lengths = common_lengths(list(pools.values())) if config.match_length else None
    prompts = []
    for domain, pool in pools.items():
        unused = "retain" if domain == target else "harvest"
        wanted = {split: n for split, n in counts.items() if split != unused}
        if denied_domain(domain):
            wanted.pop("retain", None)  # a cbrn domain is evaluated only
        prompts += [_prompt(row) for row in draw(domain, pool, wanted, lengths, locked)]
    # As many as there are: they are a figure by themselves and compared with no other domain.
    alike = [row for row in rows if row.domain == LOOKALIKE and row.split in (None, "eval")]
    wanted = {"eval": min(counts["eval"], len(alike))}
    prompts += [_prompt(row) for row in draw(LOOKALIKE, alike, wanted, None, locked)]
    _check_ids(prompts)
    place = {domain: i for i, domain in enumerate((*pools, LOOKALIKE))}
    return sorted(prompts, key=lambda p: (SPLITS.index(p.split), place[p.domain], p.id))


def validate(config: PromptConfig, domains: Sequence[str], target: str) -> None:
    """Refuses a request that cannot be met, before anything is read."""
    if not domains:
        raise UserError("domains: none given; name at least the target domain")
    check_target(target)
    repeated = [domain for domain, n in Counter(domains).items() if n > 1]
    if repeated:
        raise UserError(f"domains: {repeated[0]!r} is given twice; name each domain once")
    if target not in domains:
        named = f"({', '.join(domains)}){did_you_mean(target, domains)}"
        raise UserError(f"target: {target!r} is not one of the domains {named}")
    for domain in domains:
        if not re.fullmatch(r"[\w.-]+", domain):
            raise UserError(
                f"domains: {domain!r:.80} is not a name; use letters, digits, '_', '-' and '.'"
            )
        if denied_domain(domain) == "child_harm":
            raise UserError(f"domains: {domain!r} is deny-listed (child_harm); remove it")
    known = (*SOURCES, *OWN_SOURCES)
    for name, value in (("source", config.source), ("benign_source", config.benign_source)):
        if value not in (known if name == "source" else SOURCES):
            meant = f"{', '.join(known)}{did_you_mean(value, known)}"
            raise UserError(f"prompts.{name}: unknown source {value!r}; use {meant}")
    alike = config.lookalike_source
    own = alike == config.source == "organism"  # it has some of its own
    if alike is not None and not own and BENIGN not in getattr(SOURCES.get(alike), "used", ()):
        fit = ", ".join(name for name, source in SOURCES.items() if BENIGN in source.used)
        raise UserError(f"prompts.lookalike_source: {alike!r} has no benign prompts; use of {fit}")
    if alike is not None and not own and alike in (config.source, config.benign_source):
        raise UserError(
            f"prompts.lookalike_source: {alike!r} is source or contrast already; use another"
        )
    if config.eval_source is not None and config.eval_source not in SOURCES:
        raise UserError(
            f"prompts.eval_source: unknown source {config.eval_source!r}; use {', '.join(SOURCES)}"
        )
    if config.eval_source is not None and config.eval_source == config.source:
        raise UserError(
            f"prompts.eval_source: {config.eval_source!r} is the source; leave it unset"
        )
    if config.source == "file" and config.path is None:
        raise UserError("prompts.path: set it together with prompts.source='file'")
    if config.source == "organism" and config.path is not None:
        raise UserError("prompts.path: the source 'organism' has no file; leave it unset")
    for name in public_sets(config):
        path = path_of(config, name)
        if SOURCES[name].hub_id is None and path is None:
            raise UserError(
                f"prompts.path: the set {name!r} is read from the file that its authors publish, "
                f"{SOURCES[name].file}; set it to a folder that holds it"
            )
        if name == config.source and SOURCES[name].file is None and path and not path.is_dir():
            raise UserError(f"prompts.path: the set {name!r} is read from the hub; leave it unset")
    for split in config.counts:
        if split not in SPLITS:
            raise UserError(f"prompts.counts: unknown split {split!r}; use {', '.join(SPLITS)}")
    if config.source in SOURCES:
        # Its cbrn categories may stay in a mixed domain: `screen` withholds them from harvest.
        labels = SOURCES[config.source].used.get(target, ())
        trained = [x for x in labels if denied_category(config.source, x) != "cbrn"]
        check_target(target, trained or labels, config.source)


def known_offline(config: PromptConfig) -> bool:
    """Whether all prompts are here: the project's, the user's, or in published files."""
    return config.source in OWN_SOURCES or all(
        is_published(name, path_of(config, name)) for name in public_sets(config)
    )


def public_sets(config: PromptConfig) -> list[str]:
    """Names of the public sets that are read, as far as the config tells."""
    names = [config.source, config.eval_source, config.lookalike_source]
    if config.source in SOURCES and BENIGN not in SOURCES[config.source].used:
        names.append(config.benign_source)
    return [name for name in names if name in SOURCES]


def path_of(config: PromptConfig, name: str) -> Path | None:
    """Where the published file of a set is to be looked for, if anywhere.

    A single file is the source's; in a folder those of the others are found by their names.
    """
    path = None if config.path is None else Path(config.path)
    return path if path is not None and (name == config.source or path.is_dir()) else None


def write_prompts(folder: str | Path, prompts: Sequence[Prompt]) -> None:
    """Writes `folder/SPLIT.jsonl` for every split, an empty one too."""
    for split in SPLITS:
        found = (asdict(prompt) for prompt in prompts if prompt.split == split)
        # Few sources have it.
        rows = ({k: v for k, v in row.items() if k != "contrast" or v} for row in found)
        write_jsonl(Path(folder) / f"{split}.jsonl", rows)


def read_prompts(folder: str | Path) -> dict[str, list[Prompt]]:
    """Reads the files of `write_prompts`: split -> prompts.

    Raises:
        UserError: a file is missing, or a row is not as it was written.
    """
    result: dict[str, list[Prompt]] = {}
    names = tuple(Prompt.__dataclass_fields__)
    for split in SPLITS:
        path = Path(folder) / f"{split}.jsonl"
        result[split] = []
        for number, row in enumerate(read_jsonl(path), start=1):
            record = {"category": "", "contrast": ""} | row  # older folders have none
            missing = [name for name in names if not isinstance(record.get(name), str)]
            if missing:
                raise UserError(f"{path}:{number}: {missing[0]!r} is missing; rebuild the prompts")
            prompt = Prompt(**{name: record[name] for name in names})
            if prompt.sha256 != sha256_text(prompt.prompt) or prompt.split != split:
                raise UserError(
                    f"{path}:{number}: the row was changed (its hash or split does not fit); "
                    "rebuild the prompts"
                )
            result[split].append(prompt)
    return result


def _load(
    config: PromptConfig,
    domains: list[str],
    counts: Mapping[str, int],
    load_dataset: Loader | None,
) -> list[Row]:
    def load(name: str, wanted: Sequence[str]) -> list[Row]:
        return load_rows(
            name,
            wanted,
            path=path_of(config, name),
            max_chars=config.max_chars,
            load_dataset=load_dataset,
        )

    if config.source == "file":
        rows = read_local(config.path or "", max_chars=config.max_chars)
    elif config.source == "organism":
        records = corpus.study_prompts(config.seed, dict(counts))
        if config.lookalike_source == "organism":
            records += corpus.study_lookalikes(config.seed, counts["eval"])
        rows = [
            parse_record(record, f"organism: row {i}", "organism", config.max_chars)
            for i, record in enumerate(records, start=1)
        ]
    else:
        rows = load(config.source, _covered(config.source, domains))
    if not any(row.domain == BENIGN for row in rows):
        rows += load(config.benign_source, [BENIGN])
    if config.eval_source is not None:
        wanted = _covered(config.eval_source, domains)
        other = load(config.eval_source, wanted)
        rows = [row for row in rows if row.split != "eval" or row.domain not in wanted]
        rows += [replace(row, split="eval") for row in other]
    if config.lookalike_source in SOURCES:
        rows += [replace(row, domain=LOOKALIKE) for row in load(config.lookalike_source, [BENIGN])]
    return rows


def _covered(source: str, domains: Sequence[str]) -> list[str]:
    """The domains to read from a public set: the contrast only if it has one."""
    has_benign = BENIGN in SOURCES[source].used
    return [domain for domain in domains if domain != BENIGN or has_benign]


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), [*known], n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close and close[0] != name else ""


def _check_names(rows: Sequence[Row], domains: Sequence[str]) -> None:
    """Refuses rows whose domain is a misspelt one of the study's; names those that are left out."""
    left = {row.domain: row for row in reversed(rows) if row.domain not in domains}
    for name, row in sorted(left.items()):
        count = sum(row.domain == name for row in rows)
        if name not in DEFINITIONS and _meant(name, domains):
            raise UserError(
                f"prompts: {count} rows (first: {row.id:.80}) have the domain {name!r:.80}, which "
                f"the study does not have{_meant(name, domains)}"
            )
        logging.info("prompts: %d rows of the domain %r are no part of this study", count, name)


def _own_splits(rows: Sequence[Row]) -> dict[str, str]:
    """Group -> the split that the source itself assigns it."""
    splits: dict[str, str] = {}
    for row in rows:
        if row.split is not None and splits.setdefault(row.group, row.split) != row.split:
            raise UserError(
                f"prompts: group {row.group!r:.80} is in the splits {splits[row.group]} and "
                f"{row.split}; a group must stay in one split"
            )
    return splits


def _clean(rows: Sequence[Row], config: PromptConfig) -> tuple[list[Row], Counter[str]]:
    """Screens and deduplicates; returns the rows in their order of precedence."""
    allowed, removed = screen(rows)

    domains: dict[str, set[str]] = {}
    for row in allowed:
        claims = domains.setdefault(normalise(row.prompt), set())
        claims |= {row.domain} - {LOOKALIKE}
    # A text that two domains claim belongs to neither.
    clear = [row for row in allowed if len(domains[normalise(row.prompt)]) < 2]
    removed["in two domains"] = len(allowed) - len(clear)

    # Rows with a split of their own come first, measured splits before trained ones: of two
    # duplicates the one that must not leak into training stays. A look-alike displaces no others.
    first = {split: i for i, split in enumerate(("eval", "dev", "concept", *TRAINED))}
    order = sorted(
        clear,
        key=lambda row: (
            row.domain == LOOKALIKE,
            first.get(row.split or "", len(first)),
            sha256_text(f"{config.seed}\n{row.prompt}"),
            row.id,
        ),
    )
    # Exact duplicates have equal shingles, so this finds them too.
    duplicate_of = near_duplicates([row.prompt for row in order], config.near_duplicate)
    unique = [row for row, other in zip(order, duplicate_of, strict=True) if other is None]
    removed["duplicates"] = len(order) - len(unique)
    return unique, removed


def _bound(rows: Sequence[Row], threshold: float) -> tuple[list[Row], int]:
    """Rows with near duplicates in one group, so that they never part over splits.

    A row that is near rows of two splits of their own is left out; look-alikes, which are in `eval`
    alone and alike by design, are not bound.

    Returns:
        The remaining rows, in order, and the number of those left out.
    """
    bound = [i for i, row in enumerate(rows) if row.domain != LOOKALIKE]
    if threshold == 1 or all(rows[i].split is not None for i in bound):
        return list(rows), 0
    found = clusters([rows[i].prompt for i in bound], threshold, [rows[i].group for i in bound])
    members: dict[int, list[int]] = {}
    for i, cluster in zip(bound, found.tolist(), strict=True):
        members.setdefault(cluster, []).append(i)
    made: dict[int, Row | None] = dict(enumerate(rows))
    for together in members.values():
        splits = {rows[i].split for i in together} - {None}
        group = min(rows[i].group for i in together)
        for i in together:
            if len(splits) < 2:
                made[i] = replace(rows[i], group=group)
            elif rows[i].split is None:
                made[i] = None
    kept = [row for row in made.values() if row is not None]
    return kept, len(rows) - len(kept)


def _prompt(row: Row) -> Prompt:
    return Prompt(
        id=row.id,
        domain=row.domain,
        split=row.split or "",
        prompt=row.prompt,
        source=row.source,
        sha256=sha256_text(row.prompt),
        group=row.group,
        category=row.categories[0] if row.categories else "",
        contrast=row.contrast,
    )


def _check_ids(prompts: Sequence[Prompt]) -> None:
    repeated = [name for name, n in Counter(p.id for p in prompts).items() if n > 1]
    if repeated:
        raise UserError(f"prompts: id {repeated[0]!r:.80} is used twice; give every row its own id")
