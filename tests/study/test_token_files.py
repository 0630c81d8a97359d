"""All that decides a token belongs to a study's identity; folders of before that resume."""

import json
import shutil

import pytest
from finished_study import contents, sketch

from ema_jax.errors import UserError
from ema_jax.models import checkpoint, hub
from ema_jax.organism import CHECKPOINTS
from ema_jax.study.pipeline import SHARED


def _write(name, text="{}"):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


def _edit(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


CHANGES = {
    "template": lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].content }}"),
    "no template": lambda f: (f / "chat_template.jinja").unlink(),
    "old template file": _write("chat_template.json"),
    "further template": _write("additional_chat_templates/tool.jinja"),
    "tokenizer config": _edit("tokenizer_config.json", add_bos_token=True),
    "special tokens": _write("special_tokens_map.json"),
    "added tokens": _write("added_tokens.json"),
    "tokenizer": _edit("tokenizer.json", truncation=None, version="2.0"),
    "generation config": _edit("generation_config.json", eos_token_id=1),
    "no generation config": lambda f: (f / "generation_config.json").unlink(),
    "config": _edit("config.json", eos_token_id=1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_fingerprint_covers_all_that_decides_a_token(tmp_path, name):
    folder = shutil.copytree(CHECKPOINTS / "qwen2", tmp_path / "model")
    before = checkpoint.fingerprint(folder)
    assert before == checkpoint.fingerprint(CHECKPOINTS / "qwen2")
    CHANGES[name](folder)
    assert checkpoint.fingerprint(folder) != before


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "notes.txt"])
def test_what_decides_no_token_does_not_change_it(tmp_path, name):
    folder = shutil.copytree(CHECKPOINTS / "qwen2", tmp_path / "model")
    (folder / name).write_text("x")
    assert checkpoint.fingerprint(folder) == checkpoint.fingerprint(CHECKPOINTS / "qwen2")


def test_a_source_knows_its_files():
    found = hub.find(str(CHECKPOINTS / "qwen2"))
    assert set(found.token_files) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    }
    assert found.weights_fingerprint == checkpoint.weights_fingerprint(found.folder)


FILES = {"tokenizer.json": "t", "chat_template.jinja": "old"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"token_files": FILES | {"chat_template.jinja": "new"}}, r"token_files\.chat_template"),
        ({"token_files": {"tokenizer.json": "t"}}, r"chat_template\.jinja = 'old'.*\(not set\)"),
        ({"token_files": FILES | {"merges.txt": "m"}}, r"merges\.txt = '\(not set\)'"),
        ({"revision": "b" * 40}, "model.revision = None"),
        ({"fingerprint": "g"}, "model.fingerprint = 'f'"),
    ],
)
@pytest.mark.parametrize("killed", ["concepts", "harvest", "unlearn/npo/seed_0"])
def test_a_change_between_two_stages_is_refused_and_named(tmp_path, change, named, killed):
    with pytest.raises(KeyboardInterrupt):
        sketch(tmp_path, killed=killed, token_files=FILES)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"holds another study.*{named}"):
        sketch(tmp_path, **{"token_files": FILES} | change)
    assert contents(tmp_path) == before
    assert sketch(tmp_path, token_files=FILES)[0] == killed


def _age(folder, fingerprint="w"):
    """Makes the manifests those of a version that recorded the first kind of fingerprint."""
    for path in (folder / "stages").glob("*.json"):
        manifest = json.loads(path.read_text())
        if model := manifest["settings"].get("model"):
            del model["token_files"], model["revision"]
            model["fingerprint"] = fingerprint
            path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("killed", ["concepts", "harvest", "evaluate/npo/seed_0", "report"])
def test_an_old_folder_resumes_and_says_what_was_not_recorded(tmp_path, caplog, killed):
    with pytest.raises(KeyboardInterrupt):
        sketch(tmp_path, killed=killed)
    _age(tmp_path)
    before = contents(tmp_path)
    assert sketch(tmp_path)[0] == killed
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before, "finished stages stay as they are"
    assert "finished before the chat template" in caplog.text
    assert "the stages baseline" in caplog.text
    assert "prompts" not in caplog.text.partition("were finished")[0].partition("stages ")[2]
    caplog.clear()
    assert sketch(tmp_path) == []
    assert contents(tmp_path) == after
    # What was made since is held to all of it.
    if killed != "report":
        with pytest.raises(UserError, match=r"token_files\.chat_template\.jinja = '\(not set\)'"):
            sketch(tmp_path, token_files={"tokenizer.json": "t", "chat_template.jinja": "new"})


def test_an_old_folder_of_another_model_is_refused(tmp_path):
    sketch(tmp_path)
    _age(tmp_path, fingerprint="another")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"model\.fingerprint = 'another'.*now says 'w'"):
        sketch(tmp_path)
    assert contents(tmp_path) == before


def test_a_new_folder_has_nothing_to_say(tmp_path, caplog):
    assert sketch(tmp_path)[: len(SHARED)] == list(SHARED)
    sketch(tmp_path)
    assert "recorded" not in caplog.text
