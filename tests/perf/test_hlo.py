"""Collectives, kernels and trip counts as they stand in scheduled HLO."""

import re

import pytest

from perf import hlo
from tests.tpu import needs_libtpu

MESH = {"data": 2, "fsdp": 2, "tensor": 2}  # device = 4 data + 2 fsdp + tensor

PROGRAM = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "parallel/sharding.py"
2 "model/layers.py"
3 "/usr/lib/python3/site-packages/optax/base.py"

FunctionNames
1 "einsum"

FileLocations
1 {file_name_id=1 function_name_id=1 line=94 end_line=94 column=0 end_column=0}
2 {file_name_id=2 function_name_id=1 line=46 end_line=46 column=0 end_column=0}
3 {file_name_id=3 function_name_id=1 line=7 end_line=7 column=0 end_column=0}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,128]) -> f32[4,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[8,128]{1,0:T(8,128)} all-reduce(%p), channel_id=9, replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[4,128]{1,0:T(4,128)} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={4,128}
}

%async_collective_fusion.1 (p: bf16[4,128], x: bf16[8,8]) -> (bf16[8,8], bf16[8,128]) {
  %p = bf16[4,128]{1,0} parameter(0)
  %x = bf16[8,8]{1,0} parameter(1)
  %all-gather.2 = bf16[8,128]{1,0} all-gather(%p), channel_id=2, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[8,8]{1,0}, bf16[8,128]{1,0}) tuple(%x, %all-gather.2)
}

%async_collective_fusion.2 (p: bf16[4,128], x: bf16[8,8]) -> (bf16[8,8], bf16[8,128]) {
  %p = bf16[4,128]{1,0} parameter(0)
  %x = bf16[8,8]{1,0} parameter(1)
  %all-gather.3 = bf16[8,128]{1,0} all-gather(%p), channel_id=2, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[8,8]{1,0}, bf16[8,128]{1,0}) tuple(%x, %all-gather.3)
}

%condition (state: (s32[], bf16[4,128])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[4,128]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(32)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body (state: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %state = (s32[]{:T(128)}, bf16[4,128]{1,0}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  %shard = bf16[4,128]{1,0} get-tuple-element(%state), index=1
  %two = s32[] constant(2)
  %next = s32[]{:T(128)} add(%turn, %two)
  %start = (bf16[8,8]{1,0}, bf16[8,128]{1,0}) fusion(%shard), kind=kCustom, calls=%async_collective_fusion.1, metadata={op_name="jit(step)/layers/gather" stack_frame_id=2}
  %done = (bf16[8,8]{1,0}, bf16[8,128]{1,0}) fusion(%shard), kind=kCustom, calls=%async_collective_fusion.2, metadata={op_name="jit(step)/layers/gather" stack_frame_id=2}
  %kernel = bf16[4,128]{1,0} custom-call(%shard), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attention/flash_forward/pallas_call"}
  ROOT %state.1 = (s32[]{:T(128)}, bf16[4,128]{1,0}) tuple(%next, %kernel)
}

ENTRY %main (x: f32[8,128], y: bf16[4,128]) -> f32[4,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %y = bf16[4,128]{1,0} parameter(1)
  %begin = s32[]{:T(128)} constant(4)
  %before = (s32[]{:T(128)}, /*index=1*/bf16[4,128]{1,0}) tuple(%begin, %y)
  %loop = (s32[]{:T(128)}, bf16[4,128]{1,0}) while(%before), condition=%condition, body=%body
  %sum = f32[8,128]{1,0} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add, metadata={op_name="jit(step)/update" stack_frame_id=3}
  %permute = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %busy = f32[8,128]{1,0} fusion(%sum), kind=kLoop, calls=%add
  %permuted = f32[8,128]{1,0} collective-permute-done(%permute)
  %idle = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=4, source_target_pairs={{0,4},{4,0}}
  %idled = f32[8,128]{1,0} collective-permute-done(%idle)
  %swapped = f32[8,128]{1,0} all-to-all(%x), channel_id=5, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %shard.1 = f32[4,128]{1,0} fusion(%busy), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/gradient" stack_frame_id=1}
}
"""  # noqa: E501


def test_every_collective_is_counted():
    found = hlo.collectives(hlo.parse(PROGRAM), MESH)
    rows = {(row.kind, row.axis): row for row in found}
    assert len(found) == len(rows)
    KiB = 1024
    assert {key: (row.count, row.operand_bytes, row.result_bytes, row.wire_bytes) for key, row in rows.items()} == {
        #                                         count  operand    result     on the wire
        ("all-gather", "fsdp"):                  (14, 14 * 1 * KiB, 14 * 2 * KiB, 14 * 2 * KiB / 2),
        ("all-reduce", "data,fsdp,tensor"):      (1, 4 * KiB, 4 * KiB, 2 * 4 * KiB * 7 / 8),
        ("reduce-scatter", "fsdp"):              (1, 4 * KiB, 2 * KiB, 4 * KiB / 2),
        ("collective-permute", "tensor"):        (1, 4 * KiB, 4 * KiB, 4 * KiB / 2),
        ("collective-permute", "data"):          (1, 4 * KiB, 4 * KiB, 4 * KiB / 2),
        ("all-to-all", "data,fsdp"):             (1, 4 * KiB, 4 * KiB, 4 * KiB * 3 / 4),
    }  # fmt: skip
    assert {key for key, row in rows.items() if row.is_overlapped} == {
        ("all-gather", "fsdp"),  # in a fusion with compute
        ("collective-permute", "tensor"),  # a fusion runs between start and done
    }


def test_a_collective_tells_its_line_even_where_the_compiler_made_it():
    rows = {(row.kind, row.axis): row.source for row in hlo.collectives(hlo.parse(PROGRAM), MESH)}
    assert rows["all-gather", "fsdp"] == "model/layers.py:46", "the line that calls parallel/sharding.py"
    assert rows["reduce-scatter", "fsdp"] == "model/layers.py:46", "that of the fusion it stands in"
    assert rows["all-reduce", "data,fsdp,tensor"] == "model/layers.py:46", "the innermost line of ours"


def test_several_physical_axes_are_one_in_the_answer():
    physical = {"data": 2, "fsdp_x": 2, "fsdp_y": 2}
    names = {"data": "data", "fsdp_x": "fsdp", "fsdp_y": "fsdp"}
    axes = {row.axis for row in hlo.collectives(hlo.parse(PROGRAM), physical, names=names)}
    assert axes == {"data", "fsdp", "data,fsdp"}


def test_loops_count_as_often_as_they_turn():
    module = hlo.parse(PROGRAM)
    assert hlo.executions(module)["body"] == (32 - 4) // 2
    assert hlo.kernels(module) == {"flash_forward": 14}
    endless = PROGRAM.replace("ROOT %less = pred[]{:T(512)} compare", "%less = pred[] compare").replace(
        "direction=LT\n", "direction=LT\n  ROOT %both = pred[] and(%less, %less)\n", 1
    )
    assert hlo.kernels(hlo.parse(endless)) == {"flash_forward": 1}, "an end that data decide"


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x={1}", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        ("replica_groups={0,1,2,3}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=[4]<=[4]", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{3,2}}, x={{}}", [[0, 1], [3, 2]]),
    ],
)
def test_groups_are_read_in_every_notation(written, groups):
    assert hlo.groups_of(written, 4) == groups


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("bf16[3]", 6),
        ("s4[3]", 2),
        ("f8e4m3fn[2,2]", 4),
        ("pred[]", 1),
        ("(f32[2], (u32[], u32[]))", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_type(written, size):
    assert hlo.num_bytes(written) == size


def test_a_type_is_told_without_its_layout():
    assert hlo.plain_type("(f32[2,2]{1,0:T(2,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)})") == "f32[2,2] u32[]"
    rows = {(row.kind, row.axis): row.shape for row in hlo.collectives(hlo.parse(PROGRAM), MESH)}
    assert rows["reduce-scatter", "fsdp"] == "f32[4,128]"
    assert rows["collective-permute", "data"] == "f32[8,128]", "without what the device remembers"


def test_parts_of_a_tuple():
    assert hlo.parts_of("(f32[2,2]{1,0:T(2,128)(2,1)}, (u32[], u32[]), /*index=2*/token[])") == [
        "f32[2,2]{1,0:T(2,128)(2,1)}",
        "(u32[], u32[])",
        "token[]",
    ]


ON_ANOTHER_CORE = """\
HloModule jit_step, is_scheduled=true

%called (p: f32[4,128]) -> f32[8,128] {
  %p = f32[4,128]{1,0} parameter(0)
  ROOT %all-gather = f32[8,128]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[4,128]) -> f32[8,128] {
  %x = f32[4,128]{1,0} parameter(0)
  %start = ((f32[4,128]{1,0}), f32[8,128]{1,0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%called
  %busy = f32[4,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %done = f32[8,128]{1,0} call-done(%start)
}
"""  # noqa: E501


def test_a_sparse_core_moves_beside_the_schedule():
    (row,) = hlo.collectives(hlo.parse(ON_ANOTHER_CORE), MESH)
    assert (row.kind, row.axis, row.operand_bytes, row.result_bytes) == ("all-gather", "tensor", 2048, 4096)
    assert row.is_overlapped


BETWEEN_SLICES = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %after = token[] after-all()
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%x, %after), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.3_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=1, is_host_transfer=true
  %recv = (f32[8,128]{1,0}, u32[], token[]) recv(%after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.3_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[8,128]{1,0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  ROOT %sum = f32[8,128]{1,0} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501


def test_transfers_between_slices_are_counted():
    (row,) = hlo.collectives(hlo.parse(BETWEEN_SLICES), MESH, slice_axes=("data",))
    assert (row.kind, row.axis, row.network, row.group) == ("all-reduce", "data", "dcn", 2)
    assert (row.operand_bytes, row.result_bytes, row.wire_bytes) == (4096, 4096, 4096)


def counted_by_lines(text: str, layers: int) -> dict[str, tuple[int, int]]:
    """The slow twin: every line with a collective, its operands looked up in the text; in a loop, `layers` times.

    A reduction and a scatter that became one fusion stand there as an all-reduce, which is in no loop here.
    """
    types = dict(re.findall(r"%([\w.\-]+) = (\S+) ", text))
    entry = text.index("ENTRY")
    sums = {"gather": (0, 0), "reduce": (0, 0)}
    for found in re.finditer(r" all-(gather|reduce)\(([^)]*)\)| (reduce)-scatter\(([^)]*)\)", text):
        kind, operands = found[1] or found[3], found[2] or found[4]
        is_once = found.start() > entry or "%all-reduce-scatter" in text[: found.start()].rpartition("}\n")[2]
        times = 1 if is_once else layers
        count, bytes_ = sums[kind]
        size = sum(hlo.num_bytes(types[name]) for name in re.findall(r"%([\w.\-]+)", operands))
        sums[kind] = count + times, bytes_ + times * size
    return sums


@needs_libtpu
def test_a_compiled_loop_is_counted_like_its_lines():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from parallel.topology import topology_devices

    L, D, B = 3, 1024, 64
    mesh = Mesh(
        np.asarray(topology_devices("v5e:2x2")).reshape(2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2
    )

    def step(x, weights):
        def layer(x, w):
            gathered = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            return jnp.tanh(jax.lax.psum(x @ gathered, "tensor")), None

        x, _ = jax.lax.scan(layer, x, weights)
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)

    split = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(None, "fsdp")), out_specs=P("fsdp"), check_vma=False)
    shapes = (
        jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=NamedSharding(mesh, P())),
        jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))),
    )
    text = jax.jit(split).lower(*shapes).compile({"exec_time_optimization_effort": -1.0}).as_text()
    rows = hlo.collectives(hlo.parse(text), mesh.shape)
    assert {(row.kind, row.axis): (row.count, row.operand_bytes, row.result_bytes) for row in rows} == {
        ("all-gather", "fsdp"): (L, L * D * D * 2, L * D * D * 4),
        ("all-reduce", "tensor"): (L, L * B * D * 4, L * B * D * 4),
        ("reduce-scatter", "fsdp"): (1, B * D * 4, B * D * 2),
    }
    sums = {"gather": (0, 0), "reduce": (0, 0)}
    for row in rows:
        kind = "gather" if row.kind == "all-gather" else "reduce"
        sums[kind] = sums[kind][0] + row.count, sums[kind][1] + row.operand_bytes
    assert sums == counted_by_lines(text, L)
    assert {row.source.partition(":")[0] for row in rows} == {"tests/perf/test_hlo.py"}
