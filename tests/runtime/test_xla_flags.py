"""`XLA_FLAGS` that would end the process are one line."""

import subprocess

import pytest

from ema_jax.errors import UserError
from ema_jax.runtime import xla_flags

F = "F1127 00:33:09.096964   29889 parse_flags_from_env.cc:234] "
E = "E1127 00:34:45.924191   30467 command_line_flags.cc:63] "


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (f"{F}Unknown flag in XLA_FLAGS: --x\n*** Check failure ***\n @ 0", "Unknown flag in"),
        (
            f"{E}Couldn't interpret value a for flag y.\n{F}Check failed\nusage",
            "Couldn't interpret",
        ),
        (f"I1127 00:00:00.0 1 a.cc:1] hello\n{F}Could not open file", "Could not open file"),
        (
            "Traceback (most recent call last):\n  File x\nRuntimeError: Unable to start 'cpu': x "
            "(you may need to uninstall the failing plugin package)\n",
            "RuntimeError: Unable to start 'cpu': x",
        ),
        ("", "JAX does not start with it"),
    ],
)
def test_what_ended_the_process_is_found_in_its_log(log, said):
    assert xla_flags.complaint(log).startswith(said)


@pytest.mark.parametrize(
    ("flags", "tried"),
    [
        (None, False),
        ("", False),
        ("  ", False),
        ("--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0", False),
        ("--xla_force_host_platform_device_count=0", True),
        ("--xla_force_host_platform_device_count=abc", True),
        ("--xla_backend_optimization_level=7", True),
        ("--xla_force_host_platform_device_count=8 --xla_x", True),
        ("nonsense", True),
    ],
)
def test_flags_that_are_known_cost_no_process(monkeypatch, flags, tried):
    started = []

    def run(command, **options):
        started.append(options["env"]["JAX_PLATFORMS"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if flags is not None:
        monkeypatch.setenv("XLA_FLAGS", flags)
    xla_flags.check()
    assert started == ["cpu"] * tried


def test_flags_are_not_blamed_for_what_fails_without_them(monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ValueError: JAX_ENABLE_X64=perhaps")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    xla_flags.check()


def test_a_flag_that_xla_does_not_know(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_nonsense=1")
    with pytest.raises(UserError, match=r"XLA_FLAGS='--xla_nonsense=1': Unknown flag .*; correct"):
        xla_flags.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("nonsense", 'Could not open file "nonsense"'),
        ("--xla_force_host_platform_device_count=abc", "Couldn't interpret value abc for flag"),
        ("--xla_force_host_platform_device_count=0", "Unable to initialize backend 'cpu'"),
        ("--xla_cpu_enable_fast_math=perhaps", "Couldn't interpret value perhaps for flag"),
        ("--xla_gpu_nonsense", "Unknown flag in XLA_FLAGS: --xla_gpu_nonsense"),
        ("--xla_backend_optimization_level=1 --xla_x", "Unknown flag in XLA_FLAGS: --xla_x"),
        ("--xla_cpu_enable_fast_math=true", ""),
    ],
)
def test_what_xla_does_not_take_is_one_line(monkeypatch, flags, said):
    monkeypatch.setenv("XLA_FLAGS", flags)
    if not said:
        return xla_flags.check()
    with pytest.raises(UserError) as caught:
        xla_flags.check()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
