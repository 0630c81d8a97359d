"""A prompt set of the hub where there is no network."""

import socket
import time

import datasets
import huggingface_hub
import pytest

from ema_jax.data import public_sets
from ema_jax.errors import UserError


@pytest.mark.parametrize("kind", ["refused", "unknown host", "offline"])
def test_a_set_out_of_reach_is_said_in_seconds(monkeypatch, tmp_path, kind):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    host = {"refused": f"127.0.0.1:{port}"}.get(kind, "no-such-host.invalid")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://{host}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", kind == "offline")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", kind == "offline")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    before = time.monotonic()
    with pytest.raises(UserError, match=r"cannot load .*check the network"):
        public_sets.load_rows("xstest", ["benign"])
    assert time.monotonic() - before < 10
    assert datasets.config.HF_HUB_OFFLINE is (kind == "offline")
