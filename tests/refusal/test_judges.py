"""Judges, validity, and the judge command from the outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ema_jax.errors import UserError
from ema_jax.refusal import validity
from ema_jax.refusal.judges import ARDITI, KEYWORD, ORBENCH, TEXT_JUDGES, XSTEST, get_judge
from ema_jax.refusal.verdicts import Verdict

ANSWER = "The station is on the left, behind the old mill; trains leave every hour until ten."


def _verdict(judge, response, **row):
    (verdict,) = get_judge(judge)([{"prompt": "p", "response": response, **row}])
    return verdict


def test_unknown_judge_names_the_known_ones():
    with pytest.raises(UserError, match=r"'guess' is unknown.*lexical.*substring_orbench"):
        get_judge("guess")
    with pytest.raises(UserError, match="colour"):
        get_judge("lexical", colour="red")


@pytest.mark.parametrize("name", TEXT_JUDGES)
def test_one_verdict_a_row_in_order_whatever_the_prompt(name):
    responses = ["I cannot help with that.", ANSWER, "", "I cannot say.", "!?"]
    rows = [{"prompt": "p", "response": response} for response in responses]
    judge = get_judge(name)
    verdicts = judge(rows)
    assert [v.verdict for v in verdicts] == ["refused", "complied", "invalid", "refused", "invalid"]
    assert all(
        0.0 <= v.score <= 1.0 and (v.score >= 0.5) == (v.verdict == "refused") for v in verdicts
    )
    assert judge.name == name
    assert judge.version
    assert judge([{**row, "prompt": "I cannot"} for row in rows]) == verdicts
    assert judge(rows[::-1]) == verdicts[::-1]
    assert judge([]) == []


def test_substring_lists_keep_their_published_rules():
    assert (len(ARDITI), len(KEYWORD), len(XSTEST), len(ORBENCH)) == (12, 36, 21, 2)
    middle = "Well, I CANNOT do it"
    assert _verdict("substring_arditi", middle).verdict == "refused"  # anywhere, any case
    assert _verdict("substring_keyword", middle).verdict == "complied"  # case-sensitive
    assert _verdict("substring_keyword", "That is illegal there.").reason == "illegal"
    assert _verdict("substring_xstest", middle).verdict == "complied"  # prefixes only
    assert _verdict("substring_xstest", " I CANNOT do it").verdict == "refused"
    assert _verdict("substring_orbench", "I can't do it").verdict == "complied"


def test_a_long_answer_cut_at_the_cap_is_still_judged():
    assert _verdict("lexical", ANSWER, finished=False).verdict == "complied"
    assert _verdict("lexical", "I cannot help with", finished=False).verdict == "refused"


@pytest.mark.parametrize(
    ("prompt", "response", "reason"),
    [
        ("Is the tall one dumb?", " is the tall one DUMB", "echo"),
        ("Is the tall one dumb?", "Is the tall one dumb? No.", ""),
        ("Say yes.", "Say yes.", ""),  # too short to tell
    ],
)
def test_a_prompt_given_back_is_no_answer(prompt, response, reason):
    rows = [{"prompt": prompt, "response": response}]
    (verdict,) = validity.judge_valid(rows, "LATIN", lambda valid: [Verdict.of(0.0)])
    assert verdict.reason == reason
    assert verdict.share == ("degenerate" if reason else "complied")


def test_the_cap_tightens_the_repetition_rule():
    words = [f"w{i}" for i in range(20)]
    text = " ".join((words * 3)[:48])  # 46 trigrams, 20 of them distinct; no short run
    assert validity.repeated_ngram_share(text) == pytest.approx(1 - 20 / 46)
    assert validity.invalid_reason(text, language=None) == ""
    assert validity.invalid_reason(text, finished=False) == "repetition"
    assert validity.invalid_reason(" ".join(words * 3)) == "repetition"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("...!?", "empty"),
        ("the cat sat " * 20, "repetition"),
        ("no " * 9, "repetition"),
        ("1. **Songbird**\n2. **Songbird**\n3. **Songbird**", "repetition"),
        ("Three of them:\n\n- a pear\n- a pear\n- a pear", "repetition"),
        ("1. a pear\n2. a plum\n3. a pear", ""),
        ("1. a pear\n2. a pear", ""),
        ("First, the soil.\n\n---\n\nThen the seed.\n\n---\n\nLast, the rain.\n\n---", ""),
        ("It was night.\n* * *\nIt was day.\n* * *\nIt was over.\n* * *", ""),
        ("Please fill in your names:\n1. ____\n2. ____\n3. ____", ""),
        ("и это не тот язык", "script"),
        ("Да, of course", ""),
        ("5", ""),
        ("Yes.", ""),
        (ANSWER, ""),
        ("| a | b |\n|---|---|\n| one | two |\n| three | four | five | six | seven |", ""),
        ("1. Sand\n2. Wood\n3. Iron\n4. Glass\n5. Clay\n6. Rope\n7. Wax\n8. Wool\n9. Salt", ""),
    ],
)
def test_invalid_reasons(text, reason):
    assert validity.invalid_reason(text) == reason


DATA = Path(__file__).parents[1] / "data" / "degenerate_kinds.jsonl"
KINDS = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
REASONS = {
    "urls": "urls",
    "hashtags": "urls",
    "boilerplate": "boilerplate",
    "counters": "numbers",
    "punctuation": "numbers",
    "salad": "salad",
    "language": "language",
    "sound": "",
}


@pytest.mark.parametrize("kind", dict.fromkeys(row["group"] for row in KINDS))
def test_kinds_of_damage_are_named_apart(kind):
    found = [
        validity.invalid_reason(row["response"], row["finished"])
        for row in KINDS
        if row["group"] == kind and row["part"] == "held_out"
    ]
    expected = REASONS.get(kind, "repetition")
    assert len(found) >= 5
    if kind == "sound":
        assert set(found) == {""}
    else:
        assert "" not in found
        assert found.count(expected) > len(found) / 2


def test_other_languages_are_an_option():
    text = "Das ist nicht so einfach, aber ich kann es mit dir versuchen."
    assert validity.invalid_reason(text) == "language"
    assert validity.invalid_reason(text, language=None) == ""
    assert validity.invalid_reason("Sie ist da.") == ""  # too short to tell


def test_other_scripts_are_an_option():
    text = "и это не тот язык"
    assert validity.invalid_reason(text, script=None) == ""
    assert validity.invalid_reason(text, script="CYRILLIC") == ""
    (verdict,) = get_judge("lexical", script=None)([{"prompt": "p", "response": text}])
    assert verdict.verdict == "complied"


def test_repeated_ngram_share_and_longest_run_by_hand():
    assert validity.repeated_ngram_share("a b c a b c") == pytest.approx(1 - 3 / 4)
    assert validity.repeated_ngram_share("a b") == 0.0
    assert validity.longest_run("a b a b a b c") == 3
    assert validity.longest_run("x x x y") == 3
    assert validity.longest_run("") == 0
    assert validity.wrong_script_share("abж") == pytest.approx(1 / 3)


def _run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "ema_jax.judge", *flags], capture_output=True, text=True, check=False
    )


def test_command_keeps_rows_and_order(tmp_path):
    rows = [
        {"prompt": "a", "response": "I must decline.", "id": 7, "note": "ü"},
        {"prompt": "b", "response": ANSWER, "nested": {"k": [1]}},
        {"prompt": "c", "response": ""},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    done = _run("--judge=lexical", f"--input={source}", f"--output={target}")
    assert done.returncode == 0, done.stderr
    assert "1 refused, 1 complied, 1 invalid" in done.stderr
    judged = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    added = {"verdict", "score", "reason", "harm", "judge", "judge_version", "judge_revision"}
    assert [{k: v for k, v in row.items() if k not in added} for row in judged] == rows
    assert [row["verdict"] for row in judged] == ["refused", "complied", "invalid"]
    assert {row["judge"] for row in judged} == {"lexical"}

    target.write_text("mine", encoding="utf-8")
    again = _run(f"--input={source}", f"--output={target}")
    assert again.returncode == 2
    assert again.stderr == f"error: {target}: exists already; pass --overwrite to replace it\n"
    assert target.read_text(encoding="utf-8") == "mine"
    assert _run(f"--input={source}", f"--output={target}", "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "response": "b"}\n\n{"prompt": "a"}\n', ':3: the row has no "response"'),
        ('{"prompt": "a", "response": 5}\n', ':1: "response" is int, expected str'),
        ('{"prompt": "a", "response": "b"\n', ":1: not valid JSON"),
        ("[1]\n", ":1: expected a JSON object"),
        (None, ": no such file"),
    ],
)
def test_malformed_input_names_the_place(tmp_path, text, message):
    from ema_jax.judge import read_rows

    source = tmp_path / "in.jsonl"
    if text is not None:
        source.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_rows(str(source))
    assert str(caught.value).startswith(f"{source}{message}")


GOOD = b'{"prompt": "a", "response": "b"}'


def _with(field: str, *values: str) -> list[bytes]:
    return [f'{{"prompt": "a", "response": "b", {field}: {v}}}'.encode() for v in values]


# Ten of each kind that ends in one line; all stand in the second line of their file.
UNWRITABLE = {
    "an unpaired surrogate": [
        *_with('"note"', r'"\ud800"', r'"\uDFFF"', r'"\udc00\ud800"', r'["\ud83d"]'),
        *_with('"note"', r'{"k": "\udead"}'),
        *_with(r'"\ud800"', "1"),
        *_with(r'"x": {"\udbff": 1}, "y"', "1"),
        rb'{"prompt": "\ud83d", "response": "b"}',
        rb'{"prompt": "a", "response": "b\udc9f"}',
        rb'{"prompt": "\ud83d\ude00 \ud83d", "response": "b"}',
    ],
    "is no JSON": [
        *_with('"score"', "NaN", "Infinity", "-Infinity"),
        *_with('"score"', "[NaN]", '{"k": -Infinity}', "[[Infinity]]"),
        b'{"prompt": NaN, "response": "b"}',
        b'{"prompt": "a", "response": Infinity}',
        b'{"finished": NaN, "prompt": "a", "response": "b"}',
        b"NaN",
    ],
    "a number too large": [
        *_with('"id"', "1e400", "-1e999", "9" * 400 + ".5", "[1E+1000]", '{"k": 1e309}'),
        *_with('"id"', "9" * 309, "-" + "9" * 400, "1" + "0" * 5000, "[" + "7" * 9000 + "]"),
        b"8" * 5000,
    ],
    "nested more than 100 deep": [
        *_with('"x"', *("[" * n + "]" * n for n in (101, 500, 2000, 100_000))),
        *_with('"x"', *('{"k":' * n + "1" + "}" * n for n in (101, 990, 5000))),
        *_with('"x"', '[{"k":' * 60 + "1" + "}]" * 60, "[" * 101 + "1" + "]" * 101 + ', "y": []'),
        b"[" * 3000 + b"]" * 3000,
    ],
    "JSON": [  # neither JSON nor an object: the words differ
        b'{"prompt": "a", "response": "b"',
        b'{"prompt": "a" "response": "b"}',
        b"{'prompt': 'a', 'response': 'b'}",
        b'{"prompt": "a", "response": "b"}}',
        b'{"prompt": "a\tb", "response": "c"}',
        b'{"prompt": "a", "response": "b",}',
        b"prompt,response",
        b'["a", "b"]',
        b"null",
        b"[" * 100_000,
    ],
    "not UTF-8": [
        GOOD.replace(b"a", byte)
        for byte in (b"\xff", b"\xfe", b"\x80", b"\xc3", b"\xe9", b"\xed\xa0\x80", b"\xc0\x80",
                     b"\xf5\x80\x80\x80", b"\xf0\x9f\x98", b"caf\xe9")
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("number", range(10))
def test_what_could_not_be_written_back_is_named_before_it_is_judged(tmp_path, kind, number):
    from ema_jax.judge import read_rows

    assert len(UNWRITABLE[kind]) == 10
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b"\n" + UNWRITABLE[kind][number] + b"\n" + GOOD + b"\n")
    with pytest.raises(UserError) as caught:
        read_rows(str(source))
    message = str(caught.value)
    assert message.startswith(f"{source}:2: ")
    # An ill-formed text may be deep as well, and what is no object may be a number.
    assert kind in message or "nested more than" in message or "is no JSON" in message
    assert len(message) < len(str(source)) + 200
    message.encode()


ODD_BUT_SOUND = [
    b"\xef\xbb\xbf" + GOOD,
    GOOD + b"\n\xef\xbb\xbf" + GOOD,
    GOOD + b"\r\n" + GOOD,
    b"\xef\xbb\xbf\n" + GOOD,
    *_with('"note"', r'"\ud83d\ude00"', r'"\\ud800"', '"\U0001f600 \u2028 \u0085"', '"\\u0000"'),
    *_with('"x"', "[" * 99 + "]" * 99, "9" * 308, "1e308", "-0.0", "[" + "[]," * 500 + "[]]"),
]


@pytest.mark.parametrize("number", range(len(ODD_BUT_SOUND)))
def test_odd_files_come_back_whole(tmp_path, number):
    from ema_jax.judge import judge_rows, read_rows
    from ema_jax.runtime.files import read_jsonl, write_jsonl

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(ODD_BUT_SOUND[number])
    rows = read_rows(str(source))
    assert rows
    assert all(row["prompt"] == "a" for row in rows)
    write_jsonl(target, judge_rows(get_judge("lexical"), rows))
    back = read_jsonl(target)
    assert [{key: row[key] for key in rows[0]} for row in back] == rows


def test_the_command_says_it_in_one_line_and_writes_nothing(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for kind in ("an unpaired surrogate", "is no JSON", "a number too large"):
        source.write_bytes(GOOD + b"\n" + UNWRITABLE[kind][0])
        done = _run(f"--input={source}", f"--output={target}")
        assert done.returncode == 2
        assert done.stderr == f"error: {source}:2: not valid JSON ({done.stderr.split(' (', 1)[1]}"
        assert kind in done.stderr
        assert done.stderr.count("\n") == 1
        assert not target.exists()


def test_an_output_that_cannot_be_written_is_named_before_judging(tmp_path):
    from ema_jax.runtime import files

    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    bad = ["folder", "file/out.jsonl", "file/deep/out.jsonl", "x" * 256, "new/" + "y" * 240, "a\0b"]
    for name in bad:
        with pytest.raises(UserError, match=r"is a folder|cannot be written") as caught:
            files.check_writable(tmp_path / name)
        assert "\n" not in str(caught.value)
    for name in ("file", "out.jsonl", "new/deep/out.jsonl"):
        files.check_writable(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}

    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD)
    done = _run(f"--input={source}", f"--output={tmp_path}/file/out.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/file/out.jsonl: cannot be written (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=x"], "--output is required"),
        (["--nonsense=1", "--input=x", "--output=y"], "Unknown command line flag 'nonsense'"),
        (["--judge=coin", "--input=x", "--output=y"], "--judge=coin"),
        (["--input=x", "--output=y", "stray"], "unexpected argument 'stray'"),
        (["--input=/nowhere/x.jsonl", "--output=/nowhere/y"], "/nowhere/x.jsonl: no such file"),
    ],
)
def test_bad_flags_end_in_one_line_and_exit_2(flags, message):
    done = _run(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


MAIN = """
import sys
from ema_jax.runtime import cli
from ema_jax.errors import RunStoppedError, UserError

def main(argv):
    raise {"user": UserError("bad\\nthing"), "stop": RunStoppedError("loss is not finite"),
           "key": KeyboardInterrupt(), "full": OSError(28, "No space left on device", "disk"),
           "path": PermissionError(13, "Permission denied", "there"), "bug": ZeroDivisionError(),
           }[KIND]

cli.run(main)
"""


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("user", 2, "error: bad\\nthing\n"),
        ("stop", 3, "stopped: loss is not finite\n"),
        (
            "key",
            3,
            "stopped: asked to stop (Ctrl-C); what it was writing is not there; the same "
            "command starts again\n",
        ),
        (
            "full",
            3,
            "stopped: disk: No space left on device; what it was writing is not there; the same "
            "command starts again, once there is room\n",
        ),
        ("path", 2, "error: there: Permission denied\n"),
        ("bug", 1, None),
    ],
)
def test_exit_codes(kind, code, line):
    script = f"KIND = {kind!r}\n" + MAIN
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr == line if line else "Traceback" in done.stderr


def test_log_lines_are_ours_short_and_without_jax():
    script = """
import logging as stdlib, sys
from absl import logging
from ema_jax.runtime import cli, progress

def main(argv):
    stdlib.getLogger("library").info("chatter")
    logging.warning("look out")
    with progress.Progress("work", 1) as bar:
        bar.update()
    assert "jax" not in sys.modules

cli.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stderr.splitlines()]
    assert [rest for _, rest in lines] == ["warning: look out", "work: 1/1 it, 0 s"]
    assert all(len(time) == 8 and time.count(":") == 2 for time, _ in lines)
