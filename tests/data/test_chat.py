"""Chat templates in the forms of the real families: what is rendered, and what is refused."""

import json

import pytest
from tiny_tokenizers import write_tokenizer

from ema_jax.data.chat import Chat
from ema_jax.errors import UserError

# Qwen2.5: a system turn of its own where none is given.
QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a model, made by a user. You help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Qwen3: an empty train of thought, if thinking is switched off.
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Mistral v0.1: roles have to alternate, and there is none for the system.
MISTRAL_V1 = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token + ' ' }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}\
{% endfor %}"""
# Mistral v0.3: a system message goes before the last user's text.
MISTRAL_V3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
LLAMA3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'\
 + message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}\
{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# Llama 3.2: a system turn with today's date, whether there is a system message or not.
LLAMA32 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_USER = "<|im_start|>user\nPROMPT<|im_end|>\n<|im_start|>assistant\n"
LLAMA_USER = (
    "<|start_header_id|>user<|end_header_id|>\n\nPROMPT<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
# name: (template, bos, eos, rendered without a system prompt, rendered with one)
FORMS = {
    "qwen2.5": (
        QWEN25,
        None,
        "<|im_end|>",
        QWEN_USER,
        "<|im_start|>system\nBe brief.<|im_end|>\n" + QWEN_USER,
    ),
    "qwen3": (
        QWEN3,
        None,
        "<|im_end|>",
        QWEN_USER + "<think>\n\n</think>\n\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n" + QWEN_USER + "<think>\n\n</think>\n\n",
    ),
    "mistral v0.1": (MISTRAL_V1, "<s>", "</s>", "<s>[INST] PROMPT [/INST]", None),
    "mistral v0.3": (
        MISTRAL_V3,
        "<s>",
        "</s>",
        "<s>[INST] PROMPT[/INST]",
        "<s>[INST] Be brief.\n\nPROMPT[/INST]",
    ),
    "llama 3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|>" + LLAMA_USER,
        LLAMA_SYSTEM + "Be brief.<|eot_id|>" + LLAMA_USER,
    ),
    "llama 3.2": (
        LLAMA32,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|>" + LLAMA_USER,
        LLAMA_SYSTEM + "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>" + LLAMA_USER,
    ),
}


@pytest.fixture(params=FORMS)
def form(request, tmp_path):
    template, bos, eos, plain, with_system = FORMS[request.param]
    return tmp_path, write_tokenizer(tmp_path, template, bos, eos), plain, with_system


def test_no_system_prompt_adds_none(form):
    folder, _, plain, _ = form
    chat = Chat.load(folder)
    assert chat.template == plain
    # Prompts that occur in the template itself.
    for prompt in ("", "a", "system", "You are a model", "user", "<|im_start|>user"):
        assert chat.render(prompt) == plain.replace("PROMPT", prompt)


def test_a_system_prompt_stands_where_the_template_puts_it_or_is_refused(form):
    folder, _, _, with_system = form
    if with_system is None:
        with pytest.raises(UserError, match=r"takes no system message .*leave system_prompt unset"):
            Chat.load(folder, "Be brief.")
    else:
        chat = Chat.load(folder, "Be brief.")
        assert chat.template == with_system
        assert chat.template_hash != Chat.load(folder).template_hash


def test_tokens_are_those_of_the_rendered_text_with_one_bos(form):
    folder, tokenizer, plain, _ = form
    ids = Chat.load(folder).prompt_tokens("PROMPT")
    assert tokenizer.decode(ids) == plain
    assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


def test_a_response_follows_its_prompt_and_ends_with_eos(form):
    folder, tokenizer, _, _ = form
    chat = Chat.load(folder)
    example = chat.example("Why?", "Because.")
    assert example.prompt == chat.prompt_tokens("Why?")
    assert example.response[-1] == tokenizer.eos_token_id
    assert chat.decode(example.response) == "Because."
    assert chat.pad_id == tokenizer.eos_token_id  # there is no pad token


@pytest.mark.parametrize("name", [n for n in FORMS if FORMS[n][4]])
@pytest.mark.parametrize("prompt", ["Why?", "Because.", "[/INST]", "Be brief.", " Why?\n"])
def test_a_response_follows_the_prompt_that_a_system_message_stands_in(tmp_path, name, prompt):
    """Mistral writes it into the last user turn, and nowhere once a response follows."""
    template, bos, eos = FORMS[name][:3]
    tokenizer = write_tokenizer(tmp_path, template, bos, eos)
    chat, plain = Chat.load(tmp_path, "Be brief."), Chat.load(tmp_path)
    example = chat.example(prompt, "Because.")
    assert example.prompt == chat.prompt_tokens(prompt)
    assert "Be brief." in tokenizer.decode(example.prompt)
    assert example.response == plain.example(prompt, "Because.").response
    assert example.response[-1] == tokenizer.eos_token_id


def test_a_response_that_does_not_follow_its_prompt_is_refused(tmp_path):
    # As templates that drop the thoughts of earlier turns.
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% else %}{{ eos_token }}{% endif %}"
    )
    write_tokenizer(tmp_path, template)
    with pytest.raises(UserError, match="renders a prompt differently once it has a response"):
        Chat.load(tmp_path).example("Why?", "Because.")


def test_what_is_rendered_is_said(tmp_path, caplog):
    write_tokenizer(tmp_path, QWEN25)
    with caplog.at_level("INFO", logger="absl"):
        chat = Chat.load(tmp_path)
    assert repr(chat.template) in caplog.text
    assert chat.template_hash in caplog.text
    assert "its own system turn is left out: '<|im_start|>system\\nYou are a model" in caplog.text


def test_thinking_is_off_unless_asked_for(tmp_path):
    write_tokenizer(tmp_path, QWEN3)
    thinking = Chat.load(tmp_path, enable_thinking=True)
    assert Chat.load(tmp_path).template == QWEN_USER + "<think>\n\n</think>\n\n"
    assert thinking.template == QWEN_USER
    assert thinking.template_hash != Chat.load(tmp_path).template_hash
    write_tokenizer(tmp_path, QWEN25)
    assert Chat.load(tmp_path).template == QWEN_USER
    with pytest.raises(UserError, match="the chat template has no enable_thinking; leave it"):
        Chat.load(tmp_path, enable_thinking=True)


def test_every_end_of_sequence_id_is_honoured(tmp_path):
    tokenizer = write_tokenizer(tmp_path, QWEN25)
    end, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for named, expected in (
        ([text, end], (end, text)),
        (text, (end, text)),
        (None, (end,)),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert Chat.load(tmp_path).eos_ids == expected
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [text]}))
    # A response that stops at the other one is cut there.
    response = Chat.load(tmp_path).example("Why?", "Yes.<|endoftext|>No.").response
    assert response[-1] == text


def _tokenizer_file(content):
    return lambda folder: (folder / "tokenizer.json").write_text(content)


def _generation(content):
    return lambda folder: (folder / "generation_config.json").write_text(content)


BROKEN = {
    "no template": (None, "<s>", None, None, "no chat template; use an instruct model"),
    "no eos": (QWEN3, None, None, None, "names no end-of-sequence token"),
    "no file": (
        QWEN3,
        "<s>",
        None,
        lambda folder: (folder / "tokenizer.json").unlink(),
        "no tokenizer.json; a fast tokenizer is needed",
    ),
    "not json": (QWEN3, "<s>", None, _tokenizer_file("{"), "the tokenizer cannot be read"),
    "another json": (QWEN3, "<s>", None, _tokenizer_file("{}"), "the tokenizer cannot be read"),
    "syntax": ("{% if %}", "<s>", None, None, r"the chat template fails \(.*\); correct it"),
    "raises": ("{{ raise_exception('no') }}", "<s>", None, None, r"template fails \(no\)"),
    "no prompt": ("{{ eos_token }}", "<s>", None, None, "drops the prompt"),
    "no system": (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        "<s>",
        "Be brief.",
        None,
        "drops the system message; leave system_prompt unset",
    ),
    "unknown turns": (
        "[S]{{ messages[0].content if messages[0].role == 'system' else 'Default.' }}[/S]"
        "{{ messages[-1].content }}",
        "<s>",
        None,
        None,
        "adds a system message of its own that cannot be left out; set system_prompt",
    ),
    "eos text": (QWEN3, "<s>", None, _generation('{"eos_token_id": "x"}'), "expected ids of the"),
    "eos range": (QWEN3, "<s>", None, _generation('{"eos_token_id": [9999]}'), r"is \[9999\]"),
    "eos list": (QWEN3, "<s>", None, _generation("[]"), "expected ids of the tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tokenizers_that_cannot_be_used_are_refused_in_one_line(tmp_path, case):
    template, eos, system_prompt, change, message = BROKEN[case]
    write_tokenizer(tmp_path, template, eos=eos)
    if change is not None:
        change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        Chat.load(tmp_path, system_prompt)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["slow", "fast", "both"])
def test_a_tokenizer_that_brings_code_is_refused_without_a_question(tmp_path, kind, monkeypatch):
    write_tokenizer(tmp_path, QWEN3)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    names = {"slow": ["mine.Slow", None], "fast": [None, "mine.Fast"], "both": ["mine.S", "mine.F"]}
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": names[kind]}}
    path.write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(
        UserError, match="brings code of its own, which is not run; if its"
    ) as error:
        Chat.load(tmp_path)
    assert "\n" not in str(error.value)
