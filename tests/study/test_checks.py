"""Whatever would end a study later is said by its dry run, in one line, and leaves no trace."""

import json
import shutil
import time
from pathlib import Path

import pytest
from small_study import small_config

from ema_jax import config as ema
from ema_jax.errors import UserError
from ema_jax.models.config import DecoderConfig
from ema_jax.organism import CHECKPOINTS
from ema_jax.study import checks, runner

TARGET = "cybersecurity"
RETAIN = {"retain_weight": 1.0}


def fields(**values):
    """Sets fields; `__` stands for the dots in their names."""

    def change(folder: Path, config) -> None:
        with config.unlocked():
            for name, value in values.items():
                *groups, last = name.split("__")
                place = config
                for group in groups:
                    place = place[group]
                place[last] = value

    return change


def counts(**values):
    return lambda folder, config: config.prompts.counts.update(values)


def arm(**settings):
    return fields(arms={"npo": settings})


def judge(name: str, **options):
    return fields(judge=name, judge_options=options)


def extra(name: str, **options):
    return fields(extra_judges={name: options})


def damaged(name: str, content: str | bytes):
    """A copy of the model with one file of other content."""

    def change(folder: Path, config) -> None:
        shutil.copytree(CHECKPOINTS / "qwen2", folder / "model")
        data = content.encode() if isinstance(content, str) else content
        (folder / "model" / name).write_bytes(data)
        config.model.source = str(folder / "model")

    return change


def template(text: str):
    """A copy of the model with another chat template."""

    def change(folder: Path, config) -> None:
        shutil.copytree(CHECKPOINTS / "qwen2", folder / "model")
        path = folder / "model" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": text}))
        (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
        config.model.source = str(folder / "model")

    return change


def preferred(rows: str, objective: str = "dpo"):
    def change(folder: Path, config) -> None:
        (folder / "preferred.jsonl").write_text(rows)
        config.arms = {
            "npo": {"objective": objective, "preferred": str(folder / "preferred.jsonl")}
        }

    return change


def prompt_file(text: str = "about {domain} {i}", **changes):
    """Prompts of a file; one of them, in the middle, has a text of its own."""

    def change(folder: Path, config) -> None:
        rows = [
            {
                "domain": domain,
                "prompt": (text if i == 30 else "about {domain} {i}").format(**vars()),
            }
            for domain in (*config.domains, "benign")
            for i in range(60)
        ]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config.prompts.update(
            source="file",
            path=str(folder / "prompts.jsonl"),
            lookalike_source=None,
            near_duplicate=1.0,
            near_split=1.0,
            match_length=False,
        )
        fields(**changes)(folder, config)

    return change


ENDPOINT = {"model": "judge-1"}
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"

VARIANTS = {
    # Judges: made, with their options, but without weights.
    "endpoint without a key": (judge("endpoint", **ENDPOINT), "OPENAI_API_KEY is not set"),
    "extra endpoint without a key": (extra("endpoint", **ENDPOINT), "OPENAI_API_KEY is not set"),
    "endpoint, named key": (judge("endpoint", **ENDPOINT, key_env="MY_KEY"), "MY_KEY is not set"),
    "endpoint over http": (judge("endpoint", **ENDPOINT, url="http://a.org/v1"), "https://"),
    "endpoint, timeout": (judge("endpoint", **ENDPOINT, timeout="soon"), "'timeout' is str"),
    "endpoint, rubric": (judge("endpoint", **ENDPOINT, rubric="mood"), "rubric 'mood' is unknown"),
    "lexical, script": (judge("lexical", script=7), "'script' is int"),
    "substrings, script": (extra("substring_arditi", script=7), "unexpected .* 'script'"),
    "guard that is not there": (judge("wildguard", model="/nowhere/guard"), "/nowhere/guard"),
    "guard without a tokenizer": (extra("qwen3guard", model="/nowhere"), "/nowhere: no such"),
    "guard, batch of text": (
        judge("wildguard", model=str(CHECKPOINTS / "qwen2"), batch_size="many"),
        "'batch_size' is str",
    ),
    "causal_lm, mass": (
        judge("causal_lm", model=str(CHECKPOINTS / "qwen2"), min_mass=2.0),
        "min_mass is 2.0",
    ),
    "causal_lm, template": (
        judge("causal_lm", model=str(CHECKPOINTS / "qwen2"), template="{prompt}"),
        "template needs",
    ),
    "log-odds of nothing": (extra("logodds", model="no/../model"), "no such folder"),
    # Tokenizer, template, generation config.
    "tokenizer cut short": (damaged("tokenizer.json", "{"), "tokenizer cannot be read"),
    "tokenizer of nothing": (damaged("tokenizer.json", ""), "tokenizer cannot be read"),
    "tokenizer of bytes": (damaged("tokenizer.json", b"\xff\xfe"), "tokenizer cannot be read"),
    "tokenizer config": (damaged("tokenizer_config.json", "[]"), "tokenizer"),
    "generation config, list": (damaged("generation_config.json", "[]"), "eos_token_id is"),
    "generation config, text": (damaged("generation_config.json", "{"), "not valid JSON"),
    "generation config, ids": (
        damaged("generation_config.json", '{"eos_token_id": 99999}'),
        "expected ids of the tokenizer",
    ),
    "template that fails": (template("{{ messages[7].content }}"), "chat template"),
    "template without prompts": (template("hello"), "drops the prompt"),
    "template of bad syntax": (template("{% for %}"), "chat template fails"),
    "template that fails on one prompt": (
        lambda folder, config: (
            template("{{ raise_exception('no') if '?!' in messages[0].content }}" + PLAIN)(
                folder, config
            ),
            prompt_file("{domain} {i} ?!")(folder, config),
        ),
        "template fails on this prompt",
    ),
    "no system message": (fields(model__enable_thinking=True), "no enable_thinking"),
    # Single fields.
    "seed of 33 bits": (fields(seeds=(2**32,)), "seeds = 4294967296 is not below 4294967296"),
    "seed below zero": (fields(seeds=(0, -1)), "seeds = -1 is below zero"),
    "counts.eval of a billion": (counts(eval=10**9), "eval = 1000000000 is above 100000"),
    "counts of the corpus": (counts(eval=50_000), "embedded corpus has fewer"),
    "permutations": (fields(concepts__permutations=10**9), "permutations = 1000000000 is above"),
    "splits": (fields(concepts__splits=10**10), "splits"),
    "draws of the harvest": (fields(harvest__samples=10**9), "samples = 1000000000 is above 1000"),
    "draws of the evaluation": (fields(sensitivity__samples=10**6), "samples"),
    "rows of a batch": (arm(batch_size=10**9), "batch_size = 1000000000 is above 65536"),
    "rows of a retain batch": (arm(**RETAIN, retain_batch_size=10**12), "retain_batch_size"),
    # Several fields.
    "no dev prompts": (counts(dev=0), r"counts\.dev = 0: at least 1"),
    "no eval prompts": (counts(eval=0), r"counts\.eval = 0: at least 1"),
    "no harvest prompts": (counts(harvest=0), r"counts\.harvest = 0: at least 1"),
    "no concept prompts": (counts(concept=0), r"counts\.concept = 0: at least 4"),
    "three concept prompts": (counts(concept=3), r"counts\.concept = 3: at least 4"),
    "one domain": (fields(domains=(TARGET,)), "at least two"),
    "benign as a domain": (fields(domains=(TARGET, "safety", "benign")), "'benign' is none of"),
    "look-alikes as a domain": (fields(domains=(TARGET, "safe_lookalike")), "'safe_lookalike'"),
    "more examples than prompts": (fields(harvest__min_examples=17), r"counts\.harvest"),
    "more examples than retain": (fields(harvest__min_examples=9), r"counts\.retain"),
    "no retain prompts": (
        lambda folder, config: (
            counts(retain=0)(folder, config),
            fields(arms={"npo": RETAIN})(folder, config),
        ),
        r"counts\.retain = 0",
    ),
    "the target retained": (arm(**RETAIN, retain_counts={TARGET: 3}), "is the target"),
    "a retained domain too many": (
        arm(**RETAIN, retain_counts={"safety": 3, TARGET: 1}),
        "is the target",
    ),
    "a cell's target retained": (
        fields(
            arms={"npo": {**RETAIN, "retain_counts": {"safety": 3}}},
            cells={"a": {}, "b": {"target": "safety"}},
        ),
        "is the target",
    ),
    # The architecture.
    "rank beyond the width": (arm(lora={"rank": 129}), "rank = 129: the model is only 128 wide"),
    "rank of a million": (fields(unlearn__lora__rank=10**6), "rank = 1000000"),
    "rank, with devices left open": (
        fields(unlearn__lora__rank=200, mesh=(1, -1, 1)),
        "rank = 200",
    ),
    "cap of all positions": (fields(generation__max_new_tokens=512), "512 positions"),
    "cap beyond the positions": (fields(generation__max_new_tokens=10**9), "512 positions"),
    "long responses": (fields(sensitivity__long_tokens=2048), r"sensitivity\.long_tokens = 2048"),
    # The prompts.
    "cap and prompt together": (
        fields(generation__max_new_tokens=500),
        "has .* tokens, which with",
    ),
    "long responses and prompt": (fields(sensitivity__long_tokens=500), r"with sensitivity\.long"),
    "a prompt that is too long": (prompt_file("{domain} {i} " + "so on " * 400), "512 positions"),
    "pooling past a prompt": (fields(concepts__poolings=("token:-400",)), "reaches past"),
    "second pooling past a prompt": (
        fields(concepts__poolings=("last_token", "token:-99")),
        "'token:-99' reaches past",
    ),
    "pooling past a short prompt": (
        prompt_file(concepts__poolings=("token:-24",)),
        "'token:-24' reaches past",
    ),
    "preferred without the prompts": (
        preferred('{"prompt": "a", "response": "b"}\n'),
        "no response to 16 of 16",
    ),
    "preferred that is not there": (
        arm(objective="dpo", preferred="gone.jsonl"),
        "arms.npo: preferred 'gone.jsonl' is neither",
    ),
    "preferred without a response": (preferred('{"prompt": "a"}\n'), "response is missing"),
    "preferred of nothing": (preferred("", "sft"), "no response to 16"),
    "preferred that is no JSON": (preferred("prompt,response\n"), "not valid JSON"),
    "preferred of the corpus for other prompts": (
        prompt_file(arms={"npo": {"objective": "sft", "preferred": "organism"}}),
        "arms.npo: ",
    ),
}


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dry_run_says_it(tmp_path, variant):
    change, expected = VARIANTS[variant]
    config = small_config()
    change(tmp_path, config)
    start = time.process_time()
    with pytest.raises(UserError, match=expected) as raised:
        runner.run(ema.read(config), tmp_path / "new", dry_run=True)
    assert time.process_time() - start < 10
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists()


SOME = (
    "endpoint without a key",
    "tokenizer cut short",
    "benign as a domain",
    "cap beyond the positions",
    "preferred without the prompts",
)


@pytest.mark.parametrize("variant", SOME)
def test_a_run_says_it_before_it_writes_or_loads_anything(tmp_path, variant, monkeypatch):
    change, expected = VARIANTS[variant]
    config = small_config()
    change(tmp_path, config)
    # The second cell is the wrong one: it must not wait for the first.
    monkeypatch.setattr("ema_jax.models.checkpoint.load", None)
    with pytest.raises(UserError, match=expected):
        runner.run(ema.read(config), tmp_path / "new", dry_run=False)
    assert not (tmp_path / "new").exists()


def test_the_last_cell_is_checked_before_the_first_runs(tmp_path, monkeypatch):
    config = small_config()
    config.cells = {"fine": {}, "wrong": {"concepts": {"poolings": ("token:-400",)}}}
    monkeypatch.setattr("ema_jax.models.checkpoint.load", None)
    with pytest.raises(UserError, match="reaches past"):
        runner.run(ema.read(config), tmp_path / "new", dry_run=False)
    assert not (tmp_path / "new").exists()


FINE = {
    "as it is": fields(),
    "two domains": fields(domains=(TARGET, "safety")),
    "four concept prompts": counts(concept=4),
    "the greatest seed": fields(seeds=(2**32 - 1,)),
    "no retain prompts, and none asked for": lambda folder, config: (
        counts(retain=0)(folder, config),
        fields(arms={"npo": {}})(folder, config),
    ),
    "as many examples as prompts": fields(harvest__min_examples=8),
    "rank of the width": fields(unlearn__lora__rank=128),
    "preferred of the corpus": arm(objective="dpo", preferred="organism"),
    "an arm that needs none": arm(preferred="idk"),
    "the template's own tail": fields(concepts__poolings=("token:-2", "last_token")),
    "prompts of a file": prompt_file(),
}


@pytest.mark.parametrize("variant", FINE)
def test_what_is_right_passes(tmp_path, variant, capsys):
    config = small_config()
    FINE[variant](tmp_path, config)
    runner.run(ema.read(config), tmp_path / "new", dry_run=True)
    assert "to do  baseline" in capsys.readouterr().out


def test_a_judging_model_that_is_not_here_yet_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    config = small_config()
    config.extra_judges = {"wildguard": {"model": "somebody/guard"}}
    runner.run(ema.read(config), tmp_path / "new", dry_run=True)
    assert "judging model somebody/guard, not in the local cache" in capsys.readouterr().out


def test_the_lists_hold_every_check():
    """A check that is in no list is never run."""
    listed = {check.__name__ for check in (*checks.OF_CONFIG, *checks.OF_MODEL, *checks.OF_PROMPTS)}
    takes_config = {
        name
        for name, found in vars(checks).items()
        if name.startswith("_")
        and getattr(found, "__annotations__", {}).get("return") is None
        and "config" in getattr(found, "__annotations__", {})
    }
    assert takes_config == listed


def test_positions_are_counted_to_the_last(tmp_path):
    """The longest prompt and the cap may fill the model's positions exactly."""
    study = ema.read(small_config())
    decoder = DecoderConfig.from_folder(CHECKPOINTS / "qwen2")
    prompt = checks.Prompt("p", TARGET, "eval", "?", "s", "0", "p")
    cap = study.generation.max_new_tokens
    fits = checks.Asked(decoder, None, [prompt], [decoder.max_positions - cap])
    checks._positions(study, fits)
    with pytest.raises(UserError, match="p has 465 tokens"):
        checks._positions(study, checks.Asked(decoder, None, [prompt], [fits.tokens[0] + 1]))
