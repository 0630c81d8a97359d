"""Compiling for TPU slices without a TPU, and what is read from what comes out."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked_commands import ForkedCommand
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_study import small_config

from ema_jax import config as ema
from ema_jax.compile_check import check, collectives, programs, roofline, topology
from ema_jax.compile_check.workload import Workload, architecture, resolved
from ema_jax.config import ModelConfig
from ema_jax.errors import UserError
from ema_jax.models.sharding import make_mesh
from ema_jax.runtime import devices

ROOT = Path(__file__).parents[2]
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"
SIZES = {
    MISTRAL: 7_248_023_552,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ema_jax.compile_check", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_tiny_study_compiles_for_a_slice(tmp_path):
    done = command(
        "--config=configs/tiny.py",
        "--topology=v5e:2x4",
        "--config.mesh=(1,4,2)",
        "--prompt_tokens=16",
        "--programs=train",
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["fits"], made["chips"], made["capacity_gib"]) == (True, 8, 16)
    assert made["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert set(made["programs"]) == {"train"}
    assert 0 < made["argument_gib"] < made["hbm_gib_per_chip"] < 1
    assert made["temp_gib"] >= 0
    assert made["compile_seconds"] > 0
    assert made["full_rematerialisations"] == 0
    assert {"all-gather", "all-reduce"} <= made["collectives"].keys()
    assert made["collectives"] == made["programs"]["train"]["collectives"]
    assert made["bound"]["seconds"] > 0


@pytest.fixture(scope="module")
def forked():
    late = ("ema_jax.compile_check.check", "ema_jax.compile_check.programs")
    command = ForkedCommand("ema_jax.compile_check", *late, XLA_FLAGS="")
    with contextlib.closing(command):
        yield command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=v9:4x4"], "v9:4x4"),
        (["--topology=v5e:3x5"], "does not describe it"),
        (["--topology=v5e:2x2", "--config.mesh=(3,1,1)"], "has 4 devices"),
        (["--topology=v5e:2x2", "--config.model.source=no/body"], "no/body"),
        (["--topology=v5e:2x2", "--programs=eat"], "--programs"),
    ],
)
def test_bad_input_is_refused(forked, arguments, said):
    done = forked("--config=configs/tiny.py", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert said in done.stderr


@pytest.mark.parametrize(("source", "count"), SIZES.items())
def test_known_sizes(source, count):
    """The number of parameters that the model's card gives, to the last one."""
    from flax import nnx

    from ema_jax.models.checkpoint import abstract_decoder

    config = architecture(ModelConfig(source=source))
    leaves = jax.tree.leaves(nnx.state(abstract_decoder(config)))
    assert sum(leaf.size for leaf in leaves) == count


def test_every_program_is_the_studys_own():
    """Its signatures, shapes and shardings; each is a program for all devices of the mesh."""
    mesh = make_mesh((1, 4, 2))
    work = resolved(Workload.of(ema.read(small_config()), 16), mesh)
    names = tuple(programs.PROGRAMS)
    assert len(names) == 7
    for name, program in programs.lowered(work, mesh, names):
        assert "num_partitions = 8" in program.as_text()[:500], name


def test_rows_of_drawn_lengths_are_those_that_training_packs():
    """The same examples in fewer tokens, and a step that costs so much less."""
    full, drawn = (Workload.of(ema.read(small_config()), 64, x) for x in ("full", "drawn"))
    assert full.step_batch(4).rows.tokens.shape == (1, 16, full.train_tokens)
    for groups in (1, 4):
        tokens = roofline.train_tokens(drawn, groups)
        assert 0.8 * tokens["padded"] < tokens["real"] <= tokens["padded"]
        assert tokens["padded"] < 0.7 * roofline.train_tokens(full, groups)["padded"]
    assert roofline.train_flops(drawn) < 0.8 * roofline.train_flops(full)


def test_rows_that_decode_are_as_many_as_fit_where_the_config_says_so():
    config = small_config()
    config.generation.batch_size = 0
    work = Workload.of(ema.read(config), 16)
    assert (work.prompt_rows, work.decode_rows) == (64, 0)
    assert resolved(work, make_mesh()).decode_rows == 64  # a CPU's


def test_collectives_of_a_program_of_which_they_are_known():
    """Seven trips of one all-reduce of [6, 5], one all-gather of [8, 3]; groups of 4 and of 2."""
    mesh = make_mesh((2, 4, 1))

    def body(x, y):
        def step(carry, _):
            return jax.lax.psum(jnp.sin(carry), "fsdp"), None

        x, _ = jax.lax.scan(step, x, None, length=7)
        return x, jax.lax.all_gather(y, "data", tiled=True)

    specs = (P(), P("data"))
    program = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(((6, 5), (8, 3)), specs, strict=True)
    ]
    text = jax.jit(program).lower(*shapes).compile().as_text()
    # The loop's limit is read from its condition too, as of TPU programs.
    for hlo in (text, re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)):
        found = {c.kind: c for c in collectives.read(hlo, 8)}
        assert found == {
            "all-reduce": collectives.Collective("all-reduce", 6 * 5 * 4, 4, 7),
            "all-gather": collectives.Collective("all-gather", 8 * 3 * 4, 2, 1),
        }
        made = collectives.summary(list(found.values()))
        assert made["all-reduce"] == {"count": 7, "bytes": 840, "sent_bytes": 1260}
        assert made["all-gather"] == {"count": 1, "bytes": 96, "sent_bytes": 48}


TPU_TEXT = """HloModule jit_f

%fused (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%again (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %a = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%fused
  %b = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%again
  %reduce-scatter = bf16[2,8]{1,0} reduce-scatter(%x), channel_id=6, replica_groups=[4,2]<=[8]
}

%condition (t: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  ROOT %compare = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %while = (s32[], bf16[4,8]) while(%tuple), condition=%condition, body=%body
  %start = (f32[6], f32[6]) all-reduce-start(%y), channel_id=9, replica_groups={{0,1,2,3}}
}
"""


def test_collectives_as_a_tpu_program_writes_them():
    assert set(collectives.read(TPU_TEXT, 8)) == {
        collectives.Collective("all-gather", 16 * 8 * 2, 4, 32),
        collectives.Collective("reduce-scatter", 2 * 8 * 2, 2, 32),
        collectives.Collective("all-reduce", 24, 4, 1),
    }


@pytest.mark.parametrize(
    ("instruction", "size"),
    [
        ("f32[6] all-reduce(%a)", 24),
        ("(f32[6], bf16[4,8]) all-reduce(%a, %b)", 24 + 64),
        ("f32[6] all-reduce-start(%a)", 24),
        ("(f32[6], bf16[4,8]) all-reduce-start(%a, %b)", 24 + 64),
        ("(f32[6], f32[6], f32[6]) all-reduce-start(%a, %b, /*index=2*/%c)", 3 * 24),
        ("((f32[6], bf16[4,8]), (f32[24], bf16[16,8])) all-gather-start(%a, %b)", 96 + 256),
        ("((f32[24], bf16[16,8]), (f32[6], bf16[4,8])) reduce-scatter-start(%a, %b)", 24 + 64),
        ("(bf16[4,8]{1,0:T(8,128)}, bf16[4,8], u32[], u32[]) collective-permute-start(%a)", 64),
        ("(f32[6], f32[6]) all-to-all(f32[6]{0} %a, f32[6]{0:T(256)} %b)", 48),
    ],
)
def test_combined_collectives_count_every_result(instruction, size):
    """XLA makes one all-reduce of many adapters' gradients: a tuple, as all its results are."""
    line = f"  %x = {instruction}, channel_id=1, replica_groups={{{{0,1}}}}"
    (found,) = collectives.read(f"ENTRY %main (a: f32[6]) -> f32[6] {{\n{line}\n}}\n", 8)
    assert (found.bytes, found.group) == (size, 2)


WINDOWED_TEXT = """HloModule jit_f

%body (t: (bf16[64,8], bf16[8,4], u32[], /*index=3*/u32[])) -> (bf16[64,8], bf16[8,4], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %other = u32[]{:T(128)} constant(15)
  %t = (bf16[64,8]{1,0}, bf16[8,4]{1,0}, u32[]{:T(128)}, /*index=3*/u32[]) parameter(0)
  %part = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %place = u32[]{:T(128)} get-tuple-element(%t), index=2
  %start = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%part), \
channel_id=3, source_target_pairs={{0,1},{1,0}}
  %after = u32[]{:T(128)} add(%place, %two), metadata={op_name="jit(f)"}
  ROOT %tuple = (bf16[64,8]{1,0}, bf16[8,4]{1,0}, u32[], /*index=3*/u32[]) tuple(%x, %done, \
%after, /*index=3*/%other)
}

%condition (t: (bf16[64,8], bf16[8,4], u32[], u32[])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8), metadata={op_name="jit(f)"}
  %t = (bf16[64,8]{1,0}, bf16[8,4]{1,0}, u32[]{:T(128)}, /*index=3*/u32[]) parameter(0)
  %place.1 = u32[]{:T(128)} get-tuple-element(%t), index=2, metadata={op_name="jit(f)"}
  ROOT %compare = pred[]{:T(512)} compare(%place.1, %eight), direction=LT
}

ENTRY %main (x: bf16[64,8]) -> bf16[64,8] {
  %while = (bf16[64,8]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) while(%tuple), condition=%condition, \
body=%body
}
"""


def test_products_over_the_mesh_count_every_part_that_they_send():
    """As libtpu writes them: an unsigned counter to 8 in steps of two, four trips of one part."""
    (found,) = collectives.read(WINDOWED_TEXT, 8)
    assert (found.kind, found.bytes, found.times) == ("collective-permute", 8 * 4 * 2, 4)


def test_loops_count_their_collectives_each():
    """Four loops of a train step gather the same weights, and may do so by the same channel."""
    parts = TPU_TEXT.partition("ENTRY")
    again = re.sub(r"%(body|fused|again)\b", r"%\1_2", parts[0])
    loop = "  %second = (s32[], bf16[4,8]) while(%tuple), condition=%condition, body=%body_2\n"
    entry = parts[1] + parts[2].replace("  %start", f"{loop}  %start")
    gathers = [c for c in collectives.read(parts[0] + again + entry, 8) if c.kind == "all-gather"]
    assert [(c.bytes, c.times) for c in gathers] == [(16 * 8 * 2, 32)] * 2


def test_flops_are_those_that_xla_counts():
    """Of one layer: of a scan's body XLA counts one."""
    model = dataclasses.replace(
        architecture(ModelConfig(source=MISTRAL)), num_layers=1, windows=(None,)
    )
    config = small_config()
    work = dataclasses.replace(
        Workload.of(ema.read(config), 16),
        model=dataclasses.replace(model, hidden_size=512, intermediate_size=1024, vocab_size=4096),
        train_tokens=257,
    )
    mesh = make_mesh()
    (_, forward), *_ = programs.lowered(
        dataclasses.replace(work, prompt_tokens=256, prompt_rows=8), mesh, ("capture",)
    )
    tokens, model = 8 * 256, work.model
    head = 2 * model.vocab_size * model.hidden_size * tokens
    attention = 4 * model.num_heads * model.head_dim * 256 * tokens
    block = 2 * (model.matrix_weights * tokens) - head
    counted = forward.compile().cost_analysis()["flops"]
    assert block + attention == pytest.approx(counted, rel=0.05)


def test_a_step_costs_more_where_more_is_trained_or_computed_again():
    work = Workload.of(ema.read(small_config()), 16)
    full = dataclasses.replace(work, arm=dataclasses.replace(work.arm, trainable="full"))
    again = dataclasses.replace(work, arm=dataclasses.replace(work.arm, remat="full"))
    more = dataclasses.replace(work, arm=dataclasses.replace(work.arm, batch_size=24))
    plain = roofline.train_flops(work)
    assert roofline.train_flops(again) == pytest.approx(1.5 * plain, rel=0.05)
    assert plain < roofline.train_flops(full) < 1.5 * plain
    assert roofline.train_flops(more) == 2 * plain


def test_meshes_split_every_head():
    work = dataclasses.replace(
        Workload.of(ema.read(small_config()), 16),
        model=architecture(ModelConfig(source="Qwen/Qwen2.5-7B-Instruct")),
    )
    shapes = roofline.candidate_meshes(work, 16)
    assert {shape[2] for shape in shapes} == {1, 2, 4}  # 28 and 4 heads
    assert all(np.prod(shape) == 16 for shape in shapes)
    assert (1, 16, 1) in shapes


@pytest.fixture
def compiler(monkeypatch):
    """In place of XLA: memory grows with rows, and one mesh sends a tenth of what others do."""
    monkeypatch.setattr(programs, "lowered", lambda work, mesh, names: [("train", (work, mesh))])

    def figures(program, _):
        work, mesh = program
        rows, fsdp = work.train_rows, mesh.shape["fsdp"]
        return {
            "fits": rows < 64,
            "hbm_gib_per_chip": float(rows),
            "collectives": {"all-gather": {"sent_bytes": 1e7 if fsdp == 4 else 1e8}},
            "full_rematerialisations": 0,
        }

    monkeypatch.setattr(check, "_figures", figures)


def test_compared_meshes_begin_with_the_cheapest_that_fits(compiler):
    slice_ = topology.Topology("v5e:2x2", devices.TPUS["v5e"], 4, jax.devices()[:4])
    rows = check.compare_meshes(ema.read(small_config()), slice_, 16)
    assert [row["fits"] for row in rows] == sorted((row["fits"] for row in rows), reverse=True)
    assert rows[0]["mesh"] == (1, 4, 1)
    assert rows[0]["examples"] == 32  # the most that fits: what is sent is shared by more
    lines = check.mesh_table(rows).splitlines()
    assert len(lines) == 1 + len(rows)
    assert "   1    4      1" in lines[1]
    assert "NO" in lines[-1]
    full, drawn = (
        check.compare_meshes(ema.read(small_config()), slice_, 64, lengths)
        for lengths in ("full", "drawn")
    )
    assert drawn[-1]["compute"] < 0.8 * full[-1]["compute"]


def test_what_does_not_fit_says_by_how_much():
    class Program:
        def compile(self, compiler_options):
            raise RuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
                "Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G."
            )

    slice_ = topology.Topology("v5e:2x2", devices.TPUS["v5e"], 4, jax.devices()[:4])
    made = check._figures(Program(), slice_)
    assert made["fits"] is False
    assert made["hbm_gib_per_chip"] == 20.25
    assert made["over_gib"] == pytest.approx(4.5)


@pytest.mark.parametrize("written", [True, False])
def test_a_program_that_jax_cannot_print_is_read_as_the_compiler_wrote_it(written):
    class Memory:
        output_size_in_bytes, alias_size_in_bytes = 3 << 30, 1 << 30
        argument_size_in_bytes, temp_size_in_bytes = 5 << 30, 4 << 30
        generated_code_size_in_bytes = 1 << 30

    class Program:
        def compile(self, compiler_options):
            if written:
                folder = Path(compiler_options["xla_dump_to"])
                (folder / "module_0000.f.after_optimizations.txt").write_text(TPU_TEXT)
            return self

        def memory_analysis(self):
            return Memory

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    slice_ = topology.Topology("v5e:2x2", devices.TPUS["v5e"], 4, jax.devices()[:4])
    made = check._figures(Program(), slice_)
    assert (made["fits"], made["hbm_gib_per_chip"]) == (True, 12)
    if written:
        assert set(made["collectives"]) == {"all-gather", "reduce-scatter", "all-reduce"}
        return
    assert made["collectives"] is None
    work = Workload.of(ema.read(small_config()), 16)
    bound = check._bound(work, slice_, slice_.mesh((1, 4, 1)), made)
    assert (bound["communication"], bound["limit"]) == (None, "unknown")


def test_a_mesh_has_to_use_the_slice():
    slice_ = topology.Topology("v5e:2x4", devices.TPUS["v5e"], 8, jax.devices())
    assert dict(slice_.mesh((2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(UserError, match="has 8 devices"):
        slice_.mesh((1, 4, 1))


@pytest.mark.parametrize(("size", "fits"), [(12, 16), (2, 8)])
def test_what_the_trainer_refuses_is_not_said_to_fit(size, fits):
    """A batch that the mesh does not divide: an error there, so here, and not rounded up."""
    slice_ = topology.Topology("v5e:2x4", devices.TPUS["v5e"], 8, jax.devices())
    config = small_config()
    config.unlearn.batch_size = config.unlearn.retain_batch_size = size
    config.mesh = (-1, 1, 1)
    for names in (("train",), ("decode",)):
        said = rf"arms\.npo\.batch_size = {size} does not divide .* use {fits}"
        with pytest.raises(UserError, match=said):
            check.check(ema.read(config), slice_, 16, names)


def test_compared_meshes_leave_out_what_the_trainer_refuses(compiler):
    """Rows of every arm, not of the largest alone, have to divide over data · fsdp."""
    slice_ = topology.Topology("v5e:2x4", devices.TPUS["v5e"], 8, jax.devices())
    config = small_config()
    config.unlearn.batch_size = config.unlearn.retain_batch_size = 12

    def examples(mesh):
        rows = check.compare_meshes(ema.read(config), slice_, 16)
        return {row["examples"] for row in rows if row["mesh"] == mesh}

    assert examples((1, 8, 1)) == {48, 96}
    assert examples((1, 4, 2)) == {24, 48, 96}
    config.arms = {"npo_retain": {"retain_weight": 5.0}, "small": {"batch_size": 6}}
    assert examples((1, 8, 1)) == {96}
    assert examples((1, 4, 2)) == {48, 96}
    config.unlearn.layers = (0, 99)
    with pytest.raises(UserError, match="the model's last block is"):
        examples((1, 4, 2))
