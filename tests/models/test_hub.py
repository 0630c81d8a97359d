"""Hub ids through huggingface_hub's own client, against a small hub on this machine."""

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ema_jax.errors import UserError
from ema_jax.models import checkpoint
from ema_jax.models.hub import find, find_cached

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret0secret0secret0secret"


class Hub(http.server.ThreadingHTTPServer):
    """One repository, `owner/name`; notes what it is asked for and with which token."""

    def __init__(self, folder: Path):
        super().__init__(("localhost", 0), _Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.asked: list[tuple[str, str | None]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        if self.path.startswith("/api/models/owner/name/revision/"):
            revision = self.path.rpartition("/")[2]
            if revision not in ("main", COMMIT):
                return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            names = [{"rfilename": name} for name in self.server.files]
            body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": names}).encode()
            return self._answer(200, body, {"Content-Type": "application/json"})
        if self.path.startswith(f"/api/models/owner/name/tree/{COMMIT}"):
            listed = [
                {"type": "file", "path": name, "size": len(body), "oid": name}
                for name, body in self.server.files.items()
            ]
            body = json.dumps(listed).encode()
            return self._answer(200, body, {"Content-Type": "application/json"})
        if self.path.startswith("/api/models/owner/gated"):
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        folder, _, name = self.path.rpartition("/")
        if folder != f"/owner/name/resolve/{COMMIT}" or name not in self.server.files:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        return self._answer(
            200, self.server.files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{name}-1"'}
        )

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_model_is_known_by_its_name_and_contents_but_not_its_path(tiny):
    folder = tiny("llama")
    found = find(str(folder))
    assert (found.folder, found.revision, found.id) == (folder, None, "llama")
    assert found.fingerprint == checkpoint.fingerprint(folder)
    assert found.label == f"llama@{found.fingerprint[:12]}"
    assert found.config.family == "llama"
    assert find_cached(str(folder)) == found
    downloaded = dataclasses.replace(found, given="owner/name", revision="c0ffee")
    assert (downloaded.id, downloaded.label) == ("owner/name", "owner/name@c0ffee")
    with pytest.raises(UserError, match="no such folder"):
        find(str(folder / "none"))


RESOLVE = """
import sys
from absl import logging
logging.set_verbosity(logging.DEBUG)
from ema_jax.errors import UserError
from ema_jax.models import checkpoint, hub
assert hub.cached("owner/name", "main") is None
folder, commit = hub.resolve("owner/name", "main")
assert hub.cached("owner/name", commit) == (folder, commit)
print(checkpoint.load(folder).config.family, commit, folder)
for source, revision in (("owner/name", "v9"), ("owner/gated", None), ("owner/none", None)):
    try:
        hub.resolve(source, revision)
    except UserError as error:
        print(error)
"""


@pytest.fixture
def hub(tiny, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    for path in tiny("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("pytorch_model.bin", "modeling_custom.py", "consolidated.safetensors"):
        (folder / name).write_bytes(b"unwanted")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_id_is_pinned_to_its_commit_and_the_token_stays_secret(hub, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XLA_"))}
    environment |= {
        "HF_ENDPOINT": f"http://localhost:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
    }
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    loaded, no_revision, gated, nothing = done.stdout.splitlines()
    family, commit, folder = loaded.split()
    assert (family, commit) == ("llama", COMMIT)
    assert Path(folder).is_relative_to(tmp_path / "home")
    assert "no such revision" in no_revision
    assert "a gated model; accept its terms" in gated
    assert "nor such a model on the hub" in nothing
    assert {token for path, token in hub.asked if "/owner/" in path} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr
    asked = {path.rpartition("/")[2] for path, _ in hub.asked if "/resolve/" in path}
    assert asked == {"config.json", "generation_config.json", "model.safetensors"}
