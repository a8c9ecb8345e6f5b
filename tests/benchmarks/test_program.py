"""The parser of optimized HLO, on programs of known traffic: compiled for the CPU, and as a TPU's compiler writes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.cost.hlo import parse_shapes
from benchmarks.cost.program import Program

KIB = 1024


def compiled(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function, **options).lower(*arguments).compile().as_text())


@pytest.mark.parametrize(
    ("function", "shapes", "entries"),
    [
        (lambda x, y: x * 2 + y, [(512,), (512,)], 3 * 512),
        (lambda x: x.sum(1), [(16, 8)], 16 * 8 + 16 + 1),  # and the constant that a sum starts from
        (lambda x, y: x @ y, [(16, 64), (64, 32)], 16 * 64 + 64 * 32 + 16 * 32),
        (lambda x: x[3:5] + 1, [(64, 32)], 2 * 2 * 32),
    ],
    ids=["add", "sum", "matmul", "slice"],
)
def test_traffic_of_programs_compiled_for_the_cpu(function, shapes, entries):
    assert compiled(function, *shapes).hbm_bytes() == pytest.approx(4 * entries, abs=4)


def test_updates_in_place_count_what_they_touch():
    def write(x, row, index):
        return jax.lax.dynamic_update_slice(x, row * 2, (index.astype(int)[0], 0))

    program = compiled(write, (64, 32), (1, 32), (1,), donate_argnums=0)
    assert program.hbm_bytes() <= 4 * (2 * 32 + 8)


@pytest.mark.parametrize("length", [3, 7])
def test_loop_bodies_count_as_often_as_they_run(length):
    def loop(x):
        return jax.lax.fori_loop(0, length, lambda _, x: jnp.sin(x) * x, x)

    small, large = (compiled(loop, (size,), donate_argnums=0).hbm_bytes() for size in (512, 1024))
    assert large - small == length * 4 * 2 * 512


def test_collectives_of_a_program_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows)
    summed = jax.jit(lambda x: x.sum(0), out_shardings=replicated).lower(x).compile()
    gathered = jax.jit(lambda x: x * 2, out_shardings=replicated).lower(x).compile()
    assert Program(summed.as_text()).collectives() == {"all-reduce": (1, 4 * 32)}
    assert Program(gathered.as_text()).collectives() == {"all-gather": (1, 4 * 16 * 32)}


@pytest.mark.parametrize(
    ("text", "payload", "occupied", "hbm"),
    [
        ("f32[12,768]{1,0:T(8,128)}", 4 * 12 * 768, 4 * 16 * 768, 4 * 16 * 768),
        ("bf16[4,100]{0,1:T(8,128)(2,1)}", 2 * 400, 2 * 104 * 128, 2 * 104 * 128),
        ("f32[768,1]{0,1:T(1,128)}", 4 * 768, 4 * 768, 4 * 768),
        ("f32[256,128]{1,0:T(8,128)S(1)}", 128 * KIB, 128 * KIB, 0),
        ("f32[]{:T(128)}", 4, 512, 512),
        ("pred[8,4]", 32, 32, 32),
        ("s4[64]{0}", 32, 32, 32),
        ("token[]", 0, 0, 0),
    ],
)
def test_shapes_in_tiled_layouts(text, payload, occupied, hbm):
    (shape,) = parse_shapes(text)
    assert (shape.payload, shape.bytes, shape.hbm) == (payload, occupied, hbm)


TPU = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[1024]{0:T(1024)})->f32[1024]{0:T(1024)}}

%region_0.1 (p.1: f32[], p.2: f32[]) -> f32[] {
  %p.1 = f32[]{:T(128)} parameter(0)
  %p.2 = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%p.1, %p.2)
}

%fused (param_0: f32[12,1024], param_1: s32[], param_2: f32[1024]) -> (f32[12,1024], f32[1024]) {
  %param_0 = f32[12,1024]{1,0:T(1,128)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %param_2 = f32[1024]{0:T(1024)} parameter(2)
  %constant.9 = s32[]{:T(128)} constant(0)
  %slice.1 = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%param_0, %param_1, %constant.9), dynamic_slice_sizes={1,1024}
  %bitcast.1 = f32[1024]{0:T(1024)} bitcast(%slice.1)
  %add.2 = f32[1024]{0:T(1024)} add(%bitcast.1, %param_2)
  %bitcast.2 = f32[1,1024]{1,0:T(1,128)} bitcast(%add.2)
  %update.1 = f32[12,1024]{1,0:T(1,128)} dynamic-update-slice(%param_0, %bitcast.2, %param_1, %constant.9)
  ROOT %tuple.1 = (f32[12,1024]{1,0:T(1,128)}, f32[1024]{0:T(1024)}) tuple(%update.1, %add.2)
}

%body (arg: (s32[], f32[12,1024], f32[1024])) -> (s32[], f32[12,1024], f32[1024]) {
  %arg = (s32[]{:T(128)}, f32[12,1024]{1,0:T(1,128)}, /*index=2*/f32[1024]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %stack = f32[12,1024]{1,0:T(1,128)} get-tuple-element(%arg), index=1
  %row = f32[1024]{0:T(1024)} get-tuple-element(%arg), index=2
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %fusion.1 = (f32[12,1024]{1,0:T(1,128)}, f32[1024]{0:T(1024)}) fusion(%stack, %i, %row), calls=%fused, info={"(y"}
  %stack.1 = f32[12,1024]{1,0:T(1,128)} get-tuple-element(%fusion.1), index=0
  %row.1 = f32[1024]{0:T(1024)} get-tuple-element(%fusion.1), index=1
  %reduced = f32[1024]{0:T(1024)} all-reduce(%row.1), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%region_0.1
  ROOT %tuple.2 = (s32[]{:T(128)}, f32[12,1024]{1,0:T(1,128)}, f32[1024]{0:T(1024)}) tuple(%next, %stack.1, %reduced)
}

%condition (arg.1: (s32[], f32[12,1024], f32[1024])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[12,1024]{1,0:T(1,128)}, f32[1024]{0:T(1024)}) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%arg.1), index=0
  %limit = s32[]{:T(128)S(6)} constant(12)
  ROOT %less = pred[]{:T(512)S(6)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[1024], stack.2: f32[12,1024]) -> f32[1024] {
  %x = f32[1024]{0:T(1024)} parameter(0), sharding={replicated}
  %stack.2 = f32[12,1024]{1,0:T(1,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %copy-start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[1024]{0:T(1024)S(1)} copy-done(%copy-start)
  %gather-start = (f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) all-gather-start(%x), channel_id=3, dimensions={0}
  %gather-done = f32[4096]{0:T(1024)} all-gather-done(%gather-start)
  %slice-start = (f32[4096]{0:T(1024)}, f32[1024]{0:T(1024)S(1)}, s32[]) slice-start(%gather-done)
  %slice-done = f32[1024]{0:T(1024)S(1)} slice-done(%slice-start)
  %sum = f32[1024]{0:T(1024)} add(%copy-done, %slice-done)
  %tuple.3 = (s32[]{:T(128)}, f32[12,1024]{1,0:T(1,128)}, f32[1024]{0:T(1024)}) tuple(%zero, %stack.2, %sum)
  %while.1 = (s32[], f32[12,1024], f32[1024]) while(%tuple.3), condition=%condition, body=%body, config={KNOWN}
  ROOT %out = f32[1024]{0:T(1024)} get-tuple-element(%while.1), index=2
}
"""


@pytest.mark.parametrize("known", ["", '"known_trip_count":{"n":"12"}'], ids=["condition", "noted"])
def test_a_program_as_a_tpu_compiler_writes_it(known):
    program = Program(TPU.replace("KNOWN", known))
    row = 4 * 1024
    # The copy, all-gather and slice read once each, the sum writes; all-gather writes four rows.
    before = row + (row + 4 * row) + row + row
    # The fusion reads and writes one row of the stack, reads and writes `row`; the all-reduce reads and writes it.
    assert program.hbm_bytes() == before + 12 * (4 * row + 2 * row)
    assert program.collectives() == {"all-gather": (1, 4 * row), "all-reduce": (12, 12 * row)}
    assert program.entry_instructions() == 8  # from the copy's start to the loop
    # Starts, not ends: the copy, all-gather and slice, the sum; in each run of the loop the sum of the counter, the
    # fusion and the all-reduce.
    assert program.launches() == 4 + 12 * 3


def test_a_program_as_a_gpu_compiler_writes_it():
    """Scratch space of cuBLAS is no traffic; each instruction that moves something is a kernel."""
    text = """
HloModule jit_step

%fused_add (p0: f32[8,16], p1: f32[8,16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[8,16]{1,0} parameter(1)
  ROOT %add = f32[8,16]{1,0} add(%p0, %p1)
}

ENTRY %main (x: f32[8,32], w: f32[32,16], y: f32[8,16]) -> f32[8,16] {
  %x = f32[8,32]{1,0} parameter(0)
  %w = f32[32,16]{1,0} parameter(1)
  %y = f32[8,16]{1,0} parameter(2)
  %matmul = (f32[8,16]{1,0}, s8[33554432]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"
  %product = f32[8,16]{1,0} get-tuple-element(%matmul), index=0
  ROOT %loop_add_fusion = f32[8,16]{1,0} fusion(%product, %y), kind=kLoop, calls=%fused_add
}
"""
    program = Program(text)
    assert program.hbm_bytes() == 4 * (8 * 32 + 32 * 16 + 8 * 16) + 4 * 3 * 8 * 16
    assert program.launches() == 2
    assert program.entry_instructions() == 2


def test_a_loop_of_unknown_length_counts_once():
    text = TPU.replace("KNOWN", "").replace(
        "%limit = s32[]{:T(128)S(6)} constant(12)", "%limit = s32[] add(%i.1, %i.1)"
    )
    known = Program(TPU.replace("KNOWN", "")).hbm_bytes()
    assert known - Program(text).hbm_bytes() == 11 * 6 * 4 * 1024


def test_of_a_conditional_one_branch_counts():
    program = """
%renew (x.1: f32[64]) -> f32[64] {
  %x.1 = f32[64]{0} parameter(0)
  %half = f32[64]{0} add(%x.1, %x.1)
  ROOT %twice = f32[64]{0} add(%half, %half)
}

%keep (x.2: f32[64]) -> f32[64] {
  ROOT %x.2 = f32[64]{0} parameter(0)
}

ENTRY %main (due: pred[], x: f32[64]) -> f32[64] {
  %due = pred[] parameter(0)
  %x = f32[64]{0} parameter(1)
  ROOT %out = f32[64]{0} conditional(%due, %x, %x), true_computation=%renew, false_computation=%keep
}
"""
    assert Program(program).hbm_bytes() == 2 * 3 * 4 * 64
    assert Program(program, rare=False).hbm_bytes() == 0


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match=r"compiled\.as_text"):
        Program("HloModule empty\n")
