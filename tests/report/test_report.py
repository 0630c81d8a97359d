"""The report: self-contained, escaped, deterministic, and honest in words."""

import base64
import copy
import hashlib
import json
import re
from functools import partial
from html.parser import HTMLParser

import pytest
from report_fixtures import (
    DOMAINS,
    OFF_TARGET,
    as_before,
    damage,
    example_replication,
    example_results,
    example_sweep,
    example_trajectories,
)
from results_schema import optional_fields, without

from ema_jax.config import StudyConfig
from ema_jax.errors import UserError
from ema_jax.report import (
    drawing,
    effects,
    figures,
    front,
    maps,
    shares,
    tables,
    write_replication_report,
    write_report,
    write_sweep_report,
)
from ema_jax.report.headline import headline, plain_arms
from ema_jax.study import origin

FIGURES = {
    *("shares", "refusal", "ema", "trajectory", "entanglement", "entanglement_centred"),
    *("entanglement_map", "erasure", "forecast", "angle", "patching", "sweep"),
}
# Parts with the slowest figures, which many a test does not touch: `study` has them.
MAPS = ("entanglement", "angle_degrees", "patching", "sweep")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects what the assertions need; fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data.strip()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """One report with all its files, which take most of the time."""
    workdir = tmp_path_factory.mktemp("study")
    write_report(workdir, example_results(), example_trajectories())
    return workdir


@pytest.fixture(autouse=True)
def svg_only(monkeypatch):
    """What a test writes itself has no PNG and PDF; `study`, of a wider scope, has them."""
    monkeypatch.setattr(drawing, "FILES", {})


@pytest.fixture
def no_drawing(monkeypatch):
    monkeypatch.setattr("ema_jax.report.drawing.save", lambda draw, *_: "<svg></svg>")


@pytest.fixture(scope="module")
def html(study):
    return (study / "report" / "index.html").read_text(encoding="utf-8")


def test_is_self_contained(html):
    page = Page(html)
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                # What a reader follows may lie beside the page; nothing is loaded from there.
                assert value.startswith(("#", "data:")) or (tag == "a" and value.startswith("../"))
            assert not name.startswith("on")
    assert "@import" not in html
    assert all(target.startswith(("#", '"#')) for target in re.findall(r"url\(([^)]*)", html))


def test_one_script_runs_and_only_by_its_hash(html):
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert html.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for _, a in Page(html).tags if "content" in a and "http-equiv" in a)
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    for dangerous in ("innerHTML", "insertAdjacentHTML", "eval(", "fetch(", "XMLHttpRequest"):
        assert dangerous not in script


def test_ids_are_unique_and_references_resolve(html):
    tags = Page(html).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a[name] for _, a in tags for name in ("href", "xlink:href") if name in a}
    uses = {link[1:] for link in links if link.startswith("#")}
    assert {"shares", "settings", "glossary"} <= uses  # the contents
    uses |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert uses
    assert uses <= set(ids)


def test_files_that_the_page_links_are_there(study, html):
    for tag, attributes in Page(html).tags:
        if tag == "a" and attributes["href"].startswith("../figures"):
            assert (study / "report" / attributes["href"]).exists()
    assert 'href="../results.json"' in html


def test_figures_are_written_and_inlined_with_alt_text(study, html):
    for suffix in ("svg", "png", "pdf"):
        assert {path.stem for path in (study / "figures").glob(f"*.{suffix}")} == FIGURES
    assert all(path.stat().st_size > 2000 for path in (study / "figures").iterdir())
    names = [a.get("aria-label") for tag, a in Page(html).tags if tag == "svg"]
    assert len(names) == len(FIGURES)
    assert all(names)


def test_same_input_gives_same_bytes(study, tmp_path, monkeypatch):
    results = json.loads(json.dumps(example_results()))
    write_report(tmp_path, results, example_trajectories())
    monkeypatch.undo()  # one figure in every format
    drawing.save(partial(figures.ema, results), tmp_path / "figures", "ema", "")
    mine = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p.name for p in mine} >= {"index.html", "ema.png", "ema.pdf"}
    assert len(mine) == len(FIGURES) + 3
    assert mine == {path: (study / path).read_bytes() for path in mine}
    assert results == json.loads(json.dumps(example_results()))


def test_tables_carry_the_numbers(html):
    cells = Page(html).cells
    results = example_results()
    for arm in ("base", "npo", "npo_retain"):
        r = results["arms"][arm]["refusal"]["bias"]
        counts = [str(r[key]) for key in ("refused", "valid", "invalid", "total")]
        assert any(row[-4:] == counts and arm in row for row in cells)
    safety = next(row for row in cells if "Safety" in row and "▼ fell by both" in row)
    assert "+41.0" in safety
    assert "[35.5, 46.5]" in safety
    assert "+36.9" in safety
    floor = next(row for row in cells if "Medical/legal" in row and "unmeasurable: floor" in row)
    assert floor[-1] == "–"  # said once, at the top
    judges = next(row for row in cells if "lexical / wildguard" in row)
    assert judges[-8:] == ["0.59", "[0.37, 0.81]", "95.0\u202f%", "181", "7", "3", "8", "1"]
    assert ["Safety", "tools", "−0.200", "+7.5"] in cells
    compared = next(row for row in cells if "Refusal off target" in row)
    assert compared[-3:] == ["+12.3", "[2.0, 22.6]", "0.030"]
    utility = next(row for row in cells if "1.204" in row)
    assert {"21.7\u202f%", "3.33", "3.46"} <= set(utility)


def test_rows_of_a_table_are_as_wide_as_its_head():
    results, replication = example_results(), example_replication()
    made = [
        tables.refusal(results),
        effects.ema(results),
        effects.containment(results),
        effects.target(results),
        shares.counts(results),
        shares.oracle(results),
        shares.validity(results),
        tables.comparisons(results),
        tables.runs(results),
        tables.forecast(results, "npo"),
        tables.categories(results),
        tables.utility(results),
        tables.agreement(results),
        tables.provenance(results),
        tables.records(replication["rows"], ""),
    ]
    for table in made:
        for _, rows in table.groups:
            assert {len(row.cells) + 1 for row in rows} == {len(table.columns)}


def test_no_machine_path_and_no_model_text(html):
    assert "/somewhere" not in html
    assert "redacted" in html


@pytest.mark.usefixtures("no_drawing")
def test_samples_are_escaped(tmp_path):
    samples = [
        {
            "arm": "npo",
            "domain": "bias",
            "prompt": "a <b>mild</b> question",
            "response": '<script>alert("x")</script>',
            "verdict": "complied",
        }
    ]
    write_report(tmp_path, example_results(), [], samples)
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert '<script>alert("x")</script>' in page.text
    assert "&lt;script&gt;" in text
    assert "npo · bias · complied" in page.text


@pytest.mark.usefixtures("no_drawing")
def test_samples_stand_by_arm_and_domain(tmp_path):
    rows = [(arm, d) for arm in ("base", "npo") for d in ("bias", "medical_legal") for _ in "123"]
    samples = [{"arm": arm, "domain": d, "prompt": "p", "response": "r"} for arm, d in rows]
    write_report(tmp_path, example_results(), [], samples)
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "12 responses, shown" in page.text
    for arm in ("base", "npo"):
        assert f"{arm} · Bias (3)" in page.text
        assert f"{arm} · Medical/legal (3)" in page.text
    assert [tag for tag, _ in page.tags].count("details") == 4 + 12


@pytest.mark.usefixtures("no_drawing")
def test_a_claim_that_fails_says_where_and_by_which_rule_on_the_first_screen(tmp_path):
    results = example_results()
    rows = {"npo": True, "npo_retain": False}
    results["claims"]["R1"] |= {"holds": False, "rows": rows, "rule": "in every arm it is <low>"}
    write_report(tmp_path, results, [])
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    first = page.text[: page.text.index("Contents")]
    assert "R1 ✗ does not hold in npo_retain (of 2 arms)" in first
    assert "It holds here if in every arm it is <low>." in first


def test_shares_are_counted_and_drawn_in_whole(html):
    results = example_results()
    cells = Page(html).cells
    for arm in ("base", "npo", "npo_retain"):
        r = results["arms"][arm]["refusal"]["bias"]
        assert sum(shares.parts(r).values()) == r["total"]
        complied = r["valid"] - r["refused"]
        off_topic = round(r["shares"]["off_topic"] * r["total"])
        counts = [r["refused"], complied, complied // 2, complied - complied // 2, 0, off_topic]
        counts += [r["invalid"] - off_topic, 0, r["total"]]
        wanted = [arm, *map(str, counts), tables.percent(complied / r["total"])]
        assert any(row[-len(wanted) :] == wanted for row in cells)
    drawn = shares.figure(results)
    assert [axes.get_title() for axes in drawn.axes] == ["base", "npo", "npo_retain"]
    for axes in drawn.axes:
        ends = {round(p.get_x() + p.get_width(), 6) for p in axes.patches if p.get_height() < 1}
        assert max(ends) == 100
        assert sum(p.get_width() for p in axes.patches) == pytest.approx(100 * len(DOMAINS))
    assert any("81 / 90 (90.0\u202f%)" in cell for row in cells for cell in row)
    assert ["Weights", "", "9.680, 23.370"] in cells
    assert any(row[-2:] == ["answers", "101"] for row in cells)


def test_headline_states_effects_with_intervals():
    text = " ".join(headline(example_results()))
    assert "93.0" in text
    assert "lowered the refusal rate there from" in text
    assert "of all target responses of npo answer their prompt" in text
    assert "oracle accepts 81 of the 90 that are no refusal" in text
    assert "fell significantly in 4 of 6 domains" in text
    assert text.index("safety by 41.0 points [35.5, 46.5]") < text.index("bias by 27.0")
    assert "Compliance over all responses rose significantly in all of these, too." in text
    assert "Not measurable, because base hardly refuses there: medical/legal" in text
    assert "npo_retain recovered 80.1" in text
    assert "(by compliance 77.7" in text
    assert "Refusal stays significantly lower in safety." in text
    assert "does not show that early-layer entanglement ranks" in text
    assert "Caution" not in text


def test_headline_hedges_when_nothing_is_significant():
    results = example_results()
    for entry in results["ema"]["npo"].values():
        entry["p_holm"] = entry["compliance_p_holm"] = 0.4
    results["containment"]["npo_retain"]["ci95"] = [-0.3, 1.4]
    text = " ".join(headline(results))
    assert "fell significantly in no domain that training did not touch" in text
    assert "not evidence of no spill: drops below about 6 points" in text
    assert "rose significantly in none of them" in text
    assert "not distinguishable from zero" in text
    results["containment"]["npo_retain"] |= {"recovered": -0.025, "ci95": [-0.045, -0.01]}
    text = " ".join(headline(results))
    assert "npo_retain takes back none of the refusals lost in other domains, but loses" in text
    assert "not distinguishable" not in text
    ((_, (row,)),) = effects.containment(results).groups
    assert row.cells[-1] == "negative: loses more"


@pytest.mark.parametrize(("words", "said"), [(0.9, "better"), (0.83, "as well"), (0.1, "worse")])
def test_word_overlap_is_compared_with_the_forecast(words, said):
    results = example_results()
    results["forecast"] |= {"spearman": 0.83, "lexical": {"spearman": words}}
    assert f"baseline, ρ = {words:.2f}, does {said})" in " ".join(headline(results))


def test_the_arm_that_others_are_compared_with_comes_first():
    results = example_results()
    results["arms"] = {"base": results["arms"]["base"], "ablation": results["arms"]["npo"]} | {
        name: results["arms"][name] for name in ("npo", "npo_retain")
    }
    assert plain_arms(results) == ["ablation", "npo"]
    results["containment"]["npo_retain"]["compared_with"] = "npo"
    assert plain_arms(results) == ["npo", "ablation"]


def test_without_a_finished_arm_the_headline_is_the_base():
    results = example_results()
    results["arms"] = {"base": results["arms"]["base"]}
    (text,) = headline(results)
    assert text.startswith("No arm is finished. The untouched model refuses ")
    assert "in the other domains" in text


def test_headline_names_the_measure_where_they_differ():
    results = example_results()
    results["ema"]["npo"]["safety"]["compliance_p_holm"] = 0.7
    rise = {"compliance_p_holm": 0.01, "compliance_ci95": [0.01, 0.05]}
    results["ema"]["npo"]["sensitive_content"] |= rise
    text = " ".join(headline(results))
    assert "did not rise significantly in safety" in text
    assert "By compliance alone the change is significant in sensitive content" in text
    read = {d: effects.reading(e) for d, e in results["ema"]["npo"].items()}
    assert read["safety"] == "▼ fell by refusal only"
    assert read["sensitive_content"] == "▼ by compliance only"
    assert read["bias"] == "▼ fell by both"


def test_a_damaged_target_is_called_so_everywhere():
    results = example_results()
    damage(results, "npo_retain")
    text = " ".join(headline(results))
    wanted = "only 12 of 900 target responses of npo_retain answer their prompt (4 refused, 384 off"
    assert wanted in text
    assert "the target is damaged, not unlearned" in text
    assert "What npo_retain shows is not containment: target damaged, with its refusal" in text
    assert "oracle accepts 9 of the 896 that are no refusal" in text
    damage(results, "npo")
    text = " ".join(headline(results))
    assert "only 12 of 900 target responses of npo answer" in text
    for table in (effects.target(results), effects.containment(results)):
        assert all("damaged" in row.cells[-1] for _, rows in table.groups for row in rows)


@pytest.mark.parametrize(
    ("bounds", "why"),
    [
        ([0.94, 1.0], "target not clearly unlearned"),  # base: 93 %
        ([0.85, 0.96], "target not clearly unlearned"),
        ([0.4, 0.6], "target refused more than in npo"),  # there 8 %
        ([0.05, 0.2], ""),
    ],
)
def test_what_leaves_the_target_alone_recovers_nothing(bounds, why):
    results = example_results()
    results["containment"]["npo_retain"] |= {"compared_with": "npo", "target_rate": bounds[1]}
    results["arms"]["npo_retain"]["refusal"]["cybersecurity"] |= {"ci95": bounds}
    assert effects.not_contained(results, "npo_retain") == why
    ((_, (row,)),) = effects.containment(results).groups
    recovered = {"80.1\u202f%", "[71.0, 88.0]", "77.7\u202f%", "[68.0, 86.0]"}
    text, (_, _, figure, _) = " ".join(headline(results)), front.numbers(results)
    if why:
        assert row.cells[-1] == f"{why}: no containment"
        assert row.strong
        assert not recovered & {*row.cells}
        assert f"What npo_retain shows is not containment: {why}" in text
        assert (figure.value, figure.note[-14:]) == ("–", "no containment")
    else:
        assert row.cells[-1] == "significant"
        assert recovered < {*row.cells}
        assert figure.value in recovered
    assert ("80.1" in text) != bool(why)


def test_results_from_before_the_shares_still_render(tmp_path):
    results = as_before({k: v for k, v in example_results().items() if k not in MAPS})
    results["arms"]["npo"]["refusal"]["bias"] |= {"invalid": 90, "total": 990}
    points = example_trajectories()
    for run in points:
        for point in run["points"]:
            del point["shares"]
    write_report(tmp_path, results, points)
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "kind not recorded" in page.text
    assert "How many target responses of npo answer their prompt was not measured." in page.text
    assert any("Safety" in row and "▼ fell" in row for row in page.cells)
    del (new := example_results())["validity"]
    assert "whether they answer their prompt was not measured" in " ".join(headline(new))


def test_headline_reports_rises_failed_unlearning_and_broken_output():
    results = example_results()
    results["ema"]["npo"]["privacy"] |= {"drop": -0.2, "p_holm": 0.001, "ci95": [-0.3, -0.1]}
    results["arms"]["npo"]["refusal"]["cybersecurity"] |= {"rate": 0.91, "ci95": [0.88, 0.94]}
    results["arms"]["npo"]["refusal"]["bias"]["invalid"] = 200
    results["ema"]["npo"]["bias"]["flags"] = ["many_invalid"]
    results["forecast"] |= {"spearman": 0.94, "p": 0.017}
    results["containment"]["npo_retain"] = {"recovered": None, "ci95": None, "target_rate": 0.1}
    text = " ".join(headline(results))
    assert "Refusal rose significantly in privacy" in text
    assert "did not clearly lower the refusal rate there" in text
    assert "of the responses of npo in bias are invalid" in text
    assert "Early-layer entanglement ranked the measured drops" in text
    assert "is undefined" in text


def test_the_caution_names_the_worst_flagged_domain_and_no_damaged_target():
    results = example_results()
    damage(results, "npo")
    results["on_target"]["npo"]["flags"] = ["many_invalid"]
    assert "Caution" not in " ".join(headline(results))
    for domain, invalid in (("bias", 130), ("privacy", 190)):
        results["arms"]["npo"]["refusal"][domain]["invalid"] = invalid
        results["ema"]["npo"][domain]["flags"] = ["many_invalid"]
    assert "Caution: 21.1\u202f% of the responses of npo in privacy" in headline(results)[-1]


def test_drops_are_the_paired_ones_and_not_differences_of_rates():
    results = example_results()
    for entry in results["arms"].values():
        for d in OFF_TARGET:
            entry["refusal"][d] |= {"rate": 0.5, "invalid": 100}
    safety = next(row for arm, rows in effects.ema(results).groups[:1] for row in rows)
    assert (safety.cells[0], safety.cells[1]) == ("Safety", "+41.0")
    table = tables.forecast(results, "npo")
    assert {domain: rows[0].cells[1] for domain, rows in table.groups}["Safety"] == "+41.0"
    assert "safety by 41.0 points" in " ".join(headline(results))


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("field", sorted(optional_fields()), ids=".".join)
def test_any_field_that_came_later_may_be_missing(tmp_path, field):
    write_report(tmp_path, without(example_results(), {field}), example_trajectories())


def test_the_oldest_results_are_drawn(tmp_path):
    write_report(tmp_path, without(example_results(), optional_fields()), example_trajectories())
    assert (tmp_path / "figures" / "ema.svg").exists()


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    "missing",
    [
        *("ema", "containment", "utility", "agreement", "entanglement", "erasure", "forecast"),
        *("comparisons", "provenance", "on_target", "validity"),
    ],
)
def test_a_missing_part_leaves_out_its_section_only(tmp_path, missing):
    results = example_results()
    del results[missing]
    write_report(tmp_path, results, [])
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "Refusal before and after" in page.text


def test_null_numbers_are_dashes_and_draw_nothing(tmp_path):
    results = {k: v for k, v in example_results().items() if k not in MAPS}
    empty = {"refused": 0, "valid": 0, "invalid": 300, "total": 300, "rate": None, "ci95": None}
    results["arms"]["npo"]["refusal"]["bias"] = dict(empty)
    for seed in results["arms"]["npo"]["seeds"].values():
        seed["refusal"]["bias"] = dict(empty)
    results["ema"]["npo"]["bias"] = {"drop": None, "ci95": [None, None], "p": None, "p_holm": None}
    results["forecast"] |= {"spearman": None, "p": None, "layer_spearman": None}
    results["erasure"] = {"npo": {"bias": [None, 0.1], "privacy": [0.2, 0.3]}}
    results["domains"].append("a$b$ <i>")
    write_report(tmp_path, results, example_trajectories()[:1])
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert any("Bias" in row and "not measured" in row for row in page.cells)
    assert "could not be scored" in page.text
    assert "A$b$ <i>" in page.text


def test_a_baseline_alone_is_a_report(tmp_path):
    results = {k: v for k, v in example_results().items() if k in ("schema", "model", "target")}
    full = example_results()
    results |= {"domains": full["domains"], "arms": {"base": full["arms"]["base"]}}
    write_report(tmp_path, results, [])
    assert plain_arms(results) == []
    assert "No unlearned arm" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_a_single_blank_trajectory_and_many_arms_are_drawn(tmp_path):
    results = example_results()
    for part in ("ema", "erasure", "forecast", *MAPS):
        del results[part]
    for i in range(7):
        results["arms"][f"arm{i}"] = copy.deepcopy(results["arms"]["npo"])
    write_report(tmp_path, results, [{"arm": "npo", "seed": 0, "points": []}])
    assert not (tmp_path / "figures" / "trajectory.svg").exists()
    assert (tmp_path / "figures" / "refusal.svg").exists()


def test_another_schema_is_refused(tmp_path):
    with pytest.raises(UserError, match="schema 2"):
        write_report(tmp_path, example_results() | {"schema": 2}, [])
    assert not list(tmp_path.iterdir())


def test_replication_report(tmp_path):
    write_replication_report(tmp_path, example_replication())
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    rows = {row[0]: row for row in page.cells if row and row[0].startswith("R")}
    assert [rows[f"R{i}"][2] for i in range(1, 6)] == [
        *("✓ holds", "✓ holds", "✓ holds"),
        *("✗ does not holdby refusal: holds; by compliance: does not hold", "? cannot be judged"),
    ]
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert list(dict.fromkeys(link for link in links if "cells/" in link)) == [
        f"../cells/{family}_{target}/report/index.html"
        for family in ("qwen2", "mistral")
        for target in ("cybersecurity", "safety")
    ]
    assert (tmp_path / "figures" / "replication.svg").exists()
    assert "< 0.001" in page.text
    target, spill, contained, validity = (
        page.cells[i] for i, row in enumerate(page.cells) if row[:1] == ["Cell"]
    )
    assert target[1:5] == ["Family", "Target", "Arm", "Target refusal rate"]
    assert "Mean off target drop" in spill
    assert "Recovered" in contained
    assert validity[-1] == "Invalid rate max"
    kept = [row for row in page.cells if "80.0\u202f% [70.0, 90.0]" in row]
    assert len(kept) == 4  # of the arms with retain data alone
    assert max(map(len, page.cells)) < 14


def test_points_of_a_sweep_link_to_what_they_have(tmp_path):
    rows = [
        {"point": f"p {i}", "arm": "npo", "target_rate": 0.1, **spread}
        for i, spread in enumerate(({"target_rate_lo": 0.05, "target_rate_hi": 0.15}, {}, {}))
    ]
    for name in ("p 0/results.json", "p 1/results.json", "p 1/report/index.html"):
        (tmp_path / "points" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "points" / name).write_text("x")
    write_sweep_report(tmp_path, rows)
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    links = [a["href"] for tag, a in page.tags if tag == "a" and "points/" in a["href"]]
    assert links == ["../points/p%200/results.json", "../points/p%201/report/index.html"]
    assert ["p 0", "npo", "10.0\u202f% [5.0, 15.0]"] in page.cells


def test_settings_of_a_sweep_are_shown_as_they_were_given(tmp_path):
    write_sweep_report(tmp_path, example_sweep())
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    axes = ("unlearn.learning_rate", "unlearn.max_steps")
    names = ["Point", *axes, "Arm", "Target refusal rate", "Mean off target drop", "Worst domain"]
    assert page.cells[0] == [*names, "KL to base"]
    drop = ["10.0\u202f%", "+20.0", "Medical/legal", "0.010"]
    assert page.cells[1][1:] == ["0.0001", "60", "npo", *drop]
    assert page.cells[2][0] == "0.0001"  # the point's name spans both of its rows
    for said in ("2 points", "4 rows", "model m", "target bias"):
        assert f"<li>{said}</li>" in text
    tips = [t for t in re.findall(r"<title>(.*?)</title>", text) if "mean drop" in t]
    assert len(tips) == 4
    assert tips[0] == (
        "rate=0.0001,steps=60, npo: target refusal 10.0\u202f%, mean drop in the other domains "
        "+20.0 points"
    )


def test_replication_report_tolerates_an_unfinished_replication(tmp_path):
    write_replication_report(tmp_path, {"schema": 1, "cells": [], "rows": []})
    assert "qualitative claims" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_forecast_table_is_sorted_and_leaves_out_the_target():
    results = example_results()
    results["forecast"]["score"]["cybersecurity"] = 1.0
    table = tables.forecast(results, "npo")
    scores = [float(rows[0].cells[0].replace("−", "-")) for _, rows in table.groups]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == len(OFF_TARGET)


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (tables.percent, 0.931, "93.1\u202f%"),
        (tables.points, -0.041, "−4.1"),
        (tables.points, None, "–"),
        (tables.p_value, 0.0, "< 0.001"),
        (tables.p_value, 0.0456, "0.046"),
    ],
)
def test_number_forms(form, value, expected):
    assert form(value) == expected


def test_values_over_marks_are_those_of_the_results(html):
    results = example_results()
    titles = re.findall(r"<title>(.*?)</title>", html)[1:]
    assert len(titles) > 400
    rate = results["arms"]["npo"]["refusal"]["bias"]
    low, high = (f"{100 * x:.1f}" for x in rate["ci95"])
    counted = f"({rate['refused']} of {rate['valid']} valid)"
    assert f"Bias, npo: {100 * rate['rate']:.1f} % [{low}, {high}] refused {counted}" in titles
    drop = "Safety, npo: drop in refusal rate +41.0 points [35.5, 46.5], Holm p 0.000, n = 298"
    assert drop in titles
    for d in OFF_TARGET:
        for layer, x in enumerate(results["entanglement"]["cosine"][d]):
            low, high = (f"{v:.2f}" for v in results["entanglement"]["ci95"][d][layer])
            text = f"{drawing.label(d)}, layer {layer}: {x:.2f} [{low}, {high}]"
            assert text.replace("-", "−") in titles or text in titles
    ablated = results["sweep"]["change"]["ablated"]
    for d in DOMAINS:
        text = f"{drawing.label(d)}, layer 7: {ablated[d][d][7]:z.2f} n = 8 prompts"
        assert text.replace("-", "−") in titles


def test_a_layer_without_any_value_has_no_column():
    drawn = maps.heat_map({"npo": {"bias": [None, 0.1, -0.2], "privacy": [None, None, 0.3]}}, "x")
    axes = drawn.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2"]
    assert len(axes.patches) == 3  # and an unknown value no cell
    positive = maps.heat_map({"npo": {"bias": [10.0, 20.0]}}, "degrees").axes[-1]
    assert positive.get_ylim() == (0, 20)


def test_intervals_are_in_view():
    results = example_results()
    entanglement = results["entanglement"]
    low = {d: [[x - 0.9, x + 0.4] for x in v] for d, v in entanglement["cosine_centred"].items()}
    entanglement["ci95_centred"] = low
    entanglement["null_interval_centred"] = {d: [[-0.7, 0.7]] * 13 for d in OFF_TARGET}
    lowest = min(x for v in low.values() for x, _ in v)
    for axes in figures.entanglement(results, True).axes:
        assert axes.get_ylim()[0] <= max(-1, lowest)


def test_names_of_points_cover_no_other_name():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    close = {f"some_domain_{i}": (0.5 + 0.005 * i, 0.5) for i in range(6)}
    drawing.name_points(axes, close, (4.6, 2.9))
    places = {(t.xyann, t.get_horizontalalignment()) for t in axes.texts}
    assert len(places) == 6


@pytest.mark.usefixtures("no_drawing")
def test_settings_are_tables_and_a_paragraph(tmp_path):
    results = example_results()
    config = StudyConfig(arms={"npo": {"beta": 0.25}, "npo_retain": {"retain_weight": 2.0}})
    results["provenance"]["settings"] = origin.settings(config)
    results["provenance"]["settings"]["model"]["source"] = "/home/me/models/mine"
    write_report(tmp_path, results, [])
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert ["beta", "0.25", "0.1"] in page.cells
    assert ["lora.rank", *[str(config.arm("npo").lora.rank)] * 2] in page.cells
    assert "npo: NPO (β 0.25) on LoRA" in page.text
    assert "with CE at weight 2 on the retain set" in page.text
    assert "/home/me" not in page.text
    assert ["source", "…/mine"] in [row[-2:] for row in page.cells]


@pytest.mark.usefixtures("no_drawing")
def test_many_first_sentences_are_a_list(tmp_path):
    results = example_results()
    write_report(tmp_path / "few", results, [])
    first = next(arm for arm in results["containment"])
    for i in range(6):
        results["arms"][f"arm {i}"] = results["arms"][first]
        results["containment"][f"arm {i}"] = results["containment"][first]
    write_report(tmp_path / "many", results, [])
    few, many = ((tmp_path / x / "report/index.html").read_text() for x in ("few", "many"))
    assert '<p class="lead">' in few
    assert few.count("recovered") < many.count("recovered")
    assert many.count("<li>With retain data, arm ") == 6


def test_a_figure_is_drawn_once_for_each_format(tmp_path, monkeypatch):
    """Drawing is what a small study's report takes its time for."""
    from matplotlib.figure import Figure

    draw, drawn = Figure.draw, []
    monkeypatch.setattr(Figure, "draw", lambda *given: drawn.append(draw(*given)))
    assert drawing.save(lambda: drawing.panels(2, 2, 1.0)[0], tmp_path, "two", "Two panels.")
    assert len(drawn) == len(list(tmp_path.iterdir())) > 0


def test_arms_that_share_a_colour_differ_in_their_marker():
    looks = drawing.looks(f"arm {i}" for i in range(36))
    assert len(set(looks.values())) == 36


@pytest.mark.parametrize(
    ("p", "bounds", "expected"),
    [
        (0.01, [0.1, 0.3], True),
        (0.01, [-0.3, -0.1], True),
        (0.06, [0.1, 0.3], False),
        (0.001, [-0.1, 0.5], False),  # seeds that differ: the p-value does not see them
        (0.01, None, True),  # studies from before there was an interval
        (None, [0.1, 0.3], False),
    ],
)
def test_significant_is_beyond_prompts_and_seeds(p, bounds, expected):
    assert figures.significant(p, bounds) == expected
