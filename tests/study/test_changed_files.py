"""Files of a finished study that were changed since, and records that are not its own."""

import json
import os
import shutil
from pathlib import Path

import pytest
from finished_study import contents, sketch

from ema_jax.errors import UserError
from ema_jax.generation.journal import Journal
from ema_jax.study import manifest as manifest_lib
from ema_jax.sweep.worker import StudyGrid

RUN = "npo.seed_0"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "study"
    sketch(folder)
    return folder


@pytest.fixture
def study(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "study")  # with its times
    return tmp_path / "study"


def rewrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


CHANGES = {
    "rows gone": lambda p: rewrite(p, p.read_bytes()[:-3]),
    "emptied": lambda p: rewrite(p, b""),
    "other bytes, same size": lambda p: rewrite(p, b"x" * p.stat().st_size),
    "one bit": lambda p: rewrite(p, bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
    "rows added": lambda p: rewrite(p, p.read_bytes() + b"\n"),
    "no UTF-8": lambda p: rewrite(p, b"\xff\xfe\x00"),
    "other bytes, earlier": lambda p: (rewrite(p, b"y" * p.stat().st_size), os.utime(p, (1, 1))),
    "another file": lambda p: shutil.copy2(p.parent / "report", p),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "a link to another": lambda p: (p.unlink(), p.symlink_to(p.parent / "report")),
    "nulls": lambda p: rewrite(p, b"\0" * p.stat().st_size),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stage", ["prompts", "baseline", "forecast", f"evaluate.{RUN}"])
def test_a_changed_file_is_named_with_its_stage(study, change, stage):
    CHANGES[change](study / "out" / stage)
    before = contents(study)
    with pytest.raises(UserError) as raised:
        sketch(study)
    said = str(raised.value)
    assert f"out/{stage}: " in said
    assert "\n" not in said
    if change != "a folder":
        assert f"after the stage {stage.replace('.', '/')} wrote it" in said
        assert "delete it and run that stage again" in said
    assert contents(study) == before


def test_what_a_wanted_stage_reads_is_looked_at_too(study):
    rewrite(study / "out/baseline", b"five rows fewer")
    with pytest.raises(UserError, match="out/baseline: was changed after the stage baseline"):
        sketch(study, only=["analyse", "report"])


def test_deleted_as_it_is_told_the_stage_runs_again(study):
    rewrite(study / "out/baseline", b"five rows fewer")
    (study / "out/baseline").unlink()
    assert sketch(study) == ["baseline"]
    assert sketch(study) == []


def test_a_stage_that_dies_while_it_makes_a_file_again_is_not_taken_for_a_change(study):
    (study / "out/baseline").unlink()
    with pytest.raises(KeyboardInterrupt):
        sketch(study, killed="baseline")
    rewrite(study / "out/baseline", b"half of it")
    assert sketch(study) == ["baseline"]


def hashing(monkeypatch) -> list[str]:
    """Names of the files that are hashed from now on."""
    seen, sha256_file = [], manifest_lib.sha256_file

    def noting(path):
        seen.append(Path(path).name)
        return sha256_file(path)

    monkeypatch.setattr(manifest_lib, "sha256_file", noting)
    return seen


def test_unchanged_files_are_not_read(study, monkeypatch):
    seen, before = hashing(monkeypatch), contents(study)
    assert sketch(study) == []
    assert seen == []
    assert contents(study) == before


def without_stamps(study: Path) -> None:
    for path in (study / "stages").glob("*.json"):
        found = json.loads(path.read_text())
        del found["stamps"]
        path.write_text(json.dumps(found))


@pytest.mark.parametrize("how", ["touched", "copied", "older"])
def test_equal_files_with_other_times_are_hashed_once(study, monkeypatch, how, tmp_path):
    if how == "touched":
        os.utime(study / "out/baseline", (5, 5))
    elif how == "copied":
        shutil.copytree(study, tmp_path / "copy", copy_function=shutil.copyfile)
        for path in (tmp_path / "copy/out").iterdir():
            os.utime(path, (7, 7))
        study = tmp_path / "copy"
    else:
        without_stamps(study)
    seen = hashing(monkeypatch)
    assert sketch(study) == []
    names = {path.name for path in (study / "out").iterdir()}
    assert set(seen) == ({"baseline"} if how == "touched" else names)
    assert len(seen) == len(set(seen))
    seen.clear()
    assert sketch(study) == []
    assert seen == []


def test_a_folder_that_is_only_read_is_hashed_each_time(study, monkeypatch):
    without_stamps(study)

    def refuse(path, value):
        raise PermissionError(13, "read-only", str(path))

    monkeypatch.setattr(manifest_lib, "write_json", refuse)
    assert sketch(study) == []


def altered(**changes):
    def alter(text: str) -> str:
        found = json.loads(text) | changes
        return json.dumps({name: value for name, value in found.items() if value is not ...})

    return alter


NOT_MANIFESTS = {
    "empty object": lambda text: "{}",
    "empty file": lambda text: "",
    "list": lambda text: "[]",
    "number": lambda text: "3",
    "cut short": lambda text: text[:40],
    "no settings": altered(settings=...),
    "no hash": altered(hash=...),
    "no outputs": altered(outputs=...),
    "no inputs": altered(inputs=...),
    "no time": altered(wall_seconds=...),
    "outputs as a list": altered(outputs=["out/baseline"]),
    "an output without a hash": altered(outputs={"out/baseline": None}),
    "an output elsewhere": altered(outputs={"/etc/hostname": "0"}),
    "an output above": altered(outputs={"../other": "0"}),
    "stamps as text": altered(stamps="now"),
    "settings as text": altered(settings="none"),
    "another stage's": altered(stage="harvest"),
    "no UTF-8": lambda text: b"\xff\xfe{}",
}


@pytest.mark.parametrize("case", NOT_MANIFESTS)
def test_what_is_no_manifest_ends_in_one_line(study, case):
    path = study / "stages/baseline.json"
    content = NOT_MANIFESTS[case](path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"stages/baseline\.json: .*run again") as raised:
        sketch(study)
    assert "\n" not in str(raised.value)
    path.unlink()
    assert sketch(study) == ["baseline"]


NOT_JOURNALS = {
    "empty object": b"{}",
    "no tokens": b'{"index": 0}',
    "no index": b'{"tokens": [1]}',
    "index as text": b'{"index": "0", "tokens": [1]}',
    "index below zero": b'{"index": -1, "tokens": [1]}',
    "tokens as text": b'{"index": 0, "tokens": "abc"}',
    "tokens of text": b'{"index": 0, "tokens": ["a"]}',
    "true as a token": b'{"index": 0, "tokens": [true]}',
    "token too large": b'{"index": 0, "tokens": [1099511627776]}',
    "other rows": b'{"id": "a", "verdict": "refused"}',
}


@pytest.mark.parametrize("case", NOT_JOURNALS)
def test_what_is_no_journal_ends_in_one_line(tmp_path, case):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(b'{"index": 1, "tokens": [3, 4]}\n' + NOT_JOURNALS[case] + b"\n")
    with pytest.raises(UserError, match=r"eval\.jsonl:2: not a response .* delete the file"):
        Journal(path)


@pytest.mark.parametrize(
    "torn", [b'{"index": 2, "tok', b"\xff\xfe", b'{"index": 2, "tokens": [\xc3']
)
def test_a_line_that_a_kill_cut_short_is_generated_again(tmp_path, torn):
    path = tmp_path / "eval.jsonl"
    path.write_bytes(b'{"index": 1, "tokens": [3, 4]}\n' + torn)
    assert Journal(path).tokens == {1: (3, 4)}


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"status": "done"}'])
def test_what_is_no_record_of_a_unit_ends_in_one_line(tmp_path, content):
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished/a.json").write_text(content)
    grid = StudyGrid.__new__(StudyGrid)
    grid.folder = tmp_path
    with pytest.raises(UserError, match=r"finished/a\.json: "):
        grid.status("a")
