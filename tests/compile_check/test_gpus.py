"""GPUs by XLA's compiler alone: names, target configurations, and kernels read from HLO text."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ema_jax.compile_check import kernels, roofline, topology
from ema_jax.compile_check.gpus import CARDS
from ema_jax.compile_check.kernels import Kernel
from ema_jax.errors import UserError
from ema_jax.runtime.devices import GPUS, find_accelerator

ROOT = Path(__file__).parents[2]
PLUGIN = importlib.util.find_spec("jax_cuda13_plugin")


@pytest.fixture
def plugin(monkeypatch):
    """In place of the CUDA plugin: it is there, and has as many devices as it is asked for."""
    from jax.experimental import topologies

    asked = {}

    def describe(platform, **options):
        asked.update(options, platform=platform)
        count = int(options["topology"].split("x")[-1])
        return topologies.TopologyDescription(jax.devices()[:count])

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    return asked


@pytest.mark.parametrize(
    ("name", "card", "count"),
    [
        ("h100", "h100", 1),
        ("h100:8", "h100", 8),
        ("h200:4", "h200", 4),
        ("a100", "a100", 1),
        ("a100-40gb:2", "a100-40gb", 2),
    ],
)
def test_cards_by_name(plugin, name, card, count):
    found = topology.find(name)
    assert (found.card, found.chips, len(found.devices)) == (CARDS[card], count, count)
    assert found.devices_per_chip == 1
    assert found.chip is CARDS[card].sheet
    assert found.capacity_gib == CARDS[card].memory_gib
    assert found.compiler_options("folder") == {"xla_gpu_autotune_level": "0"}
    assert plugin["platform"] == "cuda"
    assert plugin["topology"] == f"1x1x{count}"
    assert plugin["target_config"] == CARDS[card].target_config()


@pytest.mark.parametrize(
    "name", ["h300", "h100:0", "h100:", "h100:2x2", "v5e", "v5e:8", "H100", ""]
)
def test_other_names_are_refused(plugin, name):
    with pytest.raises(UserError, match=f"{name!r} is no topology; .*v5e:4x4.*h100:8") as error:
        topology.find(name)
    assert "\n" not in str(error.value)


def test_without_the_plugin_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"-e '\.\[cuda-check\]' with Python 3\.12") as error:
        topology.find("h100")
    assert "\n" not in str(error.value)


def test_a_plugin_that_cannot_is_named_by_its_reason(plugin, monkeypatch):
    from jax.experimental import topologies

    def describe(**options):
        raise NotImplementedError("UNIMPLEMENTED: no topologies\nsecond line")

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    with pytest.raises(UserError, match=r"\(UNIMPLEMENTED: no topologies\)"):
        topology.find("h100")


@pytest.mark.parametrize(("name", "card"), CARDS.items())
def test_target_configurations(name, card):
    """Fields that the text format would refuse, or the compiler would read as zero, are none."""
    text = card.target_config()
    assert text.count("{") == text.count("}")
    fields = dict(re.findall(r"(\w+): (\S+)", text))
    assert "0" not in {fields[key] for key in fields if key not in ("major", "minor")}
    assert int(fields["device_memory_size"]) == card.memory
    # Less than the label says, which counts in powers of two or of ten.
    assert 0.93 * card.sheet.hbm_gib < card.memory_gib < 1.01 * card.sheet.hbm_gib
    assert int(fields["shared_memory_per_block_optin"]) < int(fields["shared_memory_per_core"])
    assert find_accelerator(card.name) is card.sheet, name


def test_peaks_are_those_of_the_multiprocessors():
    """FLOP/s of the data sheets from cores and clocks: 1,024 and 512 multiply-adds a core."""
    for name, operations, clock in (("h100", 4096, 1.83e9), ("a100", 2048, 1.41e9)):
        card = CARDS[name]
        assert card.cores * 2 * operations / 2 * clock == pytest.approx(card.sheet.flops, rel=0.01)


def test_flops_of_a_loop_are_multiplied_out():
    """Seven products of [6, 5] with [5, 5], and one of [6, 5] with [5, 4]."""

    def program(x, w, v):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)
        return x @ v

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((6, 5), (5, 5), (5, 4))]
    found = kernels.read(jax.jit(program).lower(*shapes).compile().as_text())
    # Products of float32 count twice.
    assert sum(one.times * one.flops for one in found) == 2 * 2 * (7 * 6 * 5 * 5 + 6 * 5 * 4)


GPU_TEXT = """HloModule jit_f

%fused_product (p0: bf16[4,16,8], p1: bf16[32,16], p2: s32[]) -> bf16[32,8] {
  %p0 = bf16[4,16,8]{2,1,0} parameter(0)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,16,8]{2,1,0} dynamic-slice(%p0, %p2, %zero, %zero), dynamic_slice_sizes={1,16,8}
  %weights = bf16[16,8]{1,0} bitcast(%slice)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot = bf16[32,8]{1,0} dot(%p1, %weights), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_update (q0: f32[4,32,8], q1: bf16[32,8], q2: s32[]) -> f32[4,32,8] {
  %q0 = f32[4,32,8]{2,1,0} parameter(0)
  %q1 = bf16[32,8]{1,0} parameter(1)
  %wide = f32[1,32,8]{2,1,0} convert(%q1)
  %q2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[4,32,8]{2,1,0} dynamic-update-slice(%q0, %wide, %q2, %zero.1, %zero.1)
}

%body (t: CARRY) -> CARRY {
  %t = CARRY parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = bf16[4,16,8]{2,1,0} get-tuple-element(%t), index=1
  %x = bf16[32,16]{1,0} get-tuple-element(%t), index=2
  %y = f32[4,32,8]{2,1,0} get-tuple-element(%t), index=3
  %gemm_fusion = bf16[32,8]{1,0} fusion(%w, %x, %i), kind=kCustom, calls=%fused_product
  %loop_fusion = f32[4,32,8]{2,1,0} fusion(%y, %gemm_fusion, %i), kind=kLoop, calls=%fused_update
  ROOT %after = CARRY tuple(%i, %w, %x, %loop_fusion)
}

%condition (t: CARRY) -> pred[] {
  %limit = s32[] constant(4)
  ROOT %compare = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (w: bf16[4,16,8], x: bf16[32,16], y: f32[4,32,8]) -> f32[32,32] {
  %w.1 = bf16[4,16,8]{2,1,0} parameter(0)
  %x.1 = bf16[32,16]{1,0} parameter(1)
  %y.1 = f32[4,32,8]{2,1,0} parameter(2)
  %start = CARRY tuple(%w.1, %x.1, %y.1)
  %while = CARRY while(%start), condition=%condition, body=%body
  %out = f32[4,32,8]{2,1,0} get-tuple-element(%while), index=3
  %flat = f32[32,32]{1,0} bitcast(%out)
  %cublas = (f32[32,32]{1,0}, s8[4194304]{0}) custom-call(%flat, %flat), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %result = f32[32,32]{1,0} get-tuple-element(%cublas), index=0
}
""".replace("CARRY", "(s32[], bf16[4,16,8]{2,1,0}, bf16[32,16]{1,0}, f32[4,32,8]{2,1,0})")


def test_kernels_as_a_gpu_program_writes_them():
    """Slices of stacked weights, results changed in place, and a product of cuBLAS."""
    assert {one.name: one for one in kernels.read(GPU_TEXT)} == {
        # 16 × 8 weights, 32 × 16 rows and 32 × 8 results in two bytes, an index in four.
        "gemm_fusion": Kernel("gemm_fusion", 2 * 32 * 16 * 8, 2 * (128 + 512 + 256) + 4, 4),
        # 32 × 8 results in two bytes and in four.
        "loop_fusion": Kernel("loop_fusion", 0, 256 * 2 + 256 * 4 + 4, 4),
        # Of float32, so twice as long; its scratch space is not counted.
        "cublas": Kernel("cublas", 2 * 2 * 32**3, 3 * 32 * 32 * 4, 1),
    }


def test_the_bound_of_kernels_is_by_what_limits_each():
    chip = GPUS["h100"]
    second = int(chip.hbm_bandwidth)
    found = [
        Kernel("product", chip.flops, second // 2, 2),
        Kernel("copy", 0.0, second, 3),
    ]
    bound = roofline.kernel_bound(found, chip)
    assert bound["seconds"] == pytest.approx(2 + 3)
    assert bound["seconds_by_bytes"] == pytest.approx(3)
    assert bound["flops"] == 2 * chip.flops
    assert bound["bytes"] == 2 * (second // 2) + 3 * second


@pytest.mark.slow
@pytest.mark.skipif(PLUGIN is None, reason="without the extra cuda-check nothing compiles for GPUs")
def test_a_tiny_study_compiles_for_a_gpu():
    arguments = ("--config=configs/tiny.py", "--topology=h100", "--prompt_tokens=16")
    done = subprocess.run(
        [sys.executable, "-m", "ema_jax.compile_check", *arguments, "--programs=train"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["fits"]
    assert made["chips"] == 1
    assert made["collectives"] == {}
    assert 0 < made["kernels"]["seconds"] < 1
    assert made["kernels"]["flops"] == pytest.approx(made["bound"]["compute"] * 989e12, rel=0.3)
