"""A stage runs once, again when it must, and never turns a folder into another study."""

from pathlib import Path

import pytest
from finished_study import contents

from ema_jax.errors import UserError
from ema_jax.study.workdir import StageContext, Workdir


class Work:
    """A stage that writes a file and counts how often it did."""

    def __init__(self, workdir: Workdir, name: str, text: str = "x"):
        self.path, self.text, self.runs = workdir / name, text, 0

    def __call__(self, context: StageContext) -> list[Path]:
        self.runs += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text)
        return [self.path]


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    return Workdir(tmp_path / "study")


def test_a_finished_stage_is_left_alone(workdir):
    work = Work(workdir, "a.txt")
    for _ in range(3):
        workdir.run("a", {"n": 1, "names": ("x", "y")}, [], work)
    assert work.runs == 1
    manifest = workdir.manifest("a")
    assert manifest["settings"] == {"n": 1, "names": ["x", "y"]}
    assert list(manifest["outputs"]) == ["a.txt"]


def test_a_missing_output_is_made_again_and_those_that_read_it_stay(workdir):
    first, second = Work(workdir, "a.txt"), Work(workdir, "b.txt")

    def run():
        workdir.run("a", {}, [], first)
        workdir.run("b", {}, ["a"], second)

    run()
    first.path.unlink()
    run()
    assert (first.runs, second.runs) == (2, 1), "the same bytes came back: b is still right"


def test_what_reads_a_changed_output_is_made_again(workdir):
    first, second, third = (Work(workdir, f"{name}.txt") for name in "abc")

    def run():
        workdir.run("a", {}, [], first)
        workdir.run("b", {}, ["a"], second)
        workdir.run("c", {}, ["b"], third)

    run()
    first.path.unlink()
    first.text = "something else"
    run()
    # The hash is of settings, inputs and outputs, so it reaches past b, whose own bytes are equal.
    assert (first.runs, second.runs, third.runs) == (2, 2, 2)


def test_a_folder_counts_with_all_that_is_in_it(workdir):
    def work(context) -> list[Path]:
        for name in ("one", "deep/two"):
            path = workdir / "out" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        # As a process leaves them that was killed while it wrote.
        (workdir / "out" / ".one.123.tmp").write_text("torn")
        return [workdir / "out"]

    workdir.run("a", {}, [], work)
    assert set(workdir.manifest("a")["outputs"]) == {"out/one", "out/deep/two"}
    (workdir / "out" / "deep/two").unlink()
    workdir.run("a", {}, [], work)
    assert (workdir / "out" / "deep/two").exists()


def test_a_stage_that_raises_leaves_no_manifest(workdir):
    def broken(context) -> list[Path]:
        (workdir / "half.txt").write_text("half")
        raise RuntimeError("no")

    (workdir.path).mkdir()
    with pytest.raises(RuntimeError):
        workdir.run("a", {}, [], broken)
    assert workdir.manifest("a") is None
    work = Work(workdir, "half.txt", "whole")
    workdir.run("a", {}, [], work)
    assert work.runs == 1
    assert (workdir / "half.txt").read_text() == "whole"


def test_an_input_that_was_never_made_is_named(workdir):
    work = Work(workdir, "b.txt")
    with pytest.raises(UserError, match=r"stage b needs the stage a, .* add it to --stage"):
        workdir.run("b", {}, ["a"], work)
    assert work.runs == 0
    assert not workdir.path.exists()


def test_other_settings_are_another_study(workdir):
    workdir.run("a", {"x": {"y": 1}, "z": (1, 2)}, [], Work(workdir, "a.txt"))
    before = contents(workdir.path)
    workdir.check({"a": {"z": (1, 2), "x": {"y": 1}}, "new": {}})
    for settings, said in (
        ({"x": {"y": 2}, "z": (1, 2)}, r"stage a was run with x\.y = 1, .* now says 2"),
        ({"x": {"y": 1}, "z": (1,)}, r"with z = \[1, 2\]"),
        ({"x": {"y": 1}}, r"now says .\(not set\)"),
        ({"x": {"y": 1}, "z": (1, 2), "w": 3}, r"with w = .\(not set\)"),
    ):
        with pytest.raises(UserError, match=f"another study: its {said}|{said}"):
            workdir.check({"a": settings})
    assert contents(workdir.path) == before


def test_a_killed_stage_finds_what_it_left_unless_its_settings_changed(workdir):
    seen = []

    def work(context: StageContext) -> list[Path]:
        assert context.settings == {"n": seen[-1]}
        assert context.inputs == {}
        journal = context.journal("eval")
        before = journal.exists()
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.write_text("a response")
        seen.append(before)
        raise KeyboardInterrupt

    for n, resumed in ((1, False), (1, True), (2, False)):
        seen.append(n)
        with pytest.raises(KeyboardInterrupt):
            workdir.run("a", {"n": n}, [], work)
        assert seen[-1] is resumed
    workdir.run("a", {"n": 2}, [], Work(workdir, "a.txt"))
    assert not list(workdir.path.glob(".partial/**/*.jsonl"))


def test_a_study_starts_from_the_same_stages_of_another(workdir, tmp_path):
    for name, needs in (("a", []), ("b", ["a"])):
        workdir.run(name, {"n": 1}, needs, Work(workdir, f"{name}.txt"))
    before = contents(workdir.path)
    mine = Workdir(tmp_path / "mine", start=workdir.path)
    same, other, after = (Work(mine, f"{name}.txt", "y") for name in "abc")
    mine.run("a", {"n": 1}, [], same)
    mine.run("b", {"n": 2}, ["a"], other)
    mine.run("c", {}, ["b"], after)
    assert (same.runs, other.runs, after.runs) == (0, 1, 1)
    assert same.path.read_text() == "x"
    assert mine.manifest("a")["hash"] == workdir.manifest("a")["hash"]
    Workdir(mine.path).run("a", {"n": 1}, [], same)  # resumes without the other
    assert same.runs == 0
    assert contents(workdir.path) == before, "the other study is only read"


def test_what_another_study_made_is_not_taken_unseen(workdir, tmp_path):
    workdir.run("a", {}, [], Work(workdir, "a.txt"))
    workdir.run("results", {}, ["a"], Work(workdir, "r.txt"))
    mine = Workdir(tmp_path / "mine", start=workdir.path)
    own = Work(mine, "r.txt")
    mine.run("a", {}, [], Work(mine, "a.txt"))
    mine.run("results", {}, ["a"], own, of_another=False)
    assert own.runs == 1
    (workdir / "a.txt").write_text("changed")
    with pytest.raises(UserError, match=r"a\.txt: was changed after the stage a wrote it"):
        Workdir(tmp_path / "new", start=workdir.path).run("a", {}, [], Work(mine, "a.txt"))
    (workdir / "a.txt").unlink()
    again = Work(Workdir(tmp_path / "other"), "a.txt")
    Workdir(tmp_path / "other", start=workdir.path).run("a", {}, [], again)
    assert again.runs == 1
