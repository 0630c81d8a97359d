import dataclasses

import datasets
import pytest

from ema_jax.data.denylist import (
    check_target,
    denied_category,
    denied_domain,
    denied_text,
    screen,
)
from ema_jax.data.domains import BENIGN, DEFINITIONS, DOMAINS, Row
from ema_jax.data.labels import SALAD_UNUSED, SALAD_USED
from ema_jax.data.public_sets import load_rows
from ema_jax.data.sources import SOURCES
from ema_jax.errors import UserError

# ---------------------------------------------------------------- the registry


def test_the_seven_domains_in_order():
    assert DOMAINS == (
        "cybersecurity",
        "safety",
        "toxicity",
        "bias",
        "sensitive_content",
        "medical_legal",
        "privacy",
    )
    assert all(DEFINITIONS.values())
    assert BENIGN not in DOMAINS


def test_salad_lists_all_66_leaves_once():
    labels = [label for used in SALAD_USED.values() for label in used] + list(SALAD_UNUSED)
    numbers = sorted(int(label[1:].split(":")[0]) for label in labels)
    assert numbers == [n for n in range(1, 68) if n != 61]


@pytest.mark.parametrize("name", SOURCES)
def test_registry_rows_are_consistent(name):
    source = SOURCES[name]
    used = [label for labels in source.used.values() for label in labels]
    assert set(source.used) <= {*DOMAINS, BENIGN}
    assert not set(used) & set(source.unused)
    assert len(set(used)) == len(used)
    assert not [x for x in used if denied_category(name, x) == "child_harm"]
    assert source.licence
    assert source.revision is None or len(source.revision) == 40
    assert source.hub_id or source.file


def _records(name, per_label=2):
    """Label-complete records of a source's schema, with mild prompts."""
    source = SOURCES[name]
    labels = [*sum(source.used.values(), ()), *source.unused] or [None]
    records = []
    for i, label in enumerate(labels * per_label):
        text = f"A mild placeholder question, number {i}, about topic {label}?"
        record = {source.prompt: [text] if source.prompt == "turns" else text}
        record |= dict(source.keep)
        if name == "beavertails":
            record[source.category] = {x: x == label for x in labels}
        elif source.numbered:
            record[source.category] = str(source.numbered.index(label) + 1)
        elif source.category:
            record[source.category] = label
        for column in (source.id, source.group):
            if column:
                record[column] = i
        record |= dict.fromkeys(source.also, "plain")
        for column, allowed in source.refine.values():
            record[column] = allowed[i % len(allowed)]
        records.append(record)
    return records


def _loader(records, calls=None):
    def load_dataset(hub_id, config, *, split, revision):
        if calls is not None:
            calls.append((hub_id, config, split, revision))
        return datasets.Dataset.from_list(records)

    return load_dataset


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.hub_id])
def test_every_source_reads_data_of_its_schema(name):
    source, calls = SOURCES[name], []
    rows = load_rows(name, list(source.used), load_dataset=_loader(_records(name), calls))
    assert calls == [(source.hub_id, source.config, source.split, source.revision)]
    for domain, labels in source.used.items():
        found = [row for row in rows if row.domain == domain]
        assert len(found) == 2 * max(len(labels), 1)
        for row in found:
            assert not labels or set(row.categories) & set(labels)
            assert row.source == name
            assert row.prompt.startswith("A mild placeholder")
    assert len({row.id for row in rows}) == len(rows)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_real_loader_on_files_of_the_salad_schema(tmp_path, kind):
    data = datasets.Dataset.from_list(_records("salad"))
    path = str(tmp_path / f"base_set.{kind}")
    data.to_json(path) if kind == "json" else data.to_parquet(path)

    def load_dataset(hub_id, config, *, split, revision):
        return datasets.load_dataset(
            kind, data_files={split: path}, split=split, cache_dir=str(tmp_path / "cache")
        )

    rows = load_rows("salad", ["toxicity"], load_dataset=load_dataset)
    assert {row.categories for row in rows} == {(x,) for x in SALAD_USED["toxicity"]}


def test_o_numbers_are_matched_as_whole_strings():
    # 2-category "O3: Adult Content" and 3-category "O3: Enjoying someone else's Pain".
    records = _records("salad")
    for record in records:
        record["2-category"] = "O3: Adult Content"
    rows = load_rows("salad", ["sensitive_content"], load_dataset=_loader(records))
    assert {row.categories[0] for row in rows} == set(SALAD_USED["sensitive_content"])
    records[0]["3-category"] = "O3: Adult Content"
    with pytest.raises(
        UserError, match=r"unknown label 'O3: Adult Content' in column '3-category'"
    ):
        load_rows("salad", ["bias"], load_dataset=_loader(records))


def test_a_listed_label_that_never_occurs_is_an_error():
    records = [r for r in _records("salad") if r["3-category"] != "O7: Insult"]
    with pytest.raises(UserError, match=r"no row has the label 'O7: Insult'"):
        load_rows("salad", ["toxicity"], load_dataset=_loader(records))
    assert load_rows("salad", ["bias"], load_dataset=_loader(records))


def test_unknown_flag_of_a_multi_label_source_is_an_error():
    records = _records("beavertails")
    for record in records:
        record["category"]["new_flag"] = False
    with pytest.raises(UserError, match="unknown label 'new_flag'"):
        load_rows("beavertails", ["bias"], load_dataset=_loader(records))


def test_a_prompt_flagged_for_two_domains_belongs_to_neither():
    records = _records("beavertails", per_label=1)
    flags = {x: x in ("privacy_violation", "self_harm") for x in records[0]["category"]}
    records.append({"prompt": "Both.", "category": flags, "is_safe": False})
    rows = load_rows("beavertails", ["privacy", "safety"], load_dataset=_loader(records))
    assert "Both." not in {row.prompt for row in rows}


def test_kept_refined_and_long_rows():
    records = _records("wildguardmix")
    records[0]["adversarial"] = True
    rows = load_rows("wildguardmix", ["cybersecurity"], load_dataset=_loader(records))
    assert len(rows) == 1
    records[0]["adversarial"] = False
    records[0]["prompt"] = "word " * 5000
    rows = load_rows("wildguardmix", ["cybersecurity"], load_dataset=_loader(records))
    assert len(rows) == 1

    records = _records("air_bench")
    for record in records[: len(records) // 2]:
        record["l4-name"] = "Accounting"
    rows = load_rows("air_bench", ["medical_legal"], load_dataset=_loader(records))
    assert len(rows) == 1
    assert rows[0].group.startswith("air_bench/")


def _raise(error):
    def load_dataset(*args, **kwargs):
        raise error

    return load_dataset


@pytest.mark.parametrize(
    ("name", "domain", "load", "message"),
    [
        ("beavertails", "cybersecurity", None, "has no prompts for cybersecurity; it covers"),
        ("salad", "bias", _raise(ConnectionError("https://x?token=hf_SECRET")), "HF_HOME"),
        ("salad", "bias", _raise(ValueError("no such config hf_SECRET")), "base_set, train; Val"),
        ("wildguardmix", "bias", _raise(OSError("401 hf_SECRET")), "accept its licence at https"),
        ("salad", "bias", _raise(RuntimeError("a Gated set hf_SECRET")), "set HF_TOKEN"),
        ("salad", "bias", _loader([{"question": "?", "qid": 1}]), "column '3-category' is missing"),
    ],
)
def test_sources_out_of_reach_or_changed(name, domain, load, message):
    with pytest.raises(UserError) as caught:
        load_rows(name, [domain], load_dataset=load)
    text = str(caught.value)
    assert message in text
    assert "SECRET" not in text
    assert "\n" not in text
    assert caught.value.__cause__ is None


# ---------------------------------------------------------------- the deny-list


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        # Clear combinations, in the words of the categories themselves.
        ("A category: sexual content involving minors.", "child_harm"),
        ("A category: minors in erotic material.", "child_harm"),
        ("The label CSAM.", "child_harm"),
        ("A category: abusing a child.", "child_harm"),
        ("A category about child grooming.", "child_harm"),
        ("Questions on chemical weapons.", "cbrn"),
        ("Questions on nuclear or radiological weapons.", "cbrn"),
        ("The category of bioweapons.", "cbrn"),
        ("A request about producing a nerve agent.", "cbrn"),
        ("Weapons of mass destruction as a category.", "cbrn"),
        # Near misses that must stay.
        ("What is a nuclear family?", None),
        ("How do I repair my child's bicycle?", None),
        ("Help me with my chemical engineering homework.", None),
        ("What is the role of biological agents in composting?", None),
        ("Which minor scales are used in jazz?", None),
        ("A minor update broke the sexual health clinic's web page.", None),
        ("How do I talk about sex education with my children?", None),
        ("How do I report suspected child abuse?", None),
        ("What are the signs of child grooming?", None),
        ("My kids left. The film has a nude statue in it.", None),
        ("Who discovered plutonium?", None),
        ("Does the smallpox vaccine leave a scar?", None),
        ("How does a nuclear power plant make electricity?", None),
        ("How can I stop my kids from hurting each other's feelings?", None),
        ("What is adult content?", None),
    ],
)
def test_keyword_filter(text, kind):
    assert denied_text(text) == kind
    assert denied_text(text.upper()) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("child_harm", "child_harm"),
        ("childSafety", "child_harm"),
        ("csam", "child_harm"),
        ("minors", "child_harm"),
        ("Sexual (minor)", "child_harm"),
        ("cbrn", "cbrn"),
        ("chemical_biological", "cbrn"),
        ("chemicalWeapons", "cbrn"),
        ("nuclear-weapons", "cbrn"),
        ("bio_weapons", "cbrn"),
        ("child_development", None),
        ("care_of_children", None),
        ("nuclear_family", None),
        ("chemical_engineering", None),
        ("biology", None),
        ("minor_scales", None),
        *((domain, None) for domain in (*DOMAINS, BENIGN)),
    ],
)
def test_domain_names(name, kind):
    assert denied_domain(name) == kind


def test_targets():
    check_target("cybersecurity", SALAD_USED["cybersecurity"], "salad")
    with pytest.raises(UserError, match=r"domain 'cbrn' is deny-listed \(cbrn\)"):
        check_target("cbrn")
    with pytest.raises(UserError, match="category 'O6: Child Abuse' is deny-listed"):
        check_target("mine", ["O6: Child Abuse"], "salad")
    with pytest.raises(UserError, match="category 'Chemical Weapons' is deny-listed"):
        check_target("mine", ["Chemical Weapons"])


def test_screen_drops_and_withholds():
    row = Row(id="1", domain="safety", prompt="A mild text.", source="salad", group="1")
    rows = [
        row,
        dataclasses.replace(row, categories=("O39: Biological and Chemical Harms",)),
        dataclasses.replace(row, categories=("O6: Child Abuse",)),
        dataclasses.replace(row, prompt="A category: chemical warfare."),
        dataclasses.replace(row, prompt="A category: sexual content involving children."),
        dataclasses.replace(row, domain="child_abuse"),
    ]
    kept, counts = screen(rows)
    assert [r.evaluate_only for r in kept] == [False, True, True]
    assert counts == {"child_harm": 3, "cbrn": 2}
