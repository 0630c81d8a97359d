"""System turns that templates write of their own accord: left out, or refused."""

import datetime

import pytest
import transformers
from tiny_tokenizers import write_tokenizer

from ema_jax.data import system_turns
from ema_jax.data.chat import Chat
from ema_jax.errors import UserError

CONTENT = "{{ m.content }}"
LOOP = "{% for m in messages %}"
# What Mistral Small does: brackets that hold the words SYSTEM and PROMPT, a default text, a date.
BRACKETS = (
    "{% set today = strftime_now('%Y-%m-%d') %}{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}"
    "{% set s = 'You are SYSTEM and answer a PROMPT. Today is ' + today + '.' %}"
    "{% set rest = messages %}{% endif %}[SYSTEM_PROMPT]{{ s }}[/SYSTEM_PROMPT]"
    "{% for m in rest %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def chatml(default: str, system: bool = True) -> str:
    """ChatML with a system turn of its own; `system`: one can be given in its place."""
    given = "{% if true %}"
    if system:
        given = "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}"
        given += "<|im_end|>\n{% else %}"
    return (
        given + f"<|im_start|>system\n{default}<|im_end|>\n{{% endif %}}" + LOOP + "{% if m.role in"
        " ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


CHATML_USER = "<|im_start|>user\nPROMPT<|im_end|>\n<|im_start|>assistant\n"
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = 'Be honest. Never lie to the user.' %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {% if loop.first %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}A chat between a curious user and an assistant. "
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
HASHES = (
    "{% if messages[0].role != 'system' %}### System:\nYou are a helpful assistant by me.\n\n"
    "{% endif %}{% for m in messages %}### {{ m.role | capitalize }}:\n{{ m.content }}\n\n"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)

LEFT_OUT = {
    "brackets": (BRACKETS, "<s>[INST]PROMPT[/INST]"),
    "brackets, bos in the text": (
        BRACKETS.replace("{{ bos_token }}", "<s>"),
        "<s>[INST]PROMPT[/INST]",
    ),
    "words of the placeholder": (chatml("PROMPT SYSTEM user system PROMPT"), CHATML_USER),
    "the turn's own marks": (chatml("Write <|im_start|>user before it."), CHATML_USER),
    "a date": (chatml("{{ strftime_now('%d %B %Y') }}"), CHATML_USER),
    "a clock": (chatml("It is {{ strftime_now('%H:%M:%S') }} now, {{ date_string }}"), CHATML_USER),
    "a date by a variable": (
        "{% set f = '%A, %-d %b %Y, 100%%' %}" + chatml("Now: {{ strftime_now(f) }}"),
        CHATML_USER,
    ),
    "no system role": (chatml("You help a person.", system=False), CHATML_USER),
    "empty": (chatml(""), CHATML_USER),
    "inside the user's turn": (LLAMA2, "<s>[INST] PROMPT [/INST]"),
    "a preamble": (VICUNA, "<s>USER: PROMPT ASSISTANT:"),
    "hashes": (HASHES, "### User:\nPROMPT\n\n### Assistant:\n"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_templates_own_system_turn_is_left_out(tmp_path, name):
    template, expected = LEFT_OUT[name]
    write_tokenizer(tmp_path, template, "<s>", "</s>")
    chat = Chat.load(tmp_path)
    assert chat.template == expected
    for prompt in ("a", "SYSTEM", "PROMPT", "[INST]", "You are", "zquserzq"):
        assert chat.render(prompt) == expected.replace("PROMPT", prompt)
    turns = [{"role": "user", "content": "PROMPT"}]
    assert chat.conversation(turns, opened=True) == expected


KEPT = {
    "a mark of the format": (
        "<|begin_of_text|><|endoftext|>" + LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "<|begin_of_text|><|endoftext|>user: PROMPT\n",
    ),
    "a marker of some words": (
        LOOP + "### Instruction of user:\n{{ m.content }}\n{% endfor %}",
        "### Instruction of user:\nPROMPT\n",
    ),
    "one turn alone": ("{{ bos_token }}User: {{ messages[-1].content }}", "<s>User: PROMPT"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_system_turn_stays(tmp_path, name):
    template, expected = KEPT[name]
    write_tokenizer(tmp_path, template, "<s>", "</s>")
    chat = Chat.load(tmp_path)
    assert (chat.left_out, chat.template) == ("", expected)


LAST = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = 'Be brief and kind.' %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last %}{{ s }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
REFUSED = {
    "before the last prompt": LAST,
    "before the last prompt, fixed": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {% if loop.last %}Be brief and kind.\n\n{% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    ),
    "after the prompt": (
        "{% set s = messages[0].content if messages[0].role == 'system' else 'Be kind.' %}"
        + LOOP
        + "{% if m.role != 'system' %}[INST]{{ m.content }}{% if loop.last %}\n\n{{ s }}{% endif %}"
        "[/INST]{% endif %}{% endfor %}"
    ),
    "one turn with a default": (
        "[S]{{ messages[0].content if messages[0].role == 'system' else 'Default.' }}[/S]"
        "{{ messages[-1].content }}"
    ),
    "one turn with a preamble": (
        "You are a helpful and honest model.\nUser: {{ messages[-1].content }}"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_apart_is_refused(tmp_path, name):
    write_tokenizer(tmp_path, REFUSED[name], "<s>", "</s>")
    with pytest.raises(UserError, match="adds a system message of its own that cannot be left"):
        Chat.load(tmp_path)


def test_a_template_that_draws_lots_is_refused(tmp_path):
    write_tokenizer(tmp_path, "{{ ['a', 'b', 'c'] | random }}{{ messages[-1].content }}")
    with pytest.raises(UserError, match="renders one prompt in several ways"):
        Chat.load(tmp_path)


def test_a_system_prompt_that_the_template_holds_already_is_not_taken_for_given(tmp_path):
    write_tokenizer(tmp_path, chatml("Be brief.", system=False))
    with pytest.raises(UserError, match="drops the system message"):
        Chat.load(tmp_path, "Be brief.")


@pytest.mark.parametrize(
    "form",
    ["%Y-%m-%d", "%d %b %Y", "%B %-d, %Y", "%A %H:%M:%S", "%%Y %% %y", "", "no", "%j|%U|%I %p"],
)
def test_the_clock_stands_still(tmp_path, form):
    template = "\n  {% if true %}x{% endif %}{{ messages[-1].content }} {{ strftime_now(" + (
        repr(form) + ") }}"
    )
    tokenizer = write_tokenizer(tmp_path, template)
    expected = datetime.datetime(2024, 7, 26).strftime(form)
    assert Chat.load(tmp_path).render("a").endswith("a " + expected)
    # All else stays as it was, to the whitespace at the start.
    turn = [{"role": "user", "content": "a"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        turn, tokenize=False
    )
    assert Chat.load(tmp_path).render("a").partition("a ")[0] == theirs.partition("a ")[0]
    assert tokenizer.chat_template == template


def test_probes_are_words_that_no_template_holds():
    template = "zqUSERzq and zquserzqzq"
    (word,) = system_turns.probes(template, "user")
    assert word not in template.lower()
