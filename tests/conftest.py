"""Eight simulated CPU devices for every test, and tiny checkpoints made with transformers."""

import os
import signal

# Before anything starts JAX's backend; in the environment, so that subprocesses have them too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# As a study on a CPU is compiled (`runtime.compilation`) …
if "backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"
    ).strip()
# … but for what this turns off: most of a test is compilation, and hardly optimised code takes
# three quarters of the time to make. Where a test computes for longer: `optimised`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("ema_jax", "shapes.checked")

# A shell that starts the suite in the background has Ctrl-C ignored, and so would its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def optimised():
    """Compiles a module's programs as a study's, for tests that run them for long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the folder of a tiny random checkpoint, one of `tiny_models.VARIANTS`."""
    from tiny_models import write_checkpoint

    made: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("tiny") / variant
            write_checkpoint(variant, made[variant])
        return made[variant]

    return folder
