"""A start on a machine without a TPU says nothing of one, with libtpu installed."""

import os
import subprocess
import sys

import pytest

from ema_jax.runtime import cli, hardware

SCRIPT = "from ema_jax.runtime import cli; cli.quiet_libtpu(); import jax; print(jax.devices())"


def test_libtpu_is_quiet():
    # Another process may hold libtpu's lock, and then it would be quiet for that reason.
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name in ("JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout


@pytest.mark.parametrize("there", [True, False])
def test_a_tpus_own_settings_are_left_alone(monkeypatch, tmp_path, there):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(hardware, "_TPU_DEVICES", (f"{tmp_path}/accel*",) if there else ())
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    cli.quiet_libtpu()
    expected = {} if there else {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    assert os.environ == {"TPU_WORKER_HOSTNAMES": "mine"} | expected
