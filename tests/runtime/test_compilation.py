"""Flags that XLA gets on a machine without an accelerator, and programs that are kept."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from ema_jax.runtime import compilation, hardware

LEVEL = "--xla_backend_optimization_level"


@pytest.mark.parametrize(
    ("given", "accelerator", "then"),
    [
        (None, False, f"{LEVEL}=1"),
        ("--xla_dump_to=x", False, f"--xla_dump_to=x {LEVEL}=1"),
        (f"{LEVEL}=3", False, f"{LEVEL}=3"),
        (None, True, None),
    ],
)
def test_a_cpu_compiles_quickly(monkeypatch, tmp_path, given, accelerator, then):
    monkeypatch.setattr(hardware, "_GPU_DEVICES", (f"{tmp_path}/nvidia[0-9]*",))
    if accelerator:
        (tmp_path / "nvidia0").touch()
    environment = {} if given is None else {"XLA_FLAGS": given}
    monkeypatch.setattr(compilation.os, "environ", environment)
    compilation.compile_quickly()
    assert environment == ({} if then is None else {"XLA_FLAGS": then})


def test_a_program_that_took_less_than_jax_asks_for_is_kept(tmp_path):
    assert compilation._WORTH_KEEPING < 1
    script = f"""
        from pathlib import Path
        from ema_jax.runtime import compilation
        compilation._WORTH_KEEPING = 0.0
        compilation.keep_programs(Path({str(tmp_path)!r}))
        import jax
        jax.jit(lambda x: x + 1)(1.0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    assert any(tmp_path.glob("*-cache"))


@pytest.mark.parametrize(
    ("given", "folder", "least"),
    [
        ({}, "HOME/.cache/ema_jax/xla", compilation._WORTH_KEEPING),
        ({"JAX_COMPILATION_CACHE_DIR": "gs://a/b"}, "gs://a/b", compilation._WORTH_KEEPING),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, "", compilation._WORTH_KEEPING),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3"}, "HOME/.cache/ema_jax/xla", 3.0),
    ],
)
def test_what_jax_is_told_of_programs_stands(tmp_path, given, folder, least):
    script = """
        import json, jax
        from ema_jax.runtime import cli
        cli.keep_compiled_programs()
        config = jax.config
        print(json.dumps([
            config.jax_compilation_cache_dir or "",
            config.jax_persistent_cache_min_compile_time_secs,
        ]))
    """
    own = {k: v for k, v in os.environ.items() if "CACHE" not in k} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=own | given,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert json.loads(done.stdout) == [folder.replace("HOME", str(tmp_path)), least]
