"""Links in checkpoint folders of others: nothing of this machine is read or copied through them."""

import os

import pytest

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, folder_links, lora

SECRET = "private"


@pytest.fixture
def cache(tmp_path):
    """A snapshot in a Hub's cache: all of its files are links into blobs."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for name in ("config.json", "merges.txt", "additional_chat_templates/x.jinja"):
        blob = snapshot.parents[1] / "blobs" / name.replace("/", "-")
        blob.write_text(name)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (tmp_path / SECRET).write_text(SECRET)
    return snapshot


def relinked(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


BAD = {
    "absolute": lambda f, s: relinked(f / "merges.txt", s),
    "relative": lambda f, s: relinked(f / "merges.txt", os.path.relpath(s, f)),
    "a name that is none of ours": lambda f, s: relinked(f / "notes.txt", s),
    "the weights": lambda f, s: relinked(f / "model.safetensors", s),
    "through a blob": lambda f, s: (relinked(f.parents[1] / "blobs" / "config.json", s),),
    "through two links": lambda f, s: (
        relinked(s.with_name("two"), s),
        relinked(f / "merges.txt", s.with_name("two")),
    ),
    "above blobs": lambda f, s: relinked(f / "merges.txt", "../../blobs/../../private"),
    "below blobs": lambda f, s: (
        (f.parents[1] / "blobs" / "sub").mkdir(),
        (f.parents[1] / "blobs" / "sub" / "x").write_text(""),
        relinked(f / "merges.txt", "../../blobs/sub/x"),
    ),
    "blobs of another model": lambda f, s: (
        (s.parent / "models--c--d" / "blobs").mkdir(parents=True),
        (s.parent / "models--c--d" / "blobs" / "x").write_text(""),
        relinked(f / "merges.txt", s.parent / "models--c--d" / "blobs" / "x"),
    ),
    "blobs that are a link": lambda f, s: (
        (f.parents[1] / "blobs").rename(s.parent / "elsewhere"),
        (f.parents[1] / "blobs").symlink_to(s.parent / "elsewhere"),
    ),
    "to itself": lambda f, s: relinked(f / "merges.txt", "merges.txt"),
    "to nothing": lambda f, s: relinked(f / "merges.txt", "/nowhere/x"),
    "to a device": lambda f, s: relinked(f / "merges.txt", "/dev/zero"),
    "a template": lambda f, s: relinked(f / "additional_chat_templates" / "x.jinja", s),
    "the folder of templates": lambda f, s: (
        (f / "additional_chat_templates" / "x.jinja").unlink(),
        (f / "additional_chat_templates").rmdir(),
        relinked(f / "additional_chat_templates", s.parent),
    ),
    "parameters": lambda f, s: relinked(f / "parameters", s.parent),
    "a folder in parameters": lambda f, s: (
        (f / "parameters").mkdir(),
        relinked(f / "parameters" / "d", s.parent),
    ),
    "a file in parameters": lambda f, s: (
        (f / "parameters" / "d").mkdir(parents=True),
        relinked(f / "parameters" / "d" / "x", s),
    ),
    "a pipe": lambda f, s: (f / "merges.txt").unlink() or os.mkfifo(f / "merges.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_by_name(cache, tmp_path, case):
    folder_links.check(cache)
    BAD[case](cache, tmp_path / SECRET)
    with pytest.raises(UserError, match=r"a link to|is a named pipe") as caught:
        folder_links.check(cache)
    assert "\n" not in str(caught.value)


def test_a_folder_may_be_a_link_and_hold_folders_that_are(cache, tmp_path):
    (cache / "logs").symlink_to(tmp_path)
    (tmp_path / "mine").symlink_to(cache)
    folder_links.check(tmp_path / "mine")


def test_nothing_is_read_or_copied_through_a_link(tiny, tmp_path):
    model = checkpoint.load(tiny("llama"))
    folder = tmp_path / "foreign"
    checkpoint.export(model, folder)
    (tmp_path / SECRET).write_text(SECRET)
    (folder / "merges.txt").symlink_to(tmp_path / SECRET)
    for act in (
        lambda: checkpoint.check(folder),
        lambda: checkpoint.load(folder),
        lambda: checkpoint.export(model, tmp_path / "out", companions=folder),
        lambda: checkpoint.save_flax(model, tmp_path / "out", companions=folder),
        lambda: lora.load_peft(model, folder),
    ):
        with pytest.raises(UserError, match=r"merges\.txt: a link to '.*private'"):
            act()
    assert not (tmp_path / "out").exists()
