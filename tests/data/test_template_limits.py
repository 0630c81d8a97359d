"""Chat templates without bounds are refused; all others give the text of transformers."""

import threading
import time

import pytest
import transformers
from test_chat import FORMS
from test_system_turns import LEFT_OUT
from tiny_tokenizers import write_tokenizer

from ema_jax.data import templates
from ema_jax.data.chat import Chat
from ema_jax.errors import UserError

TEXT = "{{ messages[0].content }}"
LONG = "{% set t = 'x' * 100000 %}"
# Doubles `a` sixty times.
DOUBLED = "{% set n = namespace(a=START) %}{% for i in range(60) %}{% set n.a = STEP %}{% endfor %}"
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"

SLOW = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops of nothing": "{% for a in range(99999) if range(99999)|select('lt', 0)|list %}"
    "{% endfor %}",
    "filters": "{{ range(99999)|map('string')|map('length')|list|batch(1)|map('sum')|list|length"
    " }}" * 50,
    "power": "{{ (10 ** (10 ** 9)) % 7 }}",
    "round": "{{ 5|round(-1000000000) }}",
    "macro": MACRO,
    "loop that calls itself": "{% for a in range(30) recursive %}"
    "{{ loop(range(30)) if loop.depth < 9 }}{% endfor %}",
    "sums of lists": "{{ (range(99999)|batch(1)|list|sum(start=[]))|length }}",
}
LARGE = {
    "times": "{{ ('x' * 10 ** 10)|length }}",
    "list": "{{ ([0] * 10 ** 10)|length }}",
    "doubled text": DOUBLED.replace("START", "'x'").replace("STEP", "n.a ~ n.a"),
    "doubled list": DOUBLED.replace("START", "[0]").replace("STEP", "[n.a, n.a]") + "{{ n.a }}",
    "width": "{{ ('%1000000000d' % 1)|length }}",
    "width as a value": "{{ ('%*d' % (1000000000, 1))|length }}",
    "format": "{{ '{:>10000000000}'.format(1)|length }}",
    "format filter": "{{ '%1000000000d'|format(1)|length }}",
    "center": "{{ 'x'.center(10 ** 10)|length }}",
    "center filter": "{{ 'x'|center(10 ** 10)|length }}",
    "replace": LONG + "{{ t.replace('', t)|length }}",
    "join": LONG + "{{ ([t] * 99999)|join|length }}",
    "join by": LONG + "{{ range(99999)|join(t)|length }}",
    "indent": "{{ 'a\\nb'|indent(10 ** 10)|length }}",
    "tojson": "{{ {'a': 1}|tojson(indent=10 ** 10)|length }}",
    "batch": "{{ [1]|batch(10 ** 10, 'x')|list|length }}",
    "slice": "{{ [1]|slice(10 ** 10)|list|length }}",
    "bytes": "{{ (1).to_bytes(10 ** 10, 'big')|length }}",
    "tabs": "{{ '\\t'.expandtabs(2000000000)|length }}",
    "wrapped": LONG + "{{ t|wordwrap(1, wrapstring=t)|length }}",
    "escaped": "{{ ('<' * 10 ** 9)|escape|length }}",
}
LONG_TEXT = {
    "text": "{% for a in range(9999) %}{{ 'x' * 999 }}{% endfor %}",
    "one text": "{{ 'x' * 9999999 }}",
    "lorem ipsum": "{{ lipsum(n=9999, html=false) }}",
}
ENDS = {
    **dict.fromkeys(SLOW, "takes more than 1 s of computing"),
    **dict.fromkeys(LARGE, "takes more than (512 MiB of memory|1 s of computing)"),
    **dict.fromkeys(LONG_TEXT, "adds more than 1,048,576 characters|more than 1 s"),
}


@pytest.mark.parametrize("name", ["loops", "times", "text", "power", "doubled text"])
def test_a_template_without_bounds_is_refused(tmp_path, name):
    _refused(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ENDS))
def test_every_template_without_bounds_is_refused(tmp_path, name):
    _refused(tmp_path, name)


def _refused(folder, name):
    write_tokenizer(folder, {**SLOW, **LARGE, **LONG_TEXT}[name] + TEXT)
    before = time.monotonic()
    with pytest.raises(UserError, match=ENDS[name]) as error:
        Chat.load(folder)
    assert str(error.value).startswith(f"{folder}: the chat template ")
    assert "\n" not in str(error.value)
    assert time.monotonic() - before < 60  # of a machine that has other work, too


def test_a_template_that_is_slow_for_one_prompt_is_refused_there(tmp_path):
    bomb = "{% if messages[0].content|length > 50 %}" + SLOW["loops"] + "{% endif %}"
    write_tokenizer(tmp_path, bomb + "{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = Chat.load(tmp_path)
    assert chat.render("short") == "short"
    with pytest.raises(UserError, match="more than 1 s of computing"):
        chat.render("long" * 20)
    assert chat.render("short again") == "short again"


THEIRS = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}"
    "{% endgeneration %}{{ x is defined }}{% endfor %}",
    "breaks": "{% for i in range(9) %}{% if i == 3 %}{% continue %}{% endif %}{{ i }}"
    "{% if i == 5 %}{% break %}{% endif %}{% endfor %}" + TEXT,
    "tojson": "{{ {'b': messages[0].content, 'a': '<é&>'}|tojson(indent=2) }}"
    "{{ [1.5, none]|tojson(separators=(',', ':'), sort_keys=true) }}",
    "namespace": "{% set n = namespace(a=1, self=2) %}{% set n.a = n.a + 1 %}{{ n.a }}" + TEXT,
    "dict": "{{ dict(a=1).a }}{{ dict.fromkeys(['b'])|list }}{{ dict.mro is defined }}" + TEXT,
    "whitespace": "\n  {% if true %}\n  a\n  {%- endif %}\n {{ messages[0].content }}\n",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ tools is none }}" + TEXT,
    "unicode": "é\u2028{{ '\\u0000' }}" + TEXT,
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("prompt", ["Why?", "é\u2028\n<&>\ud800'\"{{ x }}", ""])
def test_all_other_templates_give_the_text_of_transformers(tmp_path, name, prompt):
    write_tokenizer(tmp_path, THEIRS[name], "<s>", "</s>")
    _same_text(tmp_path, [{"role": "user", "content": prompt}])


@pytest.mark.parametrize("name", [*FORMS, *LEFT_OUT])
def test_the_families_give_the_text_of_transformers(tmp_path, name):
    template, bos, eos = (
        (*LEFT_OUT[name][:1], "<s>", "</s>") if name in LEFT_OUT else FORMS[name][:3]
    )
    template = template.replace("strftime_now(", "('' ~ ")  # their clock moves
    write_tokenizer(tmp_path, template, bos, eos)
    turns = [{"role": role, "content": f" {role}\n"} for role in ("user", "assistant", "user")]
    _same_text(tmp_path, turns)
    _same_text(tmp_path, [{"role": "system", "content": "Be brief."}, *turns])


def _same_text(folder, messages):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for opened in (True, False):
        given: dict = {"add_generation_prompt": opened, "date_string": "1 May 2020", "flag": False}
        theirs = _text_or_error(tokenizer.apply_chat_template, messages, tokenize=False, **given)
        assert _text_or_error(templates.render, tokenizer, messages, **given) == theirs


def _text_or_error(render, *args, **kwargs):
    try:
        return render(*args, **kwargs)
    except templates.TemplateError as error:
        return f"failed: {error.what}"
    except Exception as error:
        return f"failed: {error}"


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.mro() }}", "{{ namespace(_a=1) }}", "{{ [].append(1) }}", "{{ open('x') }}"],
)
def test_the_sandbox_stays_closed(tmp_path, template):
    tokenizer = write_tokenizer(tmp_path, template + TEXT)
    with pytest.raises(templates.TemplateError):
        print(templates.render(tokenizer, [{"role": "user", "content": "x"}]))


def test_threads_get_their_own_texts_and_an_interrupted_one_leaves_nothing(tmp_path):
    tokenizer = write_tokenizer(tmp_path, TEXT)

    def render(text):
        return templates.render(tokenizer, [{"role": "user", "content": text}])

    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: render(f"text {i}")}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"text {i}" for i in range(8)}

    templates._PROCESS._child.stdout = Interrupting(templates._PROCESS._child.stdout)
    with pytest.raises(KeyboardInterrupt):
        render("interrupted")
    assert render("next") == "next"
    templates._PROCESS._child.kill()
    templates._PROCESS._child.wait()
    assert render("after the end of the process") == "after the end of the process"


class Interrupting:
    def __init__(self, pipe):
        self.close = pipe.close

    def readline(self):
        raise KeyboardInterrupt
