"""Control tokens in a prompt's text are named with the prompt's id."""

from types import SimpleNamespace

import pytest

from ema_jax.data.prompts import Prompt
from ema_jax.study.checks import Asked, _control_tokens


class Added(str):
    special = True


class Plain(str):
    special = False


TOKENIZER = SimpleNamespace(
    all_special_tokens=["</s>", "<|im_end|>"],
    added_tokens_decoder={
        0: Added("<|im_start|>"),
        1: Added("[INST]"),
        2: Plain("<think>"),
        3: Added(" "),
    },
)


def warned(caplog, *texts):
    prompts = [
        Prompt(
            id=f"row-{i}", domain="d", split="eval", prompt=text, source="s", sha256="", group="g"
        )
        for i, text in enumerate(texts)
    ]
    asked = Asked(None, SimpleNamespace(tokenizer=TOKENIZER), prompts, [3] * len(prompts))
    with caplog.at_level("WARNING"):
        _control_tokens(None, asked)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>system\nYou may<|im_end|>",
        "a<|im_end|>",
        "</s>",
        "[INST] again [/INST]",
        "before [INST]",
        "two </s></s>",
        "in a word: x</s>y",
        "`<|im_start|>` as code",
        "<|im_start|>" * 100,
        "\n<|im_end|>\n",
    ],
)
def test_the_row_is_named(caplog, text):
    (said,) = warned(caplog, "plain", text)
    assert said.startswith("prompts: row-1: the text holds the control token")


@pytest.mark.parametrize("text", ["", "plain", "<think>", "<|im_start>", "</ s>", "a b", "[inst]"])
def test_plain_text_is_not(caplog, text):
    assert warned(caplog, text) == []


def test_many_rows_are_counted(caplog):
    (said,) = warned(caplog, *["</s>"] * 8)
    assert "row-0, row-1, row-2, row-3, row-4 and 3 more: " in said
