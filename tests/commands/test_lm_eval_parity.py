"""Special tokens as in lm_eval's own `hf` models, and users' errors in one line."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import lm_eval.api.instance
import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from tiny_models import _SIZES
from tiny_tokenizers import write_tokenizer

from ema_jax import lm_eval as adapter
from ema_jax.errors import UserError
from ema_jax.organism import CHECKPOINTS

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
# Tokenizers: (BOS, whether it is added by default)
TOKENIZERS = {"bos added": ("<s>", True), "bos known": ("<s>", False), "no bos": (None, False)}
PAIRS = [
    ("The garden", " path is long"),
    ("", "It opens at noon."),
    ("<s>The rendered prompt", " and more"),
    ("One ", "two"),
    ("Line\n\n", "next"),
    ("", "<s>brings its own"),
    ("", "<|im_end|>brings the other"),
    ("x", "y"),
]
TEXTS = ["The old mill stands behind it.", "<s>The old mill", "a", "word " * 40]


@pytest.fixture(scope="module", params=TOKENIZERS)
def folder(request, tmp_path_factory):
    bos, add = TOKENIZERS[request.param]
    folder = tmp_path_factory.mktemp("model")
    tokenizer = write_tokenizer(folder, TEMPLATE if bos else TEMPLATE[15:], bos, add_bos=add)
    sizes = _SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 96}
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model("llama", **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def hf(folder, **options):
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, **options)


def requests(kind, *arguments):
    return [
        lm_eval.api.instance.Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


@pytest.mark.parametrize(
    "options", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str
)
def test_scores_are_those_of_the_hf_backend(folder, options):
    theirs, ours = hf(folder, **options), adapter.Scorer.load(str(folder), **options)
    pairs = requests("loglikelihood", *PAIRS)
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    for found, (total, greedy), pair in zip(
        ours.loglikelihood(pairs), expected, PAIRS, strict=True
    ):
        assert found[0] == pytest.approx(total, abs=1e-3), pair
        assert found[1] == greedy, pair
    texts = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolling, abs=2e-3)


def test_generated_text_is_that_of_the_hf_backend(folder):
    settings = {"max_gen_toks": 8, "do_sample": False, "until": ["zzzz"]}
    asked = requests("generate_until", *((pair[0] or "x", settings) for pair in PAIRS))
    expected = hf(folder).generate_until(asked, disable_tqdm=True)
    assert adapter.Scorer.load(str(folder)).generate_until(asked) == expected


SIZES = [
    ({"batch_size": "auto"}, 16),
    ({"batch_size": "auto:4"}, 16),
    ({"batch_size": "auto", "max_batch_size": 8}, 8),
    ({"batch_size": 64, "max_batch_size": "32"}, 32),
    ({"max_batch_size": 4}, 4),
    ({"batch_size": "3"}, 3),
    ({"batch_size": 1}, 1),
]


@pytest.mark.parametrize(("options", "expected"), SIZES, ids=str)
def test_batch_sizes(options, expected):
    found = adapter._sizes(options)
    assert found == {"batch_size": expected}


OPTIONS = [
    {"batch_size": "many"},
    {"batch_size": "0"},
    {"batch_size": -1},
    {"batch_size": 2.5},
    {"max_length": "long"},
    {"max_gen_toks": "0"},
    {"max_batch_size": "auto"},
    {"no_such_option": "1"},
    {"enable_thinking": "maybe"},
    {"add_bos_token": "maybe"},
    {"dtype": "int3"},
    {"source": "/no/such/folder"},
    {"adapter": "/no/such/folder"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_that_cannot_be_are_refused_in_one_line(options):
    with pytest.raises(UserError) as error:
        adapter.Scorer.load(**{"source": str(CHECKPOINTS / "qwen2")} | options)
    assert "\n" not in str(error.value)


def run(*arguments, expected=2):
    done = subprocess.run(
        [sys.executable, "-m", "ema_jax.lm_eval", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == expected, done.stderr[-1500:]
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


SOURCE = f"--model_args=source={CHECKPOINTS / 'qwen2'}"
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture
def tasks(tmp_path):
    row = {"question": "The garden is", "choices": ["green", "red"], "answer": 0}
    (tmp_path / "rows.json").write_text(json.dumps(row))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.json")))
    return f"--include_path={tmp_path}"


WRONG = [
    ("--model=ema_jax", SOURCE, "--tasks=no_such_task"),
    ("--model=no_such_model", SOURCE, "--tasks=colours"),
    ("--model=ema_jax", "--model_args=source=/no/such/folder", "--tasks=colours"),
    ("--model=ema_jax", "--tasks=colours"),
    ("--model=ema_jax", SOURCE + ",batch=3", "--tasks=colours"),
    ("--model=ema_jax", SOURCE, "--tasks=colours", "--batch_size=many"),
    ("--config=/no/such/file.yaml",),
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_a_users_error_is_one_line_and_exit_code_2(tasks, arguments):
    assert len(run("run", tasks, *arguments)) == 1


@pytest.mark.slow
def test_batch_size_auto_runs(tasks):
    run("run", tasks, "--model=ema_jax", SOURCE, "--tasks=colours", "--batch_size=auto", expected=0)


def test_the_likelihood_needs_arguments_alone():
    scorer = adapter.Scorer.load(str(CHECKPOINTS / "qwen2"), batch_size="auto")
    assert scorer.loglikelihood([SimpleNamespace(args=("a", " b"))])[0][0] < 0
