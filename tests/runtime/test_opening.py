"""Whatever may stand in a file's place is named in one line, and nothing waits for it."""

import os
import socket

import pytest

from ema_jax.errors import UserError
from ema_jax.refusal.endpoint.answer_cache import AnswerCache
from ema_jax.refusal.sheet import read_sheet
from ema_jax.runtime.append_log import AppendLog
from ema_jax.runtime.files import (
    check_folder,
    check_writable,
    numbered_rows,
    read_json,
    read_tensors,
    sha256_file,
)
from ema_jax.runtime.leases import Holder
from ema_jax.runtime.opening import open_file, read_bytes


def _socket(path):
    # Its name may have 107 characters at most.
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def _loop(path):
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


PLACES = {
    "nothing": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "is a folder, and a file is needed"),
    "a pipe": (lambda path: os.mkfifo(path), "is a named pipe"),
    "a link to a pipe": (
        lambda path: (os.mkfifo(path.with_name("p")), path.symlink_to("p")),
        "is a named pipe",
    ),
    "a socket": (_socket, "is a socket"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "a device of blocks of nothing": (lambda path: path.symlink_to("/dev/null"), "is a device"),
    "a link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "two links to each other": (_loop, "symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "no such file"),
    "other capitals": (
        lambda path: path.with_name("NAME").write_text("{}"),
        r"no such file \(but NAME: rename it to name\)",
    ),
}
READERS = {
    "open": open_file,
    "bytes": read_bytes,
    "json": read_json,
    "rows": lambda path: list(numbered_rows(path)),
    "tensors": read_tensors,
    "hash": sha256_file,
    "labels": read_sheet,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", PLACES)
def test_what_stands_in_a_files_place_is_named(tmp_path, place, reader):
    put, said = PLACES[place]
    path = tmp_path / "name"
    put(path)
    with pytest.raises(UserError, match=said) as caught:
        READERS[reader](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000 + "b", "nul\0l", "\udcff/x", "f/x"])
@pytest.mark.parametrize("reader", READERS)
def test_names_that_cannot_be(tmp_path, name, reader):
    (tmp_path / "f").write_text("{}")
    with pytest.raises(UserError):
        READERS[reader](tmp_path / name)


@pytest.mark.parametrize("place", [name for name in PLACES if PLACES[name][1][:2] != "no"])
def test_a_log_is_a_file(tmp_path, place):
    PLACES[place][0](tmp_path / "name")
    for log in (AppendLog, AnswerCache):
        with pytest.raises(UserError, match=PLACES[place][1]):
            log(tmp_path / "name")


NO_FOLDERS = {
    "a file": "file",
    "below a file": "file/x/y",
    "in the list of processes": "/proc/x",
    "of the kernel": "/sys/x/y",
    "a device": "/dev/null",
    "below a device": "/dev/null/x",
    "a name too long": "a" * 300,
    "a name too long with what is added to it": "a" * 240,
    "a path too long": "a/" * 3000,
    "a part too long": f"x/{'a' * 300}/y",
    "a null": "x\0y",
    "a link to itself": "loop",
    "below a link to itself": "loop/x",
    "a link to nothing": "gone",
}


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_folders_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    path = tmp_path / NO_FOLDERS[name]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot be written"):
        check_folder(path)
    if name != "a name too long with what is added to it":  # a folder may have it
        with pytest.raises(UserError, match="cannot be written"):
            check_writable(path / "x")
    assert sorted(tmp_path.iterdir()) == before


def test_a_check_of_a_folder_leaves_nothing(tmp_path):
    check_folder(tmp_path / "new" / "deep")
    check_folder(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "[" * 100_000, '{"host": NaN}', "9" * 5000, '"\\ud800"', "\0", "{"]
)
def test_a_lease_of_another_kind_has_no_holder(text):
    assert Holder.read(text) is None
