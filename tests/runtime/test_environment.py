"""Faults of the environment are one line and exit code 2, a full disk is one and 3."""

import errno
import os

import jax
import pytest

from ema_jax.errors import UserError
from ema_jax.runtime import cli

XLA_BRIDGE, CONFIG = "/x/jax/_src/xla_bridge.py", "/x/jax/_src/config.py"


def raised(where: str, error: Exception) -> None:
    """Raises as if in a file."""
    exec(compile("raise error", where, "exec"), {"error": error})


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs a command that fails, and gives its exit code and its line."""

    def run(error, where="x.py"):
        monkeypatch.setattr(cli.signals, "raise_on_signals", lambda: None)
        monkeypatch.setattr(cli.app, "run", lambda *a, **k: raised(where, error))
        with pytest.raises(SystemExit) as left:
            cli.run(lambda argv: None, kept="all is kept")
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return left.value.code, said

    return run


# As JAX 0.10 says it; without a message for CUDA that finds no driver.
BACKENDS = {
    "nonexistent": RuntimeError(
        "Unable to initialize backend 'nonexistent': Backend 'nonexistent' is not in the list of "
        "known backends: ['cpu', 'tpu']. (set JAX_PLATFORMS='' to automatically choose one)"
    ),
    "CPU": RuntimeError("Unable to initialize backend 'CPU': Backend 'CPU' is not in the list"),
    " cpu": RuntimeError("Unable to initialize backend ' cpu': Backend ' cpu' is not known"),
    "cpu,typo": RuntimeError("Unable to initialize backend 'typo': it is not in the list"),
    ",": RuntimeError("Unable to initialize backend '': Backend '' is not in the list"),
    "cpu;gpu": RuntimeError("Unable to initialize backend 'cpu;gpu': it is not in the list"),
    "gpu": RuntimeError("Unable to initialize backend 'rocm': Backend 'rocm' is not in the list"),
    "tpu": RuntimeError("Unable to initialize backend 'tpu': ABORTED: Internal error\nwith more"),
    "cuda": AssertionError(),
    "metal": RuntimeError("Unknown backend metal. Available backends are ['cpu']"),
}


@pytest.mark.parametrize("platforms", BACKENDS)
def test_platforms_that_are_not_there(ended, monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    code, said = ended(BACKENDS[platforms], XLA_BRIDGE)
    assert code == 2
    assert f"error: JAX_PLATFORMS={platforms!r}" in said
    assert "JAX_PLATFORMS=cpu, cuda or tpu" in said


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("JAX_ENABLE_X64", "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
        ("JAX_DEBUG_NANS", "invalid truth value '2' for environment 'JAX_DEBUG_NANS'"),
        ("JAX_NUM_CPU_DEVICES", 'Invalid value "abc" for JAX flag jax_num_cpu_devices'),
        ("JAX_DEFAULT_MATMUL_PRECISION", 'Invalid value "x" for jax_default_matmul_precision'),
    ],
)
def test_variables_that_jax_refuses(ended, monkeypatch, name, error):
    monkeypatch.setenv(name, "x")
    code, said = ended(ValueError(error), CONFIG)
    assert code == 2
    assert f"correct {name} in the environment" in said
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="alue"):
        ended(ValueError(error), CONFIG)


@pytest.mark.parametrize(
    "said",
    [
        "Out of memory while trying to allocate 47202402304 bytes.",
        "Failed to allocate request for 13.50GiB (14495514624B) on device ordinal 0",
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.1G of 15G",
        "Error allocating device buffer: Attempting to allocate 8.00G. That was not possible.",
    ],
)
def test_a_full_device_says_what_is_kept_and_what_needs_less(ended, said):
    code, line = ended(jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}\nwith more"))
    assert code == 3
    assert line.startswith(f"stopped: the memory of a device is full ({said[:60]}")
    assert "; all is kept, with settings that need less (generation.batch_size" in line
    assert "with more)" not in line


@pytest.mark.parametrize("error", [RuntimeError("backend"), ValueError("x"), AssertionError("x")])
def test_a_bug_keeps_its_traceback(ended, error):
    with pytest.raises(type(error)):
        ended(error)


CODES = ("EROFS", "EACCES", "EPERM", "ENAMETOOLONG", "ELOOP", "EISDIR", "ENOTDIR", "EEXIST")
CODES += ("ENXIO", "ENODEV", "EIO", "ESTALE", "EMFILE", "ENOTEMPTY")


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", ["/a/file", None])
def test_errors_of_the_system(ended, code, name):
    number = getattr(errno, code)
    expected = f"error: {name or 'the disk'}: {os.strerror(number)}\n"
    assert ended(OSError(number, os.strerror(number), name)) == (2, expected)


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_full_disk_says_what_is_kept(ended, code):
    number = getattr(errno, code)
    exit_code, said = ended(OSError(number, os.strerror(number)))
    assert exit_code == 3
    assert said == f"stopped: the disk: {os.strerror(number)}; all is kept, once there is room\n"


def test_a_line_is_not_endless(ended):
    code, said = ended(UserError("x" * 10**6))
    assert code == 2
    assert len(said) < 1100


def test_a_missing_file_is_a_bug(ended):
    with pytest.raises(FileNotFoundError):
        ended(FileNotFoundError(errno.ENOENT, "No such file", "x"))
