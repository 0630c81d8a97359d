"""The table of docs/robustness.md, run again: variants tried, right and wrong, group by group.

pytest -m slow -n 0 -s tests/robustness/test_totals.py
"""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]


def groups() -> dict[str, list[str]]:
    """Section of the page → files of tests that its rows name."""
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    found = {}
    for section in page.split("\n## ")[1:]:
        title = section.splitlines()[0]
        rows = [line for line in section.splitlines() if line.startswith("| ")]
        files = sorted({file for row in rows for file in re.findall(r"`(tests/\S+\.py)`", row)})
        if files:
            found[title] = files
    return found


def outcomes(report: Path) -> dict[str, bool]:
    """Test → whether it was right."""
    cases = ElementTree.parse(report).iter("testcase")
    return {
        f"{case.get('classname')}: {case.get('name')}": (
            case.find("failure") is None and case.find("error") is None
        )
        for case in cases
    }


def test_every_row_names_tests_that_are_there():
    missing = [file for files in groups().values() for file in files if not (ROOT / file).exists()]
    assert not missing
    assert len(groups()) >= 4


@pytest.mark.slow
def test_totals(tmp_path, capsys):
    seen: set[str] = set()
    totals = [0, 0, 0]
    _say(capsys, "group", "tried", "right", "wrong")
    for i, (title, files) in enumerate(groups().items()):
        new = [file for file in files if file not in seen]  # a file counts where it comes first
        seen.update(new)
        report = tmp_path / f"{i}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junit-xml={report}", *new]
        subprocess.run(command, cwd=ROOT, capture_output=True)
        right = outcomes(report)
        wrong = [name for name, was in right.items() if not was]
        counts = [len(right), len(right) - len(wrong), len(wrong)]
        totals = [all_ + own for all_, own in zip(totals, counts, strict=True)]
        _say(capsys, title, *counts)  # as it goes: it takes minutes
        for name in wrong:
            _say(capsys, f"    {name}")
    _say(capsys, "all", *totals)
    assert totals[2] == 0


def _say(capsys, title: str, *counts: object) -> None:
    with capsys.disabled():
        print(f"\n{title:32}" + "".join(f"{x!s:>8}" for x in counts), end="", flush=True)
