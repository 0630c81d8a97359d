"""What a user types: commands, configs by name, fields by type, and slips with a line each."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from absl import flags
from report_fixtures import write_finished

import ema_jax.__main__ as command
from ema_jax import compare, init, reproduce
from ema_jax import config as ema
from ema_jax import main as run
from ema_jax.errors import UserError
from ema_jax.runtime import cli, files, paths
from ema_jax.share import __main__ as share
from ema_jax.study import config_file, field_help, pipeline, reproduction, workdir
from ema_jax.unlearning.metrics import MetricsWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def typed(monkeypatch):
    """Parses a command line of `ema-jax run` and reads its config; returns the line it ends in."""
    monkeypatch.chdir(ROOT)
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(cli, "_required", [])
    monkeypatch.setattr(cli, "_explanations", [])
    for name in ("DEFINE_string", "DEFINE_list", "DEFINE_bool"):
        declare = getattr(flags, name)
        monkeypatch.setattr(
            flags, name, lambda *given, f=declare, **more: f(*given, flag_values=values, **more)
        )
    run.define_flags()

    def line(*arguments: str) -> str:
        try:
            cli._parse_flags(["ema-jax run", *arguments], positional=False)
            paths.local_path(values.workdir, "--workdir")
            study = config_file.load(values.config, cli.fields_of("config"))
            known = set(pipeline.NAMES)
            return repr(study) if set(values.stage or ()) <= known else "--stage: none of"
        except UserError as error:
            return f"error: {error}"

    return line


AT = "--workdir=runs/x"
TINY = "--config=tiny"

# What is typed, and what the one line must say.
SLIPS = [
    ([AT], "--config is required: give --config=VALUE"),
    ([TINY], "--workdir is required"),
    (["configs/tiny.py", AT], "write --config=configs/tiny.py"),
    (["tiny"], "write --config=tiny"),
    ([TINY, "runs/x"], "write --workdir=runs/x"),
    ([TINY, AT, "config.seeds=3"], "write --config.seeds=3"),
    ([TINY, AT, "stage=report"], "write --stage=report"),
    (["--config=", AT], "--config is empty"),
    ([TINY, "--workdir="], "--workdir is empty"),
    ([TINY, "--workdir= "], "--workdir is empty"),
    ([TINY, AT, "--stage="], "--stage is empty.*leave it out"),
    ([TINY, AT, "--stagee=report"], "stagee.*Did you mean: stage"),
    ([TINY, AT, "--dryrun"], "dryrun.*Did you mean: dry_run"),
    (["--config=configs/tinny.py", AT], "did you mean configs/tiny.py"),
    (["--config=configs/tiny", AT], "did you mean configs/tiny.py"),
    (["--config=tyni", AT], "did you mean --config=tiny, which"),
    (["--config=qwen", AT], "no such file"),
    (["--config=config/tiny.py", AT], "did you mean --config=tiny"),
    (["--config=configs", AT], "a folder; name a file"),
    (["--config=gs://b/tiny.py", AT], "a URL"),
    ([TINY, "--workdir=gs://b/run"], "--workdir: 'gs://b/run' is a URL"),
    (["--config=tiny:mistral", AT], "get_config.*leave out what follows the colon"),
    ([TINY, AT, "--config.target=cyber"], "did you mean 'cybersecurity'"),
    ([TINY, AT, "--config.tarqet=safety"], "did you mean --config.target"),
    ([TINY, AT, "--config.beta=0.2"], "did you mean --config.unlearn.beta"),
    ([TINY, AT, "--config.unlearn.learning_rat=1"], "did you mean --config.unlearn.learning_rate"),
    ([TINY, AT, "--config.arms.npoo.beta=1"], "no arm 'npoo'; did you mean 'npo'"),
    ([TINY, AT, "--config.arms.npo.bata=1"], r"did you mean --config.arms.npo.beta"),
    ([TINY, AT, "--config.seeds.0=1"], "seeds has no fields; write --config.seeds=VALUE"),
    ([TINY, AT, "--config.unlearn=0.1"], "a set of fields; write --config.unlearn.FIELD"),
    ([TINY, AT, "--config.unlearn.max_steps=many"], "unlearn.max_steps = 'many' is not a int"),
    ([TINY, AT, "--config.unlearn.max_steps"], "no value; write --config.unlearn.max_steps=VALUE"),
    ([TINY, AT, "--config.keep_text=yes"], "keep_text = 'yes' is not a bool"),
    ([TINY, AT, "--config.judge=lexcal"], "did you mean 'lexical'"),
    ([TINY, AT, "--config.prompts.source=organsim"], "did you mean 'organism'"),
    ([TINY, AT, "--config.prompts.counts=5"], "prompts.counts.NAME=VALUE"),
    ([TINY, AT, "--config.prompts.counts.evel=5"], "unknown split 'evel'"),
    ([TINY, AT, "--config.prompts.path=s3://b/p.jsonl"], "prompts.path: 's3://b/p.jsonl' is a URL"),
    ([TINY, AT, "--config.unlearn.objective=nop"], "did you mean 'npo'"),
    ([TINY, AT, "--config.model.dtype=bf16"], "none of float32, bfloat16"),
    ([TINY, AT, "--config.domains="], "--config.domains: empty"),
    ([TINY, AT, "--config.seeds=a,b"], "seeds = 'a' is not a int"),
]


@pytest.mark.parametrize(("arguments", "said"), SLIPS, ids=lambda value: " ".join(value)[:70])
def test_a_slip_ends_in_one_line_that_says_what_to_write(typed, arguments, said):
    line = typed(*arguments)
    assert line.startswith("error: "), line[:200]
    assert re.search(said, line), line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("domains=cybersecurity,safety,bias", "domains", ("cybersecurity", "safety", "bias")),
        ("domains=('cybersecurity', 'bias')", "domains", ("cybersecurity", "bias")),
        ("domains=[cybersecurity, bias]", "domains", ("cybersecurity", "bias")),
        ("seeds=3", "seeds", (3,)),
        ("seeds=0,1,2", "seeds", (0, 1, 2)),
        ("mesh=(1,-1,1)", "mesh", (1, -1, 1)),
        ("keep_text", "keep_text", True),
        ("keep_text=false", "keep_text", False),
        ("judge_options={}", "judge_options", {}),
        ("prompts.counts={'eval': 7}", "prompts.counts.eval", 7),
        ("prompts.counts.eval=7", "prompts.counts.harvest", 320),
        ("model.revision=None", "model.revision", None),
        ("unlearn.learning_rate=1", "unlearn.learning_rate", 1.0),
        ("concepts.sweep_strengths=-2,2", "concepts.sweep_strengths", (-2, 2)),
    ],
)
def test_a_field_is_read_by_its_type(override, field, value):
    name, equals, text = override.partition("=")
    found = config_file.load("tiny", [(name, text if equals else None)])
    for part in field.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_every_field_of_an_arm_can_be_set_for_it_alone():
    study = config_file.load("tiny", [("arms.npo.beta", "0.2"), ("arms.npo.lora.rank", "2")])
    assert (study.arm("npo").beta, study.arm("npo_retain").beta) == (0.2, 1.0)
    assert (study.arm("npo").lora.rank, study.arm("npo_retain").lora.rank) == (2, 16)
    cells = config_file.load("tiny_replication", [("cells.qwen2_safety.unlearn.beta", "0.3")])
    assert ema.cell(cells, "qwen2_safety").unlearn.beta == 0.3


def test_fields_are_kept_apart_from_flags(typed):
    study = typed(
        TINY, AT, "--config.seeds", "3,4", "--config.keep_text", "--noconfig.model.enable_thinking"
    )
    assert "seeds=(3, 4)" in study
    assert "keep_text=True" in study


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text((ROOT / "configs/tiny.py").read_text())
    (tmp_path / "prompts.jsonl").write_text("")
    overrides = [("prompts.source", "file"), ("prompts.path", "~/prompts.jsonl")]
    study = config_file.load("~/mine.py", [*overrides, ("prompts.lookalike_source", "None")])
    assert study.prompts.path == str(tmp_path / "prompts.jsonl")
    assert paths.local_path("~/runs", "--workdir") == tmp_path / "runs"


URLS = [
    "gs://b",
    "GS://B/x",
    "s3:/b",
    "hdfs:x",
    "hdfs://n/x",
    "file:///tmp/x",
    "file:x",
    "az://c/x",
]
URLS += ["https://h/x", "memory://x", "abfss://c@a/x", " gs://b"]
NO_URLS = [
    "runs/x",
    "C:/runs",
    "runs/a:b",
    "a:b",
    "2026-11-26T10:00",
    "./gs:x",
    "/gs://x",
    "..",
    "ü",
]


@pytest.mark.parametrize("text", [*URLS, *NO_URLS])
def test_a_url_is_no_path(text):
    if text in NO_URLS:
        assert paths.local_path(text, "--workdir") == Path(text)
        return
    with pytest.raises(UserError, match=r"--workdir: .* is a URL"):
        paths.local_path(text, "--workdir")


@pytest.mark.parametrize("text", ["", "  ", "~nobody-here/x", "a\0b", "x" * 300, "x/" * 3000])
def test_what_is_no_path_at_all(text):
    with pytest.raises(UserError, match=r"^--workdir: "):
        paths.local_path(text, "--workdir")


GOOD = "def get_config():\n    from ema_jax import config\n    return config.default()\n"

# A config file's text, and what the line must say.
FILES = {
    "exit": ("import sys\nsys.exit(0)\n", r":2: calls exit\(0\)"),
    "exit inside": ("def get_config():\n    raise SystemExit('no')\n", r":2: calls exit\('no'\)"),
    "quit": ("x = 1\n\nquit()\n", r":3: calls exit"),
    "raises": ("1 / 0\n", ":1: ZeroDivisionError: division by zero"),
    "raises inside": ("def get_config():\n    return {}['x']\n", ":2: KeyError: 'x'"),
    "raises below": (
        "def f():\n    raise ValueError('two\\nlines')\n\ndef get_config():\n    return f()\n",
        ":2: ValueError: two lines",
    ),
    "base exception": ("class E(BaseException): pass\nraise E\n", ":2: E: no message"),
    "endless": ("def get_config():\n    return get_config()\n", ":2: RecursionError"),
    "syntax": ("x = 1\ndef get_config(:\n", ":2: SyntaxError"),
    "indentation": ("def get_config():\nreturn 1\n", ":2: IndentationError"),
    "no UTF-8": (b"x = '\xff\xfe'\n", "SyntaxError"),
    "null": (b"x = 1\0\n", "null"),
    "no module": ("\nimport not_there_at_all\n", ":2: ModuleNotFoundError"),
    "empty": ("", r"no function get_config\(\)"),
    "misnamed": (GOOD.replace("get_config", "get_configs"), r"no function get_config\(\)"),
    "no function": ("get_config = 3\n", r"no function get_config\(\)"),
    "none": ("x = 1\ndef get_config():\n    pass\n", r":2: get_config\(\) returned NoneType"),
    "a list": ("def get_config():\n    return [1]\n", "returned list, not a config"),
    "the function": ("def get_config():\n    return get_config\n", "returned function"),
    "async": ("async def get_config():\n    return {}\n", "returned coroutine"),
    "arguments": ("def get_config(a, b):\n    return {}\n", r":1: get_config\(\): missing"),
    "no names": ("def get_config():\n    return {1: 2}\n", ":1: .*field 1, which is no name"),
    "unknown field": (
        "def get_config():\n    return {'targett': 'bias'}\n",
        "did you mean 'target'",
    ),
    "assert": ("assert 1 == 2\n", ":1: AssertionError: no message"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_config_ends_in_a_line_with_its_place(tmp_path, name, capsys):
    text, said = FILES[name]
    path = tmp_path / "study.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as raised:
        config_file.load(str(path))
    assert str(path) in str(raised.value) or name == "unknown field"
    assert "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", "")


def test_a_config_is_found_by_path_name_and_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file.locate("tiny") == (ROOT / "configs/tiny.py", None)
    assert config_file.locate("tiny_advisor:mistral") == (
        ROOT / "configs/tiny_advisor.py",
        "mistral",
    )
    Path("tiny").mkdir()  # a folder of that name does not hide it
    assert config_file.locate("tiny")[0] == ROOT / "configs/tiny.py"
    Path("qwen_cyber").write_text(GOOD)  # a file of that name does
    assert config_file.locate("qwen_cyber")[0] == Path("qwen_cyber")
    Path("a:b.py").write_text(GOOD)
    assert config_file.locate("a:b.py:c") == (Path("a:b.py"), "c")
    assert config_file.load("a:b.py") == ema.StudyConfig()


def test_init_writes_a_config_that_reads(tmp_path):
    path = init.write(tmp_path / "mine", "tiny")
    assert config_file.load(str(path)) == config_file.load("tiny")
    with pytest.raises(UserError, match="exists already"):
        init.write(tmp_path / "mine", "tiny")
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        init.write(tmp_path / "other", "tyny")


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_is_told_the_figures_of_every_step(tmp_path, monkeypatch, tracker):
    (tmp_path / f"{tracker}.py").write_text(
        "told = []\n"
        "def init(**given): told.append(given)\n"
        "def log(row, step): told.append((step, row))\n"
        "def finish(): told.append('end')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, tracker, raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert config_file.load("tiny", [("tracker", tracker)]).tracker == tracker
    with MetricsWriter(tmp_path / "mine", "npo", 0, tracker) as log:
        log({"step": 1, "loss": 0.5})
    assert sys.modules[tracker].told == [
        {"project": "ema_jax", "name": "mine/npo.seed_0", "config": {"arm": "npo", "seed": 0}},
        (1, {"train/loss": 0.5}),
        "end",
    ]
    monkeypatch.delitem(sys.modules, tracker)


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracker: trackio is not installed; pip install trackio"):
        config_file.load("tiny", [("tracker", "trackio")])


def test_a_study_is_described_and_compared_with_another(tmp_path):
    study = config_file.load("tiny", [("arms.npo.beta", "0.2")])
    counts = {"refused": 9, "valid": 10, "invalid": 0, "total": 10, "rate": 0.9}
    found = {
        "model": {"id": "qwen2", "revision": None, "fingerprint": "f", "path": "/private"},
        "provenance": {"versions": {"jax": "1"}, "devices": "1 x cpu"},
        "arms": {"base": {"refusal": {"bias": counts}}, "npo": {"refusal": {"bias": counts}}},
    }
    files.write_json(tmp_path / "results.json", found)
    made = reproduction.read(reproduction.write(study, workdir.Workdir(tmp_path)))
    assert str(ROOT) not in (tmp_path / "reproduce.json").read_text()
    assert ema.read(reproduction.config_of(made)) == study
    assert list(reproduction.differences(made, made)) == []
    found["arms"]["npo"]["refusal"]["bias"] = counts | {"refused": 3, "valid": 8, "invalid": 2}
    found["provenance"]["versions"] = {"jax": "2"}
    files.write_json(tmp_path / "results.json", found)
    again = reproduction.describe(study, workdir.Workdir(tmp_path))
    assert list(reproduction.differences(made, again)) == [
        "version of jax: 1 then, 2 now",
        "npo, bias: 9 of 10 refused then, 3 of 8 refused now",
    ]
    for text in ("{}", "[]", '{"schema": 1}', '{"schema": 2}', "x"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match=r"other\.json"):
            reproduction.read(tmp_path / "other.json")


def test_a_study_is_not_reproduced_in_its_own_folder(tmp_path, monkeypatch):
    given = types.SimpleNamespace(workdir=str(tmp_path), config=None, dry_run=False)
    monkeypatch.setattr(flags, "FLAGS", given)
    with pytest.raises(UserError, match=r"the folder of reproduce\.json, whose study would be"):
        reproduce.main(["reproduce", f"{tmp_path}/./reproduce.json"])


@pytest.mark.parametrize(
    ("output", "said"),
    [("gs://b/c.html", "--output: .* is a URL"), ("there.html", "is a folder; name a file")],
)
def test_where_a_comparison_goes_is_checked_before_it_is_made(tmp_path, monkeypatch, output, said):
    (tmp_path / "there.html").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(output=output))
    with pytest.raises(UserError, match=said):
        compare.main(["compare", "one", "two"])  # of which there is neither


def test_where_a_study_is_shared_to_is_checked_before_it_is_read(tmp_path, monkeypatch):
    write_finished(tmp_path / "study")
    (tmp_path / "there.csv").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    given = types.SimpleNamespace(to="table", workdir="~/study", output="~/there.csv")
    monkeypatch.setattr(flags, "FLAGS", given)
    with pytest.raises(UserError, match=r"there\.csv: is a folder; name a file"):
        share.main(["share"])
    given.output = "~/figures.csv"
    share.main(["share"])
    assert (tmp_path / "figures.csv").read_text().startswith("arm,")


def test_a_reader_of_help_may_stop_reading():
    command = f"{shlex.quote(sys.executable)} -m ema_jax run --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("The whole study")
    assert done.stderr == ""


def test_help_names_every_field_and_stage_without_jax():
    assert run.STAGES == pipeline.NAMES

    def leaves(kind, prefix=""):
        import dataclasses
        import typing

        for name, hint in typing.get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                yield from leaves(hint, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    shown = field_help.fields()
    assert [field.name for field in shown] == list(leaves(ema.StudyConfig))
    assert [field.name for field in shown if not field.meaning] == []
    script = (
        "import sys; sys.argv = ['ema-jax', 'run', '--help']\n"
        "import ema_jax.__main__ as m\n"
        "try: m.main()\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'jax', 'numpy', 'ml_collections', 'pydantic'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for text in (
        "--config=…",
        "--workdir=…",
        "--config.unlearn.beta=0.1",
        "harvest, dose, unlearn",
    ):
        assert text in done.stdout


def test_commands_are_modules_and_completion_names_them():
    for name, entry in command.COMMANDS.items():
        place = ROOT / entry.module.replace(".", "/")
        assert name == "compare" or place.with_suffix(".py").exists() or place.is_dir()
    for shell in ("bash", "zsh"):
        script = command._completion([shell])
        assert "dry-run" in script
    check = subprocess.run(
        ["bash", "-c", f"{command._completion(['bash'])}\ncomplete -p ema-jax"],
        capture_output=True,
        text=True,
    )
    assert "-F _ema_jax ema-jax" in check.stdout, check.stderr


def test_the_wheel_holds_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "ema_jax").rglob("__init__.py")
    }
    assert {*settings["packages"]} == found | {"ema_jax.configs"}
