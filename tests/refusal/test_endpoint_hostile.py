"""The endpoint judge against servers that never come to an end, and settings without measure."""

import itertools
import json
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from test_endpoint_judge import ANSWER, FAST, KEY, Server, drip, judge_at, rows_of

from ema_jax import judge
from ema_jax.errors import RunStoppedError, UserError
from ema_jax.refusal.endpoint import pace
from ema_jax.refusal.judges import get_judge

OK = b"HTTP/1.1 200 OK\r\n"
JSON = OK + b"Content-Type: application/json\r\n"
# What is sent at once, and then one piece after another for as long as the client listens.
ENDLESS = {
    "nothing": (b"", b""),
    "status line": (b"", b"H"),
    "reason": (b"HTTP/1.1 200 ", b"O"),
    "headers": (OK, b"X-A: b\r\n"),
    "a header": (OK + b"X-A: ", b"b"),
    "a folded header": (OK + b"X-A: b\r\n", b" b\r\n"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "103 Early Hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"),
    "body": (JSON + b"Content-Length: 999\r\n\r\n", b" "),
    "body without length": (JSON + b"\r\n", b" "),
    "chunks": (JSON + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "trailers": (JSON + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: b\r\n"),
    "error body": (b"HTTP/1.1 503 No\r\nContent-Length: 999\r\n\r\n", b" "),
    "handshake": (b"\x16\x03\x03\x40\x00\x02", b"\x00"),
}


class Endless:
    """Sends the pieces of `ENDLESS` to everybody, for at most ten seconds."""

    def __init__(self, first, piece):
        self._first, self._piece = first, piece
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._send, args=(connection,), daemon=True).start()

    def _send(self, connection):
        with connection:
            try:
                connection.sendall(self._first)
                for _ in range(200):
                    time.sleep(0.05)
                    connection.sendall(self._piece)
            except OSError:
                pass

    def close(self):
        self._socket.close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_request_ends_in_time_whatever_the_server_sends(name):
    server = Endless(*ENDLESS[name])
    scheme = "https" if name == "handshake" else "http"
    options = FAST | {"max_retries": 0, "url": f"{scheme}://127.0.0.1:{server.port}/v1"}
    before = time.monotonic()
    with pytest.raises(RunStoppedError, match="no answer after 1 attempt") as stopped:
        get_judge("endpoint", model="m", **options)(rows_of(ANSWER))
    assert 0.3 < time.monotonic() - before < 5  # of 0.4
    assert "takes too long" in str(stopped.value) or "503" in str(stopped.value)
    server.close()


def test_the_next_attempt_has_a_time_and_a_connection_of_its_own():
    server = Server()
    server.faults = [drip, drip]
    rows = rows_of(*[f"{ANSWER} {i}" for i in range(6)])
    judge = judge_at(server, concurrency=3)
    assert [v.verdict for v in judge(rows)] == ["complied"] * 6
    assert len(server.requests) == 8
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("inf", float("inf")),
        ("1e999", float("inf")),
        ("9" * 400, float("inf")),
        ("99999999999", 99999999999.0),
        ("nan", 0.0),
        ("-inf", 0.0),
        ("-99999999999", 0.0),
        ("Fri, 31 Dec 99999999999 23:59:59 GMT", None),
        ("Fri, 31 Dec 10000 23:59:59 GMT", None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 2.5e11),
        ("Fri, 31 Dec 9999 23:59:59 -2359", None),
        ("Mon, 01 Jan 0001 00:00:00 +2359", None),
        ("Fri, 31 Feb 2030 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 2030 99:99:99 GMT", 0.0),
        ("Fri, 31 Dec 2030 23:59:59 +99999999999", None),
        ("0, 0", 0.0),
        (",", 0.0),
        ("\x00", 0.0),
        ("٣", 3.0),
    ],
)
def test_waits_without_measure(text, seconds):
    found = pace.retry_after({"Retry-After": text})
    assert found >= 0
    assert seconds is None or found == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("text", ["inf", "99999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_wait_beyond_measure_stops_the_run_at_once(text):
    server = Server()
    server.always = lambda handler, _: handler.send(429, {}, [("Retry-After", text)])
    with pytest.raises(RunStoppedError, match="no answer after 1 attempt"):
        judge_at(server)(rows_of(ANSWER))
    server.shutdown()
    server.server_close()


URLS = [
    "https://a..b/v1",
    "https://.example.org/v1",
    "https://" + "a" * 64 + ".org/v1",
    "https://" + "a." * 200 + "org/v1",
    "https://exam ple.org/v1",
    "https://exam\x00ple.org/v1",
    "https://exam\nple.org/v1",
    "https://exam\udcffple.org/v1",
    "https://example.org/\ud800/v1",
    "https://example.org/v\x001",
    "https://example.org/" + "v" * 70_000,
    "https://example.org:0/v1",
    "https://example.org:99999/v1",
    "https://[::1]]/v1",
    "https://xn--\u00e9.org/v1",
    "https://\u2100.org/v1",
    "https://-\u00e9-.org/v1",
]


@pytest.mark.parametrize("url", URLS)
def test_hosts_and_paths_that_cannot_be_encoded_are_refused(url):
    with pytest.raises(UserError, match="url is malformed") as error:
        get_judge("endpoint", model="m", url=url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_private_host_that_cannot_be_encoded_is_refused(host):
    with pytest.raises(UserError, match="url is malformed"):
        get_judge("endpoint", model="m", url=f"http://{host}/v1", allow_http_host=host)


NUMBERS = {
    "timeout": (1e300, 1e10, 86_401.0, float("inf"), float("nan"), 0.0, -1.0),
    "requests_per_minute": (1e-300, 1e-5, 5e-324, float("inf"), float("nan"), -1.0),
    "backoff": (1e300, 1e10, float("inf"), float("nan"), -1.0),
    "concurrency": (0, -1, 1001, 10**30),
    "max_retries": (-1,),
}


@pytest.mark.parametrize(
    ("option", "value"),
    [pair for name, many in NUMBERS.items() for pair in itertools.product([name], many)],
)
def test_numbers_without_measure_are_refused(option, value):
    with pytest.raises(UserError, match=option):
        get_judge("endpoint", model="m", **{option: value})


@pytest.mark.parametrize(
    "body", [{"a": float("nan")}, {"a": float("inf")}, {"a": {1}}, {"a": object()}, {(1, 2): 1}]
)
def test_fields_that_are_no_json_are_refused(body):
    with pytest.raises(UserError, match="extra_body is no JSON object"):
        get_judge("endpoint", model="m", extra_body=body)


SCRIPTS = {
    "latin": "LATIN",
    " Latin ": "LATIN",
    "Cyrillic": "CYRILLIC",
    "cjk": "CJK",
    "old  italic": "OLD ITALIC",
    "hangul": "HANGUL",
    "Latn": "did you mean LATIN",
    "English": "did you mean LATIN",
    "Latni": "did you mean LATIN",
    "cyrilic": "did you mean CYRILLIC",
    "Han": "did you mean CJK",
    "Japanese": "did you mean HIRAGANA",
    "klingon": "script 'klingon' is no script's name",
    "any": "null accepts any",
    "": "null accepts any",
    "L": "is no script's name",
    "OHM": "is no script's name",
    "LATIN SMALL LETTER A": "is no script's name",
    "xyz\n" * 50: "is no script's name",
}


@pytest.mark.parametrize("given", SCRIPTS)
@pytest.mark.parametrize("judge", ["lexical", "endpoint"])
def test_scripts_are_those_of_unicode(given, judge):
    options = {"model": "m"} if judge == "endpoint" else {}
    expected = SCRIPTS[given]
    if expected.isupper():
        assert get_judge(judge, script=given, **options).script == expected
        return
    with pytest.raises(UserError, match=expected) as error:
        get_judge(judge, script=given, **options)
    assert "\n" not in str(error.value)


def test_any_script_and_another_one():
    rows = [{"prompt": "", "response": text} for text in ("Это русский ответ.", ANSWER)]
    for script, reasons in ((None, [False, False]), ("null", [False, False])):
        found = get_judge("lexical", script=script)(rows)
        assert [v.reason == "script" for v in found] == reasons
    found = get_judge("lexical", script="cyrillic")(rows)
    assert [v.reason == "script" for v in found] == [False, True]


PATHS = {
    "folder": "is a folder",
    "pipe": "is no regular file",
    "link to a pipe": "is no regular file",
    "link to a folder": "is a folder",
    "/dev/null": "is no regular file",
    "file/out.jsonl": "cannot be written",
    "/proc/out.jsonl": "cannot be written",
    "x" * 256: "is too long for a path",
    "x" * 250: "cannot be written",
    "x" * 300 + "/out.jsonl": "is too long for a path",
    "a\0b": "holds a null character",
    "in.jsonl": "is the input or the output",
    "./in.jsonl": "is the input or the output",
    "out.jsonl": "is the input or the output",
}


class Flags(dict):
    """Flags of a command without the command line."""

    def __getattr__(self, name):
        return self.get(name)

    def __getitem__(self, name):
        return SimpleNamespace(value=self.get(name))


@pytest.mark.parametrize("flag", ["output", "cache"])
@pytest.mark.parametrize("name", PATHS)
def test_a_place_that_cannot_be_written_is_named_before_anything_is_asked(
    tmp_path, monkeypatch, name, flag
):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to a pipe").symlink_to("pipe")
    (tmp_path / "link to a folder").symlink_to("folder")
    (tmp_path / "file").write_text("")
    row = {"prompt": "Why?", "response": ANSWER}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    if flag == "output" and PATHS[name] == "is the input or the output":
        return  # the output may replace the input
    server = Server()
    options = {"model": "m", "url": server.url}
    paths = {"input": "in.jsonl", "output": "out.jsonl", flag: name}
    flags = {key: str(tmp_path / value) for key, value in paths.items()}
    given = {"cache": None, "sample": None, "overwrite": True, "judge": "endpoint"}
    given |= flags | {"judge_options": json.dumps(options)}
    monkeypatch.setattr(judge.flags, "FLAGS", Flags(given))
    with pytest.raises(UserError, match=PATHS[name]) as error:
        judge.main([])
    assert "\n" not in str(error.value)
    assert not server.requests
    server.shutdown()
    server.server_close()
