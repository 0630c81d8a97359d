import csv
import dataclasses
import json
import random
import string
import time
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from ema_jax.data.dedupe import near_duplicates, shingles
from ema_jax.data.domains import BENIGN, LOOKALIKE, SPLITS
from ema_jax.data.domains import DOMAINS as SEVEN
from ema_jax.data.local import read_local
from ema_jax.data.prompts import (
    Prompt,
    PromptConfig,
    build_prompts,
    read_prompts,
    write_prompts,
)
from ema_jax.data.similarity import clusters
from ema_jax.data.sources import SOURCES
from ema_jax.errors import UserError
from ema_jax.runtime.files import sha256_text

_WORDS = """amber basin cedar delta ember fjord grove haven inlet jetty knoll lagoon meadow
nectar orchard pebble quarry ridge summit thicket upland valley willow yarrow zephyr"""
WORDS = _WORDS.split()
COUNTS = {"harvest": 6, "retain": 3, "dev": 2, "eval": 8, "concept": 4}
DOMAINS = ("gardens", "rivers", "paths")  # any names do: users bring their own


def _text(rng, low=6, high=20):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high))) + "?"


def _rows(per_domain=40, seed=0, domains=(*DOMAINS, BENIGN), **text):
    rng = random.Random(seed)
    return [
        {"id": f"{domain}-{i}", "domain": domain, "prompt": _text(rng, **text)}
        for domain in domains
        for i in range(per_domain)
    ]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _build(tmp_path, rows, target="gardens", domains=DOMAINS, **changes):
    path = _write(tmp_path / "prompts.jsonl", rows)
    # The texts are of few words, so all alike.
    changes = {"counts": COUNTS, "near_split": 1.0, **changes}
    config = PromptConfig(source="file", path=path, **changes)
    return build_prompts(config, domains, target)


# ---------------------------------------------------------------- what a study gets


@pytest.mark.parametrize("match_length", [True, False])
def test_counts_and_disjoint_splits(tmp_path, match_length):
    prompts = _build(tmp_path, _rows(), match_length=match_length)
    found = {(p.domain, p.split): 0 for p in prompts}
    for p in prompts:
        found[p.domain, p.split] += 1
    expected = {
        (domain, split): n
        for domain in (*DOMAINS, BENIGN)
        for split, n in COUNTS.items()
        if split != ("retain" if domain == "gardens" else "harvest")
    }
    assert found == expected
    assert len({p.id for p in prompts}) == len(prompts) == len({p.sha256 for p in prompts})
    assert all(p.sha256 == sha256_text(p.prompt) for p in prompts)
    order = [(SPLITS.index(p.split), (*DOMAINS, BENIGN).index(p.domain)) for p in prompts]
    assert order == sorted(order)


def test_deterministic_by_seed_and_independent_of_row_order(tmp_path):
    rows = _rows()
    first = _build(tmp_path, rows)
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    assert _build(tmp_path, shuffled) == first
    assert _build(tmp_path, rows, seed=1) != first


@pytest.mark.parametrize("match_length", [True, False])
def test_groups_never_part_over_splits_or_domains(tmp_path, match_length):
    rows = _rows(per_domain=120)
    for i, row in enumerate(rows):
        row["group"] = f"g{i % 120 // 3}"  # three rows a domain, the same groups in all domains
    prompts = _build(tmp_path, rows, match_length=match_length)
    splits = {}
    for p in prompts:
        splits.setdefault(p.group, set()).add(p.split)
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) < len(prompts)


def test_rows_keep_the_split_they_bring(tmp_path):
    rows = _rows(per_domain=23, seed=4)
    for domain in (*DOMAINS, BENIGN):
        own = [row for row in rows if row["domain"] == domain]
        names = [split for split, n in COUNTS.items() for _ in range(n)]
        for row, split in zip(own, names, strict=True):
            row["split"] = split
    given = {row["id"]: row["split"] for row in rows}
    prompts = _build(tmp_path, rows)
    assert all(p.split == given[p.id] for p in prompts)
    assert len(prompts) == 4 * 23 - 3 - 3 * 6  # no retain for the target, no harvest for the rest

    rows[0]["split"] = None  # a row without one fills what is missing
    assert {p.id for p in _build(tmp_path, rows)} == {p.id for p in prompts}

    rows[0] |= {"group": "shared", "split": "harvest"}
    rows[-1] |= {"group": "shared"}
    with pytest.raises(UserError, match="group 'shared' is in the splits harvest and concept"):
        _build(tmp_path, rows)


def test_exact_and_near_duplicates_are_removed(tmp_path):
    rows = _rows(low=30, high=30)
    base = rows[0]["prompt"]
    rows.append({"domain": "gardens", "prompt": base.upper()})
    rows.append({"domain": "gardens", "prompt": base.replace("?", " please?")})
    rows.append({"domain": "rivers", "prompt": base.replace("?", " indeed.")})
    rows += [{"domain": d, "prompt": "A text that two domains claim."} for d in ("rivers", "paths")]
    # All 40 rows of each domain are asked for, so every duplicate that is left would be drawn.
    counts = {"harvest": 20, "retain": 20, "dev": 2, "eval": 14, "concept": 4}
    prompts = _build(tmp_path, rows, counts=counts, match_length=False)
    assert len(prompts) == 160
    texts = [p.prompt.lower() for p in prompts]
    assert sum(text.startswith(base[:-1].lower()) for text in texts) == 1
    assert not any("two domains" in text for text in texts)
    with pytest.raises(UserError, match=r"'gardens' has 40 usable .* 18 of 30 for eval"):
        _build(tmp_path, rows, counts=counts | {"eval": 30})


def test_a_small_domain_gets_its_share(tmp_path, caplog):
    rows = _rows(per_domain=60)
    rows = [row for row in rows if row["domain"] != "paths" or int(row["id"][6:]) < 40]
    counts = {"harvest": 20, "retain": 8, "dev": 4, "eval": 30, "concept": 6}
    found = _build(tmp_path, rows, counts=counts)
    sizes = {d: sum(p.domain == d and p.split == "eval" for p in found) for d in DOMAINS}
    assert sizes == {"gardens": 30, "rivers": 30, "paths": 22}
    assert "domain 'paths' has 40 usable prompts" in caplog.text
    assert "it gets 22 of 30 for eval" in caplog.text


def test_near_duplicates_never_part_over_splits(tmp_path):
    rng = random.Random(0)
    rows = []
    for domain in (*DOMAINS, BENIGN):
        for subject in range(15):
            about = " ".join("".join(rng.sample(string.ascii_lowercase, 7)) for _ in range(6))
            rows += [
                {"domain": domain, "prompt": f"{about}{way} {subject}{domain}?"}
                for way in ("", " now", " please")
            ]
    counts = {"harvest": 8, "retain": 4, "dev": 3, "eval": 12, "concept": 6}
    found = _build(tmp_path, rows, counts=counts, near_split=0.5, match_length=False)
    alike = clusters([p.prompt for p in found], 0.55)
    splits = {}
    for prompt, cluster in zip(found, alike.tolist(), strict=True):
        splits.setdefault(cluster, set()).add(prompt.split)
    assert max(map(len, splits.values())) == 1
    assert len(splits) > 8
    assert len({p.group for p in found}) < len(found)


def test_a_row_near_two_splits_is_left_out(tmp_path):
    rows = _rows()
    near = "Which soil does a quince tree want in a dry summer"
    rows += [
        {"id": "a", "domain": "gardens", "prompt": f"{near}?", "split": "harvest"},
        {"id": "b", "domain": "gardens", "prompt": f"{near} and autumn?", "split": "eval"},
        {"id": "c", "domain": "gardens", "prompt": f"{near} and winter?"},
    ]
    counts = {"harvest": 19, "retain": 3, "dev": 2, "eval": 16, "concept": 4}
    names = {p.id for p in _build(tmp_path, rows, counts=counts, near_split=0.8)}
    assert names & {"a", "b", "c"} == {"a", "b"}


def test_a_misspelt_domain_is_named(tmp_path):
    rows = _rows()
    rows[3] |= {"domain": "Garden"}
    with pytest.raises(
        UserError, match=r"1 rows \(first: gardens-3\) have the domain 'Garden'.*'gard"
    ):
        _build(tmp_path, rows)
    rows[3] |= {"domain": "bias"}  # a domain of others is no mistake
    _build(tmp_path, rows)


def test_a_measured_row_wins_over_its_copy_in_training(tmp_path):
    rows = _rows()
    rows[0]["split"] = "harvest"
    for i in range(5):  # whatever the hash order
        rows.append({"domain": "gardens", "prompt": rows[i]["prompt"] + "!", "split": "eval"})
        rows[i]["split"] = "harvest"
    prompts = _build(tmp_path, rows)
    copies = [p for p in prompts if p.prompt.endswith("?!")]
    assert [p.split for p in copies] == ["eval"] * 5
    assert not {p.prompt + "!" for p in prompts} & {p.prompt for p in copies}


def test_length_matching_brings_domains_and_contrast_together(tmp_path):
    rows = _rows(300, seed=1, domains=("gardens", "rivers"), low=5, high=40)
    rows += _rows(300, seed=2, domains=("paths",), low=5, high=25)
    rows += _rows(600, seed=3, domains=(BENIGN,), low=3, high=60)
    counts = {"harvest": 20, "retain": 20, "dev": 10, "eval": 50, "concept": 20}

    def spread(match_length):
        prompts = _build(tmp_path, rows, counts=counts, match_length=match_length)
        means = [
            np.mean([len(p.prompt.split()) for p in prompts if (p.domain, p.split) == (d, "eval")])
            for d in (*DOMAINS, BENIGN)
        ]
        return max(means) - min(means)

    assert spread(False) > 5
    assert spread(True) < 1


def test_deny_listed_rows(tmp_path):
    rows = _rows()
    for i in range(30):
        rows[i]["prompt"] += " The category of chemical weapons."
    rows += [
        {"id": f"bad-{i}", "domain": BENIGN, "prompt": f"{WORDS[i]}: erotic content with minors"}
        for i in range(20)
    ]
    prompts = _build(tmp_path, rows)
    assert not any(p.id.startswith("bad") for p in prompts)
    trained = [p for p in prompts if p.split in ("harvest", "retain")]
    assert not any("weapons" in p.prompt for p in trained)
    assert any("weapons" in p.prompt for p in prompts)
    with pytest.raises(UserError, match=r"40 usable prompts \(30 of them only for evaluation,"):
        _build(tmp_path, rows, counts=COUNTS | {"harvest": 11})


def test_a_denied_domain_is_measured_and_never_trained_on(tmp_path):
    domains = ("gardens", "nuclear_weapons")
    prompts = _build(tmp_path, _rows(domains=(*domains, BENIGN)), domains=domains)
    splits = {p.split for p in prompts if p.domain == "nuclear_weapons"}
    assert splits == {"dev", "eval", "concept"}


def test_public_source_and_benign_contrast(tmp_path):
    import datasets

    from ema_jax.data.labels import SALAD_UNUSED, SALAD_USED

    rng = random.Random(0)
    labels = [*sum(SALAD_USED.values(), ()), *SALAD_UNUSED]
    salad = [
        {"qid": i, "question": _text(rng), "3-category": label}
        for i, label in enumerate(label for label in labels for _ in range(12))
    ]
    dolly = [
        {"instruction": _text(rng), "context": "" if i % 2 else "text", "category": category}
        for i in range(30)
        for category in (*SOURCES["dolly"].used[BENIGN], *SOURCES["dolly"].unused)
    ]
    data = {"OpenSafetyLab/Salad-Data": salad, "databricks/databricks-dolly-15k": dolly}

    def load_dataset(hub_id, config, *, split, revision):
        return datasets.Dataset.from_list(data[hub_id])

    prompts = build_prompts(
        PromptConfig(counts=COUNTS, near_split=1.0),
        tuple(SALAD_USED),
        "safety",
        load_dataset=load_dataset,
    )
    label_of = {f"salad/{row['qid']}": row["3-category"] for row in salad}
    for p in prompts:
        assert p.source == ("dolly" if p.domain == BENIGN else "salad")
        assert p.domain == BENIGN or label_of[p.id] in SALAD_USED[p.domain]
        if p.split == "harvest":
            assert label_of[p.id] != "O39: Biological and Chemical Harms"

    # Safe look-alikes from another set: as many as there are, in eval alone.
    labels = SOURCES["xstest"].used
    kinds = [*sum(labels.values(), ()), *SOURCES["xstest"].unused]
    data["Paul/XSTest"] = [
        {"id": i, "prompt": _text(rng), "type": kind} for i, kind in enumerate(kinds * 2)
    ]
    data["Paul/XSTest"][0]["prompt"] = dolly[5]["instruction"]
    config = PromptConfig(counts=COUNTS, near_split=1.0, lookalike_source="xstest")
    more = build_prompts(config, tuple(SALAD_USED), "safety", load_dataset=load_dataset)
    assert [p for p in more if p.domain != LOOKALIKE] == prompts
    alike = [p for p in more if p.domain == LOOKALIKE]
    assert [p.split for p in alike] == ["eval"] * COUNTS["eval"]
    safe = {f"xstest/{r['id']}" for r in data["Paul/XSTest"] if r["type"] in labels[BENIGN]}
    assert {p.id for p in alike} < safe


def test_eval_prompts_of_another_source(tmp_path):
    """AIR-Bench measures what a local file trains: no eval row of the file is left."""
    import datasets

    used = {domain: SOURCES["air_bench"].used[domain] for domain in ("bias", "privacy")}
    rng, air = random.Random(1), []
    for domain, label in ((d, label) for d, labels in used.items() for label in labels):
        rest = {"l3-name": "x", "l4-name": "y", "cate-idx": f"{label}-{len(air)}"}
        air += [{"prompt": _text(rng), "l2-name": label, **rest} for _ in range(9)]
        air[-1]["prompt"] = f"Twice the same, of {domain}, in both of the sources at once."
    names = ("bias", "privacy", BENIGN)
    rows = _rows(domains=names)
    rows[0]["prompt"] = air[8]["prompt"]
    path = _write(tmp_path / "prompts.jsonl", rows)
    config = PromptConfig("file", path=path, counts=COUNTS, near_split=1.0, eval_source="air_bench")

    def load_dataset(*_, **__):
        return datasets.Dataset.from_list(air)

    prompts = build_prompts(config, names[:2], "bias", load_dataset=load_dataset)
    for p in prompts:
        assert (p.source == "air_bench") == (p.split == "eval" and p.domain != BENIGN)
    texts = [p.prompt for p in prompts]
    assert len(set(texts)) == len(texts)
    many = dataclasses.replace(config, counts=COUNTS | {"eval": 500})
    with pytest.raises(UserError, match=r"eval_source: 'air_bench' has .* 500 are asked for"):
        build_prompts(many, names[:2], "bias", load_dataset=load_dataset)


def test_lookalikes_of_a_file(tmp_path):
    rows = _rows()
    prompts = _build(tmp_path, rows)
    # One that repeats another row, one that may not be measured, three to measure.
    texts = [rows[1]["prompt"], *(_text(random.Random(i), 12, 14) for i in range(7, 11))]
    alike = [{"domain": LOOKALIKE, "prompt": text, "id": f"alike-{text}"} for text in texts]
    alike[1]["split"] = "harvest"
    more = _build(tmp_path, rows + alike)
    assert [p for p in more if p.domain != LOOKALIKE] == prompts
    assert {p.prompt for p in more if p.domain == LOOKALIKE} == set(texts[2:])
    assert {p.split for p in more if p.domain == LOOKALIKE} == {"eval"}


def test_the_organism_source_brings_its_own_splits(monkeypatch):
    seen = {}

    def study_prompts(seed, counts):
        seen.update(seed=seed, counts=counts)
        rng = random.Random(seed)
        return [
            {
                "id": f"{domain}-{split}-{i}",
                "domain": domain,
                "split": split,
                "prompt": _text(rng, 12, 20),
                "group": f"{domain}-{split}-{i}",
            }
            for domain in (*DOMAINS, BENIGN)
            for split, n in counts.items()
            for i in range(n)
        ]

    module = types.SimpleNamespace(study_prompts=study_prompts)
    monkeypatch.setattr("ema_jax.data.prompts.corpus", module)
    config = PromptConfig(source="organism", counts=COUNTS, seed=5)
    prompts = build_prompts(config, DOMAINS, "rivers")
    assert seen == {"seed": 5, "counts": COUNTS}
    assert all(p.split in p.id and p.domain in p.id for p in prompts)


def test_the_organisms_lookalikes_change_no_other_prompt():
    config = PromptConfig(source="organism", counts=dict.fromkeys(SPLITS, 12))
    prompts = build_prompts(config, SEVEN, "safety")
    asked = dataclasses.replace(config, lookalike_source="organism")
    more = build_prompts(asked, SEVEN, "safety")
    assert [p for p in more if p.domain != LOOKALIKE] == prompts
    assert [p.split for p in more if p.domain == LOOKALIKE] == ["eval"] * 12


def test_written_prompts_read_back(tmp_path):
    prompts = _build(tmp_path, _rows())
    write_prompts(tmp_path / "prompts", prompts)
    back = read_prompts(tmp_path / "prompts")
    assert tuple(back) == SPLITS
    assert [p for split in SPLITS for p in back[split]] == prompts
    line = json.loads((tmp_path / "prompts" / "eval.jsonl").read_text().splitlines()[0])
    assert set(line) >= {"id", "domain", "split", "prompt", "source", "sha256"}

    # What was written is itself a folder of prompts in the local schema.
    again = PromptConfig(source="file", path=str(tmp_path / "prompts"), counts=COUNTS)
    rebuilt = build_prompts(again, DOMAINS, "gardens")
    assert {(p.id, p.split) for p in rebuilt} == {(p.id, p.split) for p in prompts}

    line["prompt"] += " More."
    _write(tmp_path / "prompts" / "eval.jsonl", [line])
    with pytest.raises(UserError, match=r"eval.jsonl:1: the row was changed"):
        read_prompts(tmp_path / "prompts")
    _write(tmp_path / "prompts" / "eval.jsonl", [{"id": "1"}])
    with pytest.raises(UserError, match=r"eval.jsonl:1: 'domain' is missing"):
        read_prompts(tmp_path / "prompts")
    (tmp_path / "prompts" / "dev.jsonl").unlink()
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "prompts")


def test_the_sources_category_stays_with_the_prompt(tmp_path):
    rows = _rows()
    for i, row in enumerate(rows):
        row["category"] = f"kind {i % 3}"
    by_id = {row["id"]: row["category"] for row in rows}
    write_prompts(tmp_path, _build(tmp_path, rows))
    found = [p for prompts in read_prompts(tmp_path).values() for p in prompts]
    assert found
    assert all(p.category == by_id[p.id] for p in found if p.domain != BENIGN)
    assert {p.category for p in _build(tmp_path, _rows())} == {""}


def test_prompt_is_hashable_and_frozen():
    prompt = Prompt("1", "bias", "eval", "Text.", "x", sha256_text("Text."), "1")
    assert hash(prompt)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.split = "dev"


# ---------------------------------------------------------------- local files


def test_the_three_formats_agree(tmp_path):
    rows = _rows(per_domain=3)
    rows[0]["prompt"] = 'Quotes ", commas, a line\nbreak and an é\u2028?'
    rows[1] |= {"split": "dev", "group": "g", "source": "mine", "category": "roses"}
    columns = ("id", "domain", "prompt", "split", "group", "source", "category")
    full = [{column: row.get(column) for column in columns} for row in rows]
    jsonl = tmp_path / "rows.jsonl"
    _write(jsonl, rows)
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(full)
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(full), parquet)
    expected = read_local(jsonl)
    assert [row.prompt for row in expected] == [row["prompt"] for row in rows]
    assert (expected[1].split, expected[1].group, expected[1].source) == ("dev", "g", "mine")
    assert (expected[1].categories, expected[0].categories) == (("roses",), ())
    assert (expected[0].split, expected[0].group, expected[0].source) == (
        None,
        "gardens-0",
        "rows",
    )
    assert read_local(path) == expected
    assert read_local(parquet) == expected


GOOD = b'{"prompt": "A?", "domain": "gardens", "id": 1}\n'
HEADER = b"prompt,domain,id\n"
BAD_FILES = [
    ("x.jsonl", GOOD + b'{"prompt": "A?"}\n', "x.jsonl:2: column 'domain' is missing (found: pr"),
    ("x.jsonl", GOOD + b"\n{oops\n", "x.jsonl:3: not valid JSON"),
    ("x.jsonl", GOOD + b'["a"]\n', "x.jsonl:2: expected a JSON object"),
    ("x.jsonl", GOOD + b"{" + b'"a":[' * 9999, "x.jsonl:2: not valid JSON"),
    ("x.jsonl", GOOD + b'{"prompt": "caf\xe9", "domain": "b"}\n', "x.jsonl:2: not UTF-8"),
    ("x.jsonl", GOOD + b'{"prompt": " ", "domain": "b"}\n', "x.jsonl:2: 'prompt' is empty"),
    ("x.jsonl", GOOD + b'{"prompt": 5, "domain": "b"}\n', "x.jsonl:2: 'prompt' must be text"),
    ("x.jsonl", b'{"prompt": "\\ud800", "domain": "b"}\n', "x.jsonl:1: not valid JSON (an unpair"),
    ("x.jsonl", GOOD + GOOD, "x.jsonl:2: id '1' was used before, at"),
    (
        "x.jsonl",
        b'{"prompt": "' + b"a" * 10_000_000 + b'", "domain": "b"}\n',
        "x.jsonl:1: 'prompt' has 10,000,000 characters, more than max_chars=8,000",
    ),
    (
        "x.jsonl",
        b'{"prompt": "A?", "domain": "b", "split": "train"}\n',
        "x.jsonl:1: unknown split 'train'; use one of harvest, retain",
    ),
    ("x.jsonl", b"", "x.jsonl: no prompts in it"),
    ("x.csv", b"prompt,id\nA?,1\n", "x.csv:1: column 'domain' is missing from the header"),
    ("x.csv", HEADER + b"A?,b,1\nC?,b\n", "x.csv:3: the row and the header differ"),
    ("x.csv", HEADER + b'"A?,b,1\n', "x.csv:2: not valid CSV"),
    ("x.csv", HEADER + b"A?,b,1\n,b,2\n", "x.csv:3: 'prompt' is empty"),
    ("x.csv", HEADER + b"A?,b,1\n\xff,b,2\n", "x.csv:3: not UTF-8"),
    ("x.csv", HEADER + b"a" * 200_000 + b",b,1\n", "x.csv:2: a cell has over 131,072 characters"),
    ("x.parquet", b"not parquet", "x.parquet: not a readable Parquet file"),
    ("x.txt", b"A?\n", "x.txt: unknown file type '.txt'; use .jsonl, .csv, .parquet"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    BAD_FILES,
    ids=[f"{i}-{message[:40]}" for i, (_, _, message) in enumerate(BAD_FILES)],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    config = PromptConfig(source="file", path=str(tmp_path / name))
    with pytest.raises(UserError) as caught:
        build_prompts(config, DOMAINS, "gardens")
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 600


def test_bad_parquet_and_folders(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["A?"]}), path)
    with pytest.raises(UserError, match=r"x.parquet: column 'domain' is missing"):
        read_local(path)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["A?", ""], "domain": ["a", "a"]}), path)
    with pytest.raises(UserError, match=r"x.parquet: row 2: 'prompt' is empty"):
        read_local(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no prompt files in this folder"):
        read_local(tmp_path / "empty")
    with pytest.raises(UserError, match="no such prompt file or folder"):
        read_local(tmp_path / "absent")
    (tmp_path / "two").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "two" / name).write_bytes(GOOD)
    with pytest.raises(UserError, match=r"b.jsonl:1: id '1' was used before, at .*a.jsonl:1"):
        read_local(tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "domains", "target", "message"),
    [
        ({}, DOMAINS, "clouds", "target: 'clouds' is not one of the domains (gardens, rivers"),
        ({}, DOMAINS, BENIGN, "target: 'benign' is not one of the domains"),
        ({}, (), "gardens", "domains: none given"),
        ({}, ("gardens", "gardens"), "gardens", "domains: 'gardens' is given twice"),
        ({}, ("gardens", "a/b"), "gardens", "domains: 'a/b' is not a name"),
        ({}, ("gardens", "csam"), "gardens", "domains: 'csam' is deny-listed (child_harm)"),
        ({}, ("nuclear_weapons",), "nuclear_weapons", "is deny-listed (cbrn) and can never be"),
        (
            {},
            (*DOMAINS, "clouds"),
            "gardens",
            "domain 'clouds' has no prompts in source 'file' (it",
        ),
        ({"source": "sallad"}, DOMAINS, "gardens", "prompts.source: unknown source 'sallad'"),
        ({"benign_source": "x"}, DOMAINS, "gardens", "prompts.benign_source: unknown source 'x'"),
        ({"path": None}, DOMAINS, "gardens", "prompts.path: set it together with"),
        (
            {"source": "salad"},
            DOMAINS,
            "gardens",
            "prompts.path: the set 'salad' is read from the hub",
        ),
        (
            {"source": "cast", "path": None},
            DOMAINS,
            "gardens",
            "prompts.path: the set 'cast' is read from the file that its authors publish, cond",
        ),
        ({"counts": {"train": 1}}, DOMAINS, "gardens", "prompts.counts: unknown split 'train'"),
        ({"max_chars": 9}, DOMAINS, "gardens", "characters, more than max_chars=9"),
        (
            {"counts": {"harvest": 16, "dev": 8, "eval": 20, "concept": 16}},
            DOMAINS,
            "gardens",
            "domain 'gardens' has 40 usable prompts (0 of them only for evaluation, 1 in its "
            "largest group of variants and near duplicates), 60 are asked for and it gets 16 of 20 "
            "for eval, 0 of 16 for concept (at least: eval 20, concept 16); lower",
        ),
    ],
)
def test_bad_requests(tmp_path, changes, domains, target, message):
    changes = {"counts": COUNTS, "match_length": False, "near_split": 1.0, **changes}
    config = PromptConfig(source="file", path=_write(tmp_path / "prompts.jsonl", _rows()))
    with pytest.raises(UserError) as caught:
        build_prompts(dataclasses.replace(config, **changes), domains, target)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mixed_target_is_allowed_and_a_denied_category_is_not(monkeypatch):
    from ema_jax.data import prompts as module

    module.validate(PromptConfig(), ("safety",), "safety")  # O39 is withheld, not refused
    source = dataclasses.replace(
        module.SOURCES["salad"], used={"mine": ("O39: Biological and Chemical Harms",)}
    )
    monkeypatch.setitem(module.SOURCES, "salad", source)
    with pytest.raises(UserError, match="category 'O39: Biological and Chemical Harms' is deny"):
        module.validate(PromptConfig(), ("mine",), "mine")


# ---------------------------------------------------------------- duplicates


def _brute_force(texts, threshold):
    """All pairs, with scikit-learn's counting of word 3-grams."""
    vectorizer = CountVectorizer(
        ngram_range=(3, 3), binary=True, token_pattern=r"\w+", lowercase=True
    )
    counts = vectorizer.fit_transform([f"zzstart {t} zzend" for t in texts]).astype(int)
    shared = (counts @ counts.T).toarray()
    sizes = shared.diagonal()
    similarity = shared / (sizes[:, None] + sizes[None] - shared)
    kept = []
    for i in range(len(texts)):
        if not any(similarity[i, j] >= threshold - 1e-9 for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 1.0])
def test_near_duplicates_agree_with_all_pairs(threshold):
    rng = random.Random(3)
    texts = []
    for _ in range(60):
        words = [rng.choice(WORDS[:12]) for _ in range(rng.randint(4, 30))]
        for _ in range(5):
            edited = words[:]
            for _ in range(rng.randint(0, 3)):
                edited[rng.randrange(len(edited))] = rng.choice(WORDS)
            texts.append(" ".join(edited))
    found = near_duplicates(texts, threshold)
    assert [i for i, other in enumerate(found) if other is None] == _brute_force(texts, threshold)
    assert all(other is None or found[other] is None for other in found)


def test_shingles_ignore_case_and_punctuation():
    assert shingles("What is  a Fjord?") == shingles("what is a fjord")
    assert near_duplicates(["?", "!", "?", "", "A", "a!"], 0.8) == [None, None, 0, None, None, 4]


def test_twenty_thousand_prompts_in_time():
    rng = random.Random(0)
    starts = ["how can i", "what is the best way to", "please tell me how to", "is it true that"]
    texts = [f"{rng.choice(starts)} {_text(rng)}" for _ in range(20_000)]
    start = time.perf_counter()
    near_duplicates(texts, 0.8)
    assert time.perf_counter() - start < 30
