"""The label sheet: drawn blind, safe in a spreadsheet, read back; and rates corrected by it."""

import csv
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from ema_jax.errors import UserError
from ema_jax.refusal import rogan_gladen, sheet
from ema_jax.refusal.corrected import Errors, corrected_drop, corrected_share, judge_errors
from ema_jax.report.labels import corrected, errors
from ema_jax.runtime.files import read_json, sha256_text, write_json, write_jsonl

DOMAINS = ("bias", "privacy", "benign")
TRAPS = (
    '=HYPERLINK("http://x")',
    "+1",
    "-2",
    " @a",
    "\tb",
    'a\r\nb, "c"',
    "é ü 你好",
    "",
)
VERDICTS = (
    ("refused", "rule"), ("complied", ""), ("invalid", "off_topic"), ("invalid", "repetition"),
    ("invalid", "judge_declined"),
)  # fmt: skip


def write_study(folder, *, text=True, prompts=60):
    rng = np.random.default_rng(0)
    for run in ("base", "npo.seed_0", "npo.seed_1"):
        rows = []
        for i in range(prompts * len(DOMAINS)):
            verdict, reason = VERDICTS[rng.choice(5, p=[0.5, 0.3, 0.1, 0.05, 0.05])]
            response = TRAPS[i] if i < len(TRAPS) else f"answer {i} of {run}"
            row = {"id": f"p{i}", "domain": DOMAINS[i % 3], "verdict": verdict, "reason": reason}
            row["response_sha256"] = sha256_text(response.encode("utf-8", "replace").decode())
            if text:
                row |= {"prompt": f"Please explain {i}.", "response": response}
            rows.append(row)
        (folder / "responses").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"responses/{run}.jsonl").write_text(lines, encoding="utf-8")
    return folder


RUNS = {"base": ["base"], "npo": ["npo.seed_0", "npo.seed_1"]}


def read(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(folder, label_of, **how):
    rows = read(folder / sheet.SHEET)
    key = read_json(folder / sheet.KEY)
    for row in rows:
        row["label"] = label_of(key[row["id"]])
    with open(folder / sheet.SHEET, "w", newline="", encoding=how.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, list(rows[0]), **how)
        writer.writeheader()
        writer.writerows(rows)


def said(folder):
    found = {}
    for run in itertools.chain(*RUNS.values()):
        for line in (folder / f"responses/{run}.jsonl").read_text().splitlines():
            row = json.loads(line)
            found[run, row["id"]] = sheet.share(row["verdict"], row["reason"])
    return found


def test_a_sheet_is_blind_stratified_and_harmless_to_a_spreadsheet(tmp_path):
    write_study(tmp_path)
    path = sheet.write_sheet(tmp_path, 150)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    rows, key, verdicts = read(path), read_json(tmp_path / sheet.KEY), said(tmp_path)
    assert tuple(rows[0]) == sheet.COLUMNS
    assert 149 <= len(rows) <= 151
    assert {row["label"] for row in rows} == {""}
    assert "refused" not in (tmp_path / sheet.KEY).read_text()
    for row in rows:
        for cell in row.values():
            assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t")), cell
    assert [row["arm"] for row in rows] != sorted(row["arm"] for row in rows)
    drawn = [verdicts[k["run"], k["prompt"]] for k in key.values()]
    assert {*drawn} == {"refused", "complied", "off_topic", "degenerate"}
    assert drawn != sorted(drawn)
    # Weights add up to all judged responses, about.
    total = sum(1 / k["probability"] for k in key.values())
    assert total == pytest.approx(sum(v != "unjudged" for v in verdicts.values()), rel=0.1)
    with pytest.raises(UserError, match="may hold labels"):
        sheet.write_sheet(tmp_path, 150)


def test_everything_is_drawn_where_there_is_less(tmp_path):
    write_study(tmp_path, prompts=4)
    sheet.write_sheet(tmp_path, 1000)
    key = read_json(tmp_path / sheet.KEY)
    assert len(key) == sum(v != "unjudged" for v in said(tmp_path).values())
    assert {k["probability"] for k in key.values()} == {1.0}


def test_text_is_needed(tmp_path):
    with pytest.raises(UserError, match="no responses"):
        sheet.write_sheet(tmp_path, 10)
    write_study(tmp_path, text=False)
    with pytest.raises(UserError, match=r"keep_text=True"):
        sheet.write_sheet(tmp_path, 10)


@pytest.mark.parametrize(
    "how",
    [{}, {"delimiter": ";"}, {"delimiter": "\t", "encoding": "utf-16"}, {"encoding": "utf-8-sig"}],
)
def test_what_spreadsheets_save_is_read(tmp_path, how):
    write_study(tmp_path)
    sheet.write_sheet(tmp_path, 80)
    verdicts = said(tmp_path)
    fill(tmp_path, lambda k: verdicts[k["run"], k["prompt"]].replace("_", "-").upper(), **how)
    made = sheet.label_results(tmp_path, RUNS)
    assert made["labels"]["accuracy"]["value"] == 1.0
    assert made["labels"]["kappa"] == pytest.approx(1.0)
    assert made["labels"]["labelled"] == len(read_json(tmp_path / sheet.KEY))
    cell = made["corrected"]["npo"]["bias"]
    assert cell["share"] == pytest.approx(cell["apparent"])
    assert cell["ci95"][0] < cell["share"] < cell["ci95"][1]
    assert cell["drop_ci95"][0] < cell["drop"] < cell["drop_ci95"][1]
    assert "drop" not in made["corrected"]["base"]["bias"]


def test_variants_of_a_prompt_are_one_observation(tmp_path):
    write_study(tmp_path)
    sheet.write_sheet(tmp_path, 80)
    verdicts = said(tmp_path)
    fill(tmp_path, lambda k: verdicts[k["run"], k["prompt"]])
    alone = sheet.label_results(tmp_path, RUNS)["corrected"]["npo"]["bias"]
    for run in itertools.chain(*RUNS.values()):
        path = tmp_path / f"responses/{run}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # Of a domain's sixty prompts every four are variants of one.
        write_jsonl(path, [row | {"group": int(row["id"][1:]) // 12} for row in rows])
    found = sheet.label_results(tmp_path, RUNS)["corrected"]["npo"]["bias"]
    assert found["share"] == alone["share"]
    assert np.diff(found["ci95"]) == pytest.approx(2 * np.diff(alone["ci95"]), rel=0.2)


def test_a_code_page_of_eight_bits_is_read(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(b"id;response;label\r\nr1;caf\xe9;refused\r\nr2;x;\r\n\r\n")
    assert sheet.read_sheet(path) == {"r1": "refused"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('id,label\nr1,refused\n"r2\n",maybe\n', r"csv:4: label 'maybe' is none of refused, compl"),
        ("id,label\nr1,refused\nr1,complied\n", "csv:3: id r1 stands twice"),
        ("id,label\n,complied\n", "csv:2: no id"),
        ("name,label\n", "csv:1: no columns id and label"),
        ("", "csv:1: no columns"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        sheet.read_sheet(path)


def test_a_sheet_of_other_responses_is_not_taken(tmp_path):
    write_study(tmp_path)
    assert sheet.label_results(tmp_path, RUNS) == {}
    sheet.write_sheet(tmp_path, 40)
    assert sheet.label_results(tmp_path, RUNS) == {}  # nothing filled in yet
    before = sheet.settings(tmp_path)
    fill(tmp_path, lambda k: "complied")
    assert sheet.settings(tmp_path) != before
    filled, key = sheet.settings(tmp_path), read_json(tmp_path / sheet.KEY)
    write_json(tmp_path / sheet.KEY, {name: k | {"probability": 0.5} for name, k in key.items()})
    assert sheet.settings(tmp_path) != filled  # other weights, so other figures
    write_json(tmp_path / sheet.KEY, key)
    made = sheet.label_results(tmp_path, {"base": ["base"]})  # an arm that the config names no more
    assert made["labels"]["by_arm"].keys() == {"base"}
    responses = tmp_path / "responses/base.jsonl"
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    write_jsonl(responses, [row | {"response_sha256": "0", "response": ""} for row in rows])
    with pytest.raises(UserError, match=r"no longer that of responses/base\.jsonl"):
        sheet.label_results(tmp_path, RUNS)


def test_errors_without_weights_are_the_plain_ones():
    pairs = [("refused", "refused")] * 30 + [("refused", "complied")] * 10
    pairs += [("complied", "complied")] * 50 + [("complied", "refused")] * 5
    pairs += [("degenerate", "off_topic")] * 5
    found = judge_errors([(*pair, 3.0) for pair in pairs], 0.4)
    assert found["accuracy"]["value"] == pytest.approx(0.8)
    assert found["sensitivity"]["value"] == pytest.approx(30 / 35)
    assert found["specificity"]["value"] == pytest.approx(55 / 65)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))
    assert found["confusion"]["refused"]["complied"]["n"] == 10
    assert found["confusion"]["refused"]["complied"]["share"] == pytest.approx(0.25)
    known = Errors.of([(*pair, 1.0) for pair in pairs], 0.4)
    share = corrected_share(40, 100, known)
    assert share["share"] == pytest.approx(0.35)  # 35 of 100 labels, and the sample is the whole
    drop = corrected_drop((40, 100), (40, 100), known)
    assert drop["drop"] == 0
    assert drop["ci95"][0] < 0 < drop["ci95"][1]


def test_a_judge_that_knows_nothing_corrects_nothing():
    labelled = [(j, y, 1.0) for j in ("refused", "complied") for y in ("refused", "complied")] * 5
    found = corrected_share(10, 40, Errors.of(labelled, 0.5))
    assert (found["share"], found["ci95"]) == (None, [0.0, 1.0])
    for judged in (0.0, 1.0):  # it said one thing only
        said = "refused" if judged else "complied"
        one = [(said, "refused", 1.0)] * 10 + [(said, "complied", 1.0)] * 5
        json.dumps(judge_errors(one, judged), allow_nan=False)
        assert corrected_share(15 * judged, 15, Errors.of(one, judged))["share"] is None


def test_the_report_shows_them(tmp_path):
    write_study(tmp_path)
    sheet.write_sheet(tmp_path, 60)
    fill(tmp_path, lambda k: "refused" if hash_of(k) % 3 else "complied")
    made = sheet.label_results(tmp_path, RUNS)
    first = errors(made)
    assert {name for name, _ in first.groups} >= {"All responses", "By arm", "Judged refused"}
    assert all(len(row.cells) == 3 for _, rows in first.groups for row in rows)
    second = corrected(made)
    assert [name for name, _ in second.groups] == ["base", "npo"]
    assert second.groups[0][1][0].cells[-2:] == ("–", "–")


def test_a_domain_that_the_judge_failed_on_in_the_base_has_no_drop(tmp_path):
    write_study(tmp_path)
    path = tmp_path / "responses/base.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    unjudged = {"verdict": "invalid", "reason": "judge_declined"}
    write_jsonl(path, [row | (unjudged if row["domain"] == "bias" else {}) for row in rows])
    sheet.write_sheet(tmp_path, 60)
    verdicts = said(tmp_path)
    fill(tmp_path, lambda k: verdicts[k["run"], k["prompt"]])
    made = sheet.label_results(tmp_path, RUNS)["corrected"]
    assert made["base"].keys() == {"privacy", "benign"}
    assert (made["npo"]["bias"]["drop"], made["npo"]["bias"]["drop_ci95"]) == (None, [-1.0, 1.0])
    assert made["npo"]["bias"]["apparent"] is not None
    drops = {row.cells[0]: row.cells[-2] for row in corrected({"corrected": made}).groups[1][1]}
    assert [name for name, drop in drops.items() if drop == "–"] == ["Bias"]


def hash_of(key):
    return int(key["response_sha256"][:6], 16)


def test_the_command(tmp_path):
    write_study(tmp_path)

    def run(*flags):
        command = [sys.executable, "-m", "ema_jax.judge", *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = run("--sample=30", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "fill in the column label (refused, complied, off_topic, degenerate)" in done.stderr
    assert (tmp_path / "labels.csv").exists()
    again = run("--sample=30", f"--workdir={tmp_path}")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "--workdir is required" in run("--sample=30").stderr


JUDGES = [(0.8, 0.98), (0.9, 0.9), (0.98, 0.8), (0.95, 0.95)]
PREVALENCES = (0.05, 0.2, 0.5, 0.9)
STUDIES = {"mixed": PREVALENCES} | {f"all {p}": (p,) * 4 for p in PREVALENCES}
TRIALS = 500


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(("labels", "prompts"), itertools.product((60, 100, 200), (100, 700)))
def test_corrected_intervals_cover_the_truth(study, judge, labels, prompts, monkeypatch):
    """Every domain's share of a study of four, the labels a sheet of that study's responses."""
    monkeypatch.setattr(rogan_gladen, "DRAWS", 1000)
    covered = coverage(STUDIES[study], judge, labels, prompts)
    if study != "mixed":
        covered = covered.mean()  # four domains alike: one figure
    # 93 to 97 %, but for twice the standard error of so many studies (1.0 points).
    error = 2 * np.sqrt(0.95 * 0.05 / TRIALS)
    assert np.all((covered >= 0.93 - error) & (covered <= 0.97 + error)), covered


def coverage(prevalences, judge, labels, prompts):
    """Share of simulated studies whose interval holds the prevalence, `[4]` by domain.

    Responses of one domain and verdict are alike, so that their numbers are all that is drawn.
    """
    rng, covered = np.random.default_rng(0), np.zeros(len(prevalences))
    truth = np.array(prevalences)
    sensitivity, specificity = judge
    apparent = truth * sensitivity + (1 - truth) * (1 - specificity)
    refused = np.stack([truth * (1 - sensitivity) / (1 - apparent), truth * sensitivity / apparent])
    for _ in range(TRIALS):
        said = rng.binomial(prompts, apparent)
        triples = sheet_of(rng, np.stack([prompts - said, said]), refused, labels)
        known = Errors.of(triples, said.sum() / prompts / len(said))
        for d, count in enumerate(said):
            found = corrected_share(count, prompts, known, seed=int(rng.integers(1e9)))
            covered[d] += found["ci95"][0] <= truth[d] <= found["ci95"][1]
    return covered / TRIALS


def sheet_of(rng, sizes, refused, labels):
    """Labels as `sheet._draw` would choose them, from strata by verdict and domain, `[2, 4]`."""
    names, triples = ("complied", "refused"), []
    probability = np.zeros(sizes.shape)
    probability[sizes > 0] = sheet._probabilities(sizes[sizes > 0], labels)
    # In the order of its strata: domain by domain.
    reached = np.floor(np.round(np.cumsum((sizes * probability).T) + rng.random(), 9))
    drawn = np.diff(reached, prepend=0.0).astype(int).reshape(-1, 2).T
    for (j, d), n in np.ndenumerate(drawn):
        for label in rng.random(n) < refused[j, d]:
            triples.append((names[j], names[int(label)], 1 / probability[j, d]))
    return triples
