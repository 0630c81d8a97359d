"""The adapter for lm_eval: its three methods against transformers, and a task run by lm_eval."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from ema_jax import lm_eval as adapter
from ema_jax.data.chat import Chat
from ema_jax.errors import UserError
from ema_jax.generation.sampler import GREEDY, Sampling
from ema_jax.organism import CHECKPOINTS

FOLDER = CHECKPOINTS / "qwen2"
PAIRS = [
    ("Please explain the", " garden path."),
    ("Tell me about the river ", "bridge and the old mill"),
    ("", "It opens at noon."),
    ("How do I bake bread?\n", "I cannot help with that, sorry."),
]


@pytest.fixture(scope="module")
def scorer() -> adapter.Scorer:
    return adapter.Scorer.load(str(FOLDER), batch_size="4")


@pytest.fixture(scope="module")
def theirs():
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def requests(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


def log_probs(model, ids) -> tuple[np.ndarray, np.ndarray]:
    """Of every token after the first: its log-probability, and whether it is the likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    chosen = torch.tensor(ids[1:])
    found = torch.log_softmax(logits, -1)[torch.arange(len(chosen)), chosen]
    return found.numpy(), (logits.argmax(-1) == chosen).numpy()


def test_loglikelihood_against_transformers(scorer, theirs):
    tokenizer, model = theirs
    context = scorer.apply_chat_template(TURN)
    first, _, rest = scorer.generate_until(requests((context, {})))[0].partition(" ")
    pairs = [*PAIRS, (context + first, f" {rest}")]
    found = scorer.loglikelihood(requests(*pairs))
    for (context, continuation), (total, same) in zip(pairs, found, strict=True):
        before = tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]
        whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        shown = before or [tokenizer.eos_token_id]
        whole = whole if before else shown + whole
        expected, likeliest = log_probs(model, whole)
        assert total == pytest.approx(expected[len(shown) - 1 :].sum(), abs=1e-3)
        assert same == likeliest[len(shown) - 1 :].all()
    assert [same for _, same in found] == [False] * len(PAIRS) + [True]
    # Neither order nor company matters.
    again = scorer.loglikelihood(requests(*pairs[::-1]))[::-1]
    np.testing.assert_allclose([x for x, _ in again], [x for x, _ in found], atol=1e-4)


TURN = [{"role": "user", "content": "Please explain how to water the garden path."}]


def test_a_long_context_loses_its_beginning(scorer, theirs, monkeypatch):
    tokenizer, model = theirs
    monkeypatch.setattr(scorer, "_max_length", 12)
    context, continuation = "one two three four five six " * 9, " the garden path"
    whole = tokenizer(context.rstrip() + " " + continuation, add_special_tokens=False)["input_ids"]
    number = len(whole) - len(tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
    (total, _), (endless, _) = scorer.loglikelihood(
        requests((context, continuation), ("a", " b" * 99))
    )
    expected, _ = log_probs(model, whole[-13:])
    assert total == pytest.approx(expected[-number:].sum(), abs=1e-3)
    assert np.isfinite(endless)


@pytest.mark.parametrize("window", [500, 16])
def test_rolling_likelihood(scorer, theirs, monkeypatch, window):
    tokenizer, model = theirs
    monkeypatch.setattr(scorer, "_max_length", window)
    texts = ["The old mill stands behind the station. " * 3, "Noon.", ""]
    found = scorer.loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, total in zip(texts, found, strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        expected = 0.0
        for start in range(1, len(ids), window):
            end = min(start + window, len(ids))
            inside = ids[max(0, end - 1 - window) : end]
            expected += log_probs(model, inside)[0][start - end :].sum()
        assert total == pytest.approx(expected, abs=1e-3)


def test_generation_stops_at_the_strings(scorer, theirs):
    tokenizer, model = theirs
    context = scorer.apply_chat_template(TURN)
    assert context == Chat.load(FOLDER).render(TURN[0]["content"])
    ids = tokenizer(context, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=40, do_sample=False)
    said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    stop = said.split()[3]
    whole, short, either, capped = scorer.generate_until(
        requests(
            (context, {"max_gen_toks": 40}),
            (context, {"max_gen_toks": 40, "until": stop, "do_sample": False, "temperature": 0.7}),
            (context, {"max_gen_toks": 40, "until": ["", "never said", stop]}),
            (context, {"max_gen_toks": 2}),
        )
    )
    assert whole == said
    assert short == either == said.partition(stop)[0] != said
    assert capped
    assert said.startswith(capped)


def test_thinking_is_off_unless_asked_for(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "thinks")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if not enable_thinking %}<closed>{% endif %}")
    for given, closed in ((None, True), ("False", True), ("true", False), (True, False)):
        thinking = {} if given is None else {"enable_thinking": given}
        scorer = adapter.Scorer.load(str(folder), **thinking)
        assert scorer.apply_chat_template(TURN).endswith("<closed>") == closed, given
    with pytest.raises(UserError, match="enable_thinking = 'maybe': expected true or false"):
        adapter.Scorer.load(str(folder), enable_thinking="maybe")
    with pytest.raises(UserError, match="the chat template has no enable_thinking"):
        adapter.Scorer.load(str(FOLDER), enable_thinking=True)


def test_what_is_asked_of_the_sampler():
    assert adapter._sampling({"until": ["x"]}) == GREEDY
    assert adapter._sampling({"do_sample": False, "temperature": 0.9}) == GREEDY
    assert adapter._sampling({"do_sample": True, "top_k": 5}) == Sampling(1.0, top_k=5)
    assert adapter._sampling({"temperature": 0.5, "top_p": 0.9}) == Sampling(0.5, top_p=0.9)


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


@pytest.mark.slow
def test_lm_eval_runs_a_task_of_its_own(tmp_path):
    """The accuracy that lm_eval reports is that of the likelihoods that transformers gives."""
    rows = [
        {"question": f"The {thing} is", "choices": ["green", "an old red mill"], "answer": i % 2}
        for i, thing in enumerate(("garden", "river", "bread", "station", "lock", "ladder"))
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.json")))
    command = ["run", "--model=ema_jax", f"--model_args=source={FOLDER}", "--tasks=colours"]
    command += [f"--include_path={tmp_path}", f"--output_path={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-m", "ema_jax.lm_eval", *command],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(path.read_text())["results"]["colours"]["acc,none"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    right = 0
    for row in rows:
        before = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
        scores = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"]
            scores.append(log_probs(model, whole)[0][len(before) - 1 :].sum())
        right += int(np.argmax(scores)) == row["answer"]
    assert found == pytest.approx(right / len(rows))


def test_without_lm_eval_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(SystemExit) as stopped:
        adapter.main()
    assert stopped.value.code == 2
    assert "error: lm_eval is not installed; pip install" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["at the start", "at work", "in its cleaning up"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_with_one_line(monkeypatch, capsys, name, when):
    import lm_eval.__main__

    def send() -> None:
        os.kill(os.getpid(), signal.Signals[name])

    def work() -> None:
        try:
            if when == "at work":
                send()
            raise ValueError
        finally:
            send()

    monkeypatch.setattr(adapter, "register", send if when == "at the start" else lambda: None)
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", work)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            adapter.main()
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert ended.value.code == 3
    said = capsys.readouterr().err
    by = {"SIGINT": "Ctrl-C"}.get(name, name)
    assert said.startswith(f"stopped: asked to stop ({by}); no results are written")
    assert said.count("\n") == 1
