"""Bad input ends in one line and exit code 2, at once, with nothing written over."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finished_study import contents, sketch
from forked_commands import Done, ForkedCommand
from small_study import small_config

from ema_jax import config as ema
from ema_jax.errors import UserError
from ema_jax.organism import CHECKPOINTS
from ema_jax.study import runner

ROOT = Path(__file__).parents[2]
SECONDS = 10


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command; checks that it took less than `SECONDS` of a processor."""

    def used() -> float:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    before = used()
    done = subprocess.run(
        [sys.executable, "-m", "ema_jax.main", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert used() - before < SECONDS
    return done


@pytest.fixture(scope="module")
def forked():
    """The command as often as a test likes, where no start has to be proved."""
    command = ForkedCommand("ema_jax.main", "ema_jax.study.runner")
    with contextlib.closing(command):
        yield command


def assert_refused(done: subprocess.CompletedProcess[str] | Done, *expected: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(text in line for text in expected), line


TINY = "--config=configs/tiny.py"

REFUSED = [
    ([TINY, "--config.unlearn.learning_rat=1"], ["learning_rat"]),
    (["--config=configs/none.py"], ["configs/none.py"]),
    ([TINY, "--config.target=chemical_weapons"], ["target", "deny-listed"]),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED)
def test_the_command_refuses_in_one_line(forked, tmp_path, arguments, expected):
    done = forked(*arguments, f"--workdir={tmp_path / 'new'}")
    assert_refused(done, *expected)
    assert not any(tmp_path.iterdir())


def test_a_workdir_that_is_a_file_stays_as_it_is(tmp_path):
    (tmp_path / "notes").write_text("mine")
    assert_refused(command(TINY, f"--workdir={tmp_path / 'notes'}"), "notes", "is a file")
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_flag_that_is_missing_or_unknown(tmp_path):
    assert_refused(command(TINY), "--workdir is required")
    assert not any(tmp_path.iterdir())


def test_dry_run_prints_the_plan_without_a_device(tmp_path):
    """With a platform that does not exist, whatever touches a device fails."""
    done = command(TINY, f"--workdir={tmp_path / 'new'}", "--dry_run", JAX_PLATFORMS="nonexistent")
    assert done.returncode == 0, done.stderr
    for text in (
        "cybersecurity",
        "npo_retain",
        "baseline",
        "unlearn/npo/seed_0",
        "to do",
        "report",
    ):
        assert text in done.stdout
    assert not any(tmp_path.iterdir())


def test_a_config_may_take_a_word(forked, tmp_path):
    done = forked("--config=configs/tiny_advisor.py:mistral", f"--workdir={tmp_path}", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "npo_advised/seed_4" in done.stdout
    bad = forked("--config=configs/nothing.py:mistral", f"--workdir={tmp_path}", "--dry_run")
    assert_refused(bad, "configs/nothing.py: no such file")
    bad = forked("--config=configs/tiny_advisor.py:bert", f"--workdir={tmp_path}", "--dry_run")
    assert_refused(bad, "tiny_advisor.py:bert: no such model; use qwen2 or mistral")


_DRY_RUNS = """
import runpy, sys
from ema_jax import config
from ema_jax.study import runner
for name in sys.argv[2:]:
    study = config.read(runpy.run_path(f"configs/{name}.py")["get_config"]())
    runner.run(study, sys.argv[1], dry_run=True)
"""


def test_dry_run_of_the_papers_cells_offline(tmp_path):
    cells = [
        f"{family}_{target}" for family in ("qwen", "mistral") for target in ("cyber", "safety")
    ]
    done = subprocess.run(
        [sys.executable, "-c", _DRY_RUNS, str(tmp_path / "new"), *cells],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "nowhere",  # so that starting a backend fails
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "empty"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    plans = [line for line in done.stdout.splitlines() if line.startswith("study ")]
    assert ["Qwen2.5-7B-Instruct" in line for line in plans] == [True, True, False, False]
    assert ["Mistral-7B-Instruct-v0.3" in line for line in plans] == [False, False, True, True]
    assert all("not in the local cache" in line for line in plans)
    assert not (tmp_path / "new").exists()


# The rest of the table in this process, by the same path that the command takes.


def without(name: str):
    def damaged(tmp_path: Path, config) -> None:
        shutil.copytree(CHECKPOINTS / "qwen2", tmp_path / "model")
        (tmp_path / "model" / name).unlink()
        config.model.source = str(tmp_path / "model")

    return damaged


def change(field: str, value):
    def changed(tmp_path: Path, config) -> None:
        del tmp_path
        with config.unlocked():
            config.update_from_flattened_dict({field: value})

    return changed


def prompt_file(*domains: str):
    def written(tmp_path: Path, config) -> None:
        path = tmp_path / "prompts.jsonl"
        rows = [f'{{"domain": "{d}", "prompt": "about {d} {i}"}}\n' for d in domains for i in "12"]
        path.write_text("".join(rows))
        config.prompts.update(source="file", path=str(path), lookalike_source=None)

    return written


CASES = {
    "no weights": (without("model.safetensors"), "safetensors"),
    "no config.json": (without("config.json"), r"config\.json"),
    "no tokenizer": (without("tokenizer.json"), r"no tokenizer\.json"),
    "no such folder": (change("model.source", "/nowhere/model"), "/nowhere/model: no such folder"),
    "a revision of a folder": (change("model.revision", "main"), "no revision 'main'"),
    "a domain without prompts": (
        change("domains", ("cybersecurity", "etiquette")),
        "domain 'etiquette' has no prompts in source 'organism'",
    ),
    "a file without the target": (prompt_file("safety", "benign"), "cybersecurity"),
    "no prompt file": (
        lambda tmp_path, config: config.prompts.update(
            source="file", path=str(tmp_path / "none.jsonl"), lookalike_source=None
        ),
        r"none\.jsonl: no such",
    ),
    "target not among the domains": (change("target", "etiquette"), "'etiquette' is not one of"),
    "deny-listed target": (change("target", "csam"), "deny-listed"),
    "more devices than there are": (change("mesh", (64, 1, 1)), "needs 64 devices"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_any_work(tmp_path, case):
    damage, expected = CASES[case]
    config = small_config()
    damage(tmp_path, config)
    start = time.process_time()
    with pytest.raises(UserError, match=expected) as raised:
        runner.run(ema.read(config), tmp_path / "new", dry_run=False)
    assert time.process_time() - start < SECONDS
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("case", ["no prompt file", "too few to harvest"])
def test_a_fault_is_found_before_a_model_is_downloaded(tmp_path, monkeypatch, case):
    few = change("harvest.min_examples", 999), "min_examples = 999"
    damage, expected = {**CASES, "too few to harvest": few}[case]
    config = small_config()
    damage(tmp_path, config)
    config.model.source = "owner/model"

    def download(*_, **__):
        pytest.fail("many gigabytes were downloaded first")

    monkeypatch.setattr(runner, "find_model", download)
    with pytest.raises(UserError, match=expected):
        runner.run(ema.read(config), tmp_path / "new", dry_run=False)


# All but the devices, which a dry run does not touch.
@pytest.mark.parametrize("case", [case for case in CASES if "devices" not in case])
def test_a_dry_run_finds_it_too(tmp_path, case):
    damage, expected = CASES[case]
    config = small_config()
    damage(tmp_path, config)
    with pytest.raises(UserError, match=expected):
        runner.run(ema.read(config), tmp_path / "new", dry_run=True)
    assert not (tmp_path / "new").exists()


def test_the_folder_of_another_study_stays_as_it_is(tmp_path):
    sketch(tmp_path)
    before = contents(tmp_path)
    config = small_config()
    config.target = "safety"
    for dry_run in (True, False):
        with pytest.raises(UserError, match="holds another study: its stage prompts"):
            runner.run(ema.read(config), tmp_path, dry_run=dry_run)
    config.cells = {"a": {}}
    with pytest.raises(UserError, match="holds a single study"):
        runner.run(ema.read(config), tmp_path, dry_run=True)
    assert contents(tmp_path) == before


def test_an_unknown_stage(tmp_path):
    study = ema.read(small_config())
    with pytest.raises(UserError, match=r"--stage: 'analyze' is none of .*analyse"):
        runner.run(study, tmp_path / "new", only=["analyze"], dry_run=False)
    with pytest.raises(UserError, match="stage concepts needs the stage prompts"):
        runner.run(study, tmp_path / "new", only=["concepts"], dry_run=False)
    assert not any(tmp_path.iterdir())
