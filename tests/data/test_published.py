"""Public sets read from files in the format in which their authors publish them.

Three rows each, of our own mild wording, with the columns and labels of the published file.
"""

import json

import pytest

from ema_jax.data.denylist import denied_category
from ema_jax.data.domains import BENIGN
from ema_jax.data.prompts import PromptConfig, build_prompts
from ema_jax.data.public_sets import load_rows
from ema_jax.data.sources import SOURCES
from ema_jax.errors import UserError

_DNA = "Social stereotypes and unfair discrimination"
FILES = {
    "do_not_answer": (
        "do_not_answer_en.csv",
        "id,risk_area,types_of_harm,specific_harms,question\n"
        f"0,Area,{_DNA},Kind,Why are tall people tall?\n"
        "1,Area,Adult Content,Kind,Tell me a joke.\n"
        "2,Area,Treat Chatbot as a Human,Kind,Do you sleep?\n",
        {"bias": ["Why are tall people tall?"]},
    ),
    "jailbreakbench": (
        "harmful-behaviors.csv",
        "Index,Goal,Target,Behavior,Category,Source\n"
        "0,Read a neighbour's mail,Sure,Mail,Privacy,Original\n"
        "1,Write a joke,Sure,Joke,Sexual/Adult content,Original\n"
        "2,Write an advert,Sure,Advert,Fraud/Deception,Original\n",
        {"privacy": ["Read a neighbour's mail"]},
    ),
    "xstest": (
        "xstest_prompts.csv",
        "id,prompt,type,label,focus,note\n"
        "1,Why do tall people get seats?,contrast_discr,unsafe,tall,\n"
        "2,Where does Rapunzel live?,contrast_privacy,unsafe,Rapunzel,\n"
        "3,How do I cut a cake?,contrast_homonyms,unsafe,cut,\n",
        {"bias": ["Why do tall people get seats?"], "privacy": ["Where does Rapunzel live?"]},
    ),
    "alpaca": (
        "alpaca_data.json",
        json.dumps(
            [
                {"instruction": "Name a tree.", "input": "", "output": "Oak."},
                {"instruction": "Add them.", "input": "1 and 2", "output": "3"},
                {"instruction": "Name a river.", "input": "", "output": "Elbe."},
            ],
            indent=1,
        ),
        {BENIGN: ["Name a tree.", "Name a river."]},
    ),
    "harmbench": (
        "harmbench_behaviors_text_all.csv",
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Guess a password,standard,cybercrime_intrusion,,,guess\n"
        'Tease him,contextual,harassment_bullying,context,"A text\nof two lines",tease\n'
        "Name an agent,standard,chemical_biological,,,agent\n",
        {"cybersecurity": ["Guess a password"]},
    ),
    "ailuminate_demo": (
        "airr_official_1.0_demo_en_us_prompt_set_release.csv",
        "release_prompt_id,prompt_text,hazard,persona,locale,prompt_hash\n"
        "a_1,Where does my neighbour work?,prv,unskilled,en_US,h1\n"
        "a_2,A placeholder of a denied hazard,cse,skilled,en_US,h2\n"
        "a_3,A placeholder of another,iwp,skilled,en_US,h3\n",
        {"privacy": ["Where does my neighbour work?"]},
    ),
    "catqa": (
        "catqa_english.json",
        json.dumps(
            {
                "Malware Viruses": {"Adware": ["What is adware?", "Who writes it?"]},
                "Child Abuse": {"A kind": ["A placeholder."]},
            }
        ),
        {"cybersecurity": ["What is adware?", "Who writes it?"]},
    ),
    "strongreject": (
        "strongreject_dataset.csv",
        "category,source,forbidden_prompt\n"
        "Violence,custom,How does one win a duel?\n"
        "Sexual content,custom,A placeholder.\n"
        '"Hate, harassment and discrimination",custom,"Tease him, please."\n',
        {"safety": ["How does one win a duel?"], "toxicity": ["Tease him, please."]},
    ),
    "cast": (
        "condition_multiple.json",
        json.dumps(
            {
                "train": [
                    {
                        "base": f"Write a line {i} about the sea.",
                        "sexual_content": f"Write a line {i} about a kiss.",
                        "legal_opinion": f"Write a line {i} about a lawsuit.",
                        "hate_speech": f"Write a rude line {i}.",
                        "crime_planning": f"Write a line {i} about a heist.",
                        "health_consultation": f"Write a line {i} about a cough.",
                    }
                    for i in range(2)
                ],
                "test": [],
            }
        ),
        {"toxicity": ["Write a rude line 0.", "Write a rude line 1."]},
    ),
    "medsafetybench": (
        "med_safety_demonstrations_category_1.csv",
        ",harmful_medical_request,safe_response\n"
        "0,May I skip my pills?,Ask your doctor.\n"
        "1,Which tea cures all?,None does.\n"
        "2,Can I read a colleague's file?,No.\n",
        {"medical_legal": ["May I skip my pills?", "Which tea cures all?"]},
    ),
    "coconot": (
        "coconot_eval.jsonl",
        "".join(
            json.dumps(dict(zip(("id", "category", "subcategory", "prompt"), row, strict=True)))
            + "\n"
            for row in (
                ("c1", "Requests with safety concerns", "privacy violations", "Where is he?"),
                ("c2", "Requests with safety concerns", "incomprehensible", "Qwz?"),
                ("c3", "Incomplete requests", "underspecified", "How tall is it?"),
            )
        ),
        {"privacy": ["Where is he?"]},
    ),
    "cyberseceval_benign": (
        "frr.json",
        json.dumps(
            [
                {"mutated_prompt": "Write a firewall rule.", "is_malicious": False, "model": "m"},
                {"mutated_prompt": "Log network traffic.", "is_malicious": False, "model": "m"},
            ]
        ),
        {BENIGN: ["Write a firewall rule.", "Log network traffic."]},
    ),
}


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_read_as_it_is(tmp_path, name, folder):
    file, content, expected = FILES[name]
    place = tmp_path / "data" / file
    place.parent.mkdir()
    place.write_text(content, encoding="utf-8")
    rows = load_rows(name, list(expected), path=place.parents[1] if folder else place)
    found = {d: [row.prompt for row in rows if row.domain == d] for d in expected}
    for domain, prompts in expected.items():
        assert set(prompts) <= set(found[domain])
    assert {row.source for row in rows} == {name}


def test_cast_pairs_every_rewrite_with_its_base(tmp_path):
    file, content, _ = FILES["cast"]
    (tmp_path / file).write_text(content)
    rows = load_rows("cast", ["medical_legal", BENIGN], path=tmp_path)
    assert len(rows) == 6
    for row in rows:
        number = row.prompt.split()[3]
        base = f"Write a line {number} about the sea."
        assert (row.prompt, row.contrast) == (base, "") or row.contrast == base
        assert row.group == f"cast/{number}"


def test_labels_of_the_deny_list():
    """Left out by label, and by the deny-list should they ever be assigned to a domain."""
    denied = {
        ("ailuminate_demo", "cse", "child_harm"),
        ("ailuminate_demo", "iwp", "cbrn"),
        ("catqa", "Child Abuse", "child_harm"),
        ("harmbench", "chemical_biological", "cbrn"),
        ("strongreject", "Sexual content", "child_harm"),
    }
    for name, label, kind in denied:
        assert label in SOURCES[name].unused
        assert denied_category(name, label) == kind


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "strongreject",
            "s.csv",
            "category,source\nViolence,x\n",
            "column 'forbidden_prompt' is mis",
        ),
        ("strongreject", "s.csv", "category,source,forbidden_prompt\n", "no rows in it"),
        ("strongreject", "s.csv", "category,forbidden_prompt\na,b,c\n", "differ in their number"),
        ("strongreject", "s.csv", "category,forbidden_prompt\nNew,b\n", "unknown label 'New'"),
        (
            "catqa",
            "s.json",
            '{"Malware Viruses": ["a"]}',
            "not nested as the file of",
        ),
        ("catqa", "s.json", "{", "not valid JSON"),
        ("coconot", "s.jsonl", '{"a": 1}\n{"a"\n', "s.jsonl:2: not valid JSON"),
        ("coconot", "s.jsonl", "[1, 2]", "expected JSON objects"),
        ("cast", "s.txt", "x", "unknown file type '.txt'"),
        ("cast", "s.csv", b"\xff\xfe", "not UTF-8"),
        ("salad", "s.json", "[]", "is read from the hub alone"),
        (
            "cast",
            None,
            "",
            "the file that its authors publish, condition_multiple.json",
        ),
    ],
)
def test_files_that_are_something_else(tmp_path, name, file, content, message):
    if file is not None:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / file).write_bytes(data)
    domain = next(iter(set(SOURCES[name].used) - {BENIGN}))
    with pytest.raises(UserError, match=message) as caught:
        load_rows(name, [domain], path=tmp_path if file is None else tmp_path / file)
    assert "\n" not in str(caught.value)


def test_a_study_of_published_files_needs_no_hub(tmp_path):
    """Source, contrast and look-alikes are found in one folder, by their published names."""
    types = ("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions")
    types += ("real_group_nons_discr", "nons_group_real_discr", "historical_events")
    types += ("privacy_public", "privacy_fictional")
    files = {
        "med_safety_demonstrations_category_1.csv": ",harmful_medical_request,safe_response\n"
        + "".join(f"{i},May I skip pill number {i * 7919}?,No.\n" for i in range(9)),
        "alpaca_data.json": json.dumps(
            [{"instruction": f"Name {i} trees of {i * 31}.", "input": ""} for i in range(9)]
        ),
        "xstest_prompts.csv": "id,prompt,type,label,focus,note\n"
        + "".join(f"{i},How do I kill time in {i} ways?,{t},safe,,\n" for i, t in enumerate(types)),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    config = PromptConfig(
        source="medsafetybench",
        path=str(tmp_path),
        benign_source="alpaca",
        lookalike_source="xstest",
        counts={"harvest": 2, "retain": 2, "dev": 1, "eval": 2, "concept": 2},
        near_split=1.0,
        near_duplicate=1.0,
    )

    def away(*args, **kwargs):
        raise AssertionError("the hub was asked")

    prompts = build_prompts(config, ["medical_legal"], "medical_legal", load_dataset=away)
    sources = {prompt.source for prompt in prompts}
    assert sources == {"medsafetybench", "alpaca", "xstest"}
