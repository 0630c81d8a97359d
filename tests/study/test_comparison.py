"""Several studies side by side: what is paired, and what is not."""

import hashlib

import pytest
from report_fixtures import DOMAINS, example_results

from ema_jax.errors import UserError
from ema_jax.report.compare import write_comparison
from ema_jax.runtime.files import read_jsonl, write_json, write_jsonl
from ema_jax.study.comparison import compare


def study(folder, refused, texts, results=None):
    """A study's files: of every domain `texts` prompts, the first `refused` of them refused."""
    results = results or example_results()
    write_json(folder / "results.json", results)
    prompts, rows = [], []
    for d in DOMAINS:
        for i, text in enumerate(texts):
            sha256 = hashlib.sha256(f"{d} {text}".encode()).hexdigest()
            prompts.append({"id": f"{d}-{i}", "domain": d, "prompt": text, "sha256": sha256})
            verdict = "refused" if i < refused else "complied"
            rows.append({"id": f"{d}-{i}", "domain": d, "verdict": verdict, "reason": ""})
    write_jsonl(folder / "prompts/eval.jsonl", prompts)
    for name in ("base", *(f"{arm}.seed_{k}" for arm in ("npo", "npo_retain") for k in range(3))):
        write_jsonl(folder / f"responses/{name}.jsonl", rows)
    return folder


def test_studies_are_paired_by_the_texts_of_prompts(tmp_path):
    texts = [f"text {i}" for i in range(20)]
    one = study(tmp_path / "one", 20, texts)
    # The same prompts, but for two, in another order under other ids: none of its refusals is lost
    # by the order.
    two = study(tmp_path / "two", 10, [*texts[2:], "new", "newer"])
    found = compare([one, two])
    assert [row["study"] for row in found["rows"]] == ["one"] * 3 + ["two"] * 3
    row = next(r for r in found["rows"] if r["arm"] == "npo")
    npo = example_results()["arms"]["npo"]["refusal"]["cybersecurity"]
    assert (row["target_rate"], row["target_rate_lo"]) == (npo["rate"], npo["ci95"][0])
    assert (row["worst_domain"], row["worst_drop"]) == ("safety", 0.41)
    assert len(found["pairs"]) == 3 * len(DOMAINS)
    for pair in found["pairs"]:
        assert (pair["study"], pair["minus"], pair["n"]) == ("two", "one", 18)
        assert pair["drop"] == pytest.approx(8 / 18)  # of the 18 in common two refuses 10
        assert pair["drop_lo"] < pair["drop"] < pair["drop_hi"]
    assert found["notes"] == []
    write_comparison(tmp_path / "page.html", found, [one, two])
    text = (tmp_path / "page.html").read_text()
    assert "+44.4" in text
    assert (tmp_path / "page_figures/comparison.svg").exists()


def test_the_interval_is_over_the_seeds_too(tmp_path):
    texts = [f"text {i}" for i in range(20)]
    one, two = (study(tmp_path / name, 10, texts) for name in ("one", "two"))
    for k, refused in enumerate((2, 10, 18)):  # by the other study's seeds
        rows = read_jsonl(two / f"responses/npo.seed_{k}.jsonl")
        for i, row in enumerate(rows):
            row["verdict"] = "refused" if i % 20 < refused else "complied"
            if i % 20 == 19:
                row |= {"verdict": "invalid", "reason": "empty"}
        write_jsonl(two / f"responses/npo.seed_{k}.jsonl", rows)
    for pair in compare([one, two])["pairs"]:
        if pair["arm"] == "npo":
            assert pair["n"] == 19
            assert pair["drop"] == pytest.approx(0)
            assert pair["drop_hi"] - pair["drop_lo"] > 1  # three seeds that differ by 80 points


def test_an_arm_that_leaves_the_target_alone_recovers_nothing(tmp_path):
    left = example_results()
    left["arms"]["npo_retain"]["refusal"]["cybersecurity"] |= {"rate": 1.0, "ci95": [0.95, 1.0]}
    folders = [study(tmp_path / "one", 1, "ab"), study(tmp_path / "two", 1, "ab", left)]
    one, two = (r for r in compare(folders)["rows"] if r["arm"] == "npo_retain")
    assert (one["not_contained"], one["recovered"]) == ("", 0.801)
    assert two["not_contained"] == "target not clearly unlearned"
    assert two["recovered"] is two["recovered_lo"] is two["recovered_hi"] is None


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"judge": "wildguard"}, "two: judged by wildguard, and one by lexical 1: not paired"),
        ({}, "two: no prompt, or no arm and seed, in common with one"),
    ],
)
def test_what_cannot_be_paired_is_said(tmp_path, change, note):
    one = study(tmp_path / "one", 3, ["a", "b", "c", "d"])
    two = study(tmp_path / "two", 3, ["e", "f"], example_results() | change)
    found = compare([one, two])
    assert (found["pairs"], found["notes"]) == ([], [note])


def test_a_baseline_is_compared_too(tmp_path):
    full = example_results()
    only = {k: full[k] for k in ("schema", "model", "target", "domains", "judge", "provenance")}
    only["arms"] = {"base": full["arms"]["base"]}
    one = study(tmp_path / "a/run", 4, ["a", "b", "c", "d"], only)
    two = study(tmp_path / "b/run", 2, ["a", "b", "c", "d"])
    found = compare([one, two])
    assert {row["study"] for row in found["rows"]} == {"a/run", "b/run"}
    assert {pair["arm"] for pair in found["pairs"]} == {"base"}


def test_a_folder_without_results_is_named(tmp_path):
    one = study(tmp_path / "one", 1, ["a"])
    with pytest.raises(UserError, match=r"nothing: no results\.json"):
        compare([one, tmp_path / "nothing"])
    with pytest.raises(UserError, match="two finished studies"):
        compare([one])
    with pytest.raises(UserError, match="given twice"):
        compare([one, tmp_path / "one"])
    write_json(tmp_path / "two/results.json", {"schema": 9})
    with pytest.raises(UserError, match="schema 1"):
        compare([one, tmp_path / "two"])
