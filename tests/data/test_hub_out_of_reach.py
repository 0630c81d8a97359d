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


@pytest.mark.parametrize(
    ("made", "name", "found"),
    [
        ("bench-llm___or-bench/or-bench-toxic/0.0.0/0123/dataset_info.json", "or_bench", False),
        (
            "bench-llm___or-bench/or-bench-toxic/0.0.0/0123/dataset_info.json",
            "or_bench_toxic",
            True,
        ),
        ("Paul___xs_test/default/0.0.0/0123/dataset_info.json", "xstest", True),
        ("Paul___xs_test/default/0.0.0/0123.incomplete/part.arrow", "xstest", False),
    ],
)
def test_a_set_is_in_the_cache_once_all_of_its_own_part_is(
    monkeypatch, tmp_path, made, name, found
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / made).parent.mkdir(parents=True)
    (tmp_path / made).touch()
    assert public_sets.is_cached(name) is found
