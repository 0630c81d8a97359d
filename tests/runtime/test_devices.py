"""The table of accelerators against the names that JAX gives to devices."""

import pytest

from ema_jax.runtime.devices import find_accelerator


@pytest.mark.parametrize(
    ("kind", "flops", "hbm_gib"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 80),
        ("NVIDIA H100 PCIe", 756e12, 80),
        ("NVIDIA H200", 989e12, 141),
        ("NVIDIA A100-SXM4-40GB", 312e12, 40),
        ("NVIDIA A100-SXM4-80GB", 312e12, 80),
        ("NVIDIA A100 80GB PCIe", 312e12, 80),
        ("TPU v4", 275e12, 32),
        ("TPU v5 lite", 197e12, 16),
        ("TPU v5", 459e12, 95),
        ("TPU v5p", 459e12, 95),
        ("TPU v6 lite", 918e12, 32),
    ],
)
def test_a_device_kind_finds_its_row(kind, flops, hbm_gib):
    found = find_accelerator(kind)
    assert (found.flops, found.hbm_gib) == (flops, hbm_gib)


def test_a_cpu_has_no_row():
    assert find_accelerator("cpu") is None
