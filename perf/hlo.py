"""Scheduled HLO text, read for what moves between devices and which kernels run, each times how often. Knows no model.

    %all-gather.1 = bf16[512,1024] all-gather(%shard), replica_groups=[2,8]<=[8,2]T(1,0) …   in a loop of 32 layers
    -> Collective(kind="all-gather", axis="fsdp", count=32, result_bytes=…, source="model/layers.py:174", …)

A loop counts as often as its condition says; one whose end depends on data (decoding) counts once.
"""

import collections
import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f4e2m1fn": 4,
}  # fmt: skip
KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
PASSED_THROUGH = "parallel/sharding.py:"
PAIRS = "source_target_pairs="
ASIDE = ("async-start", "call-start")  # what runs beside the schedule: call-start on a tpu7x's SparseCore
COMPUTE = {"fusion", "convolution", "dot", "custom-call", "while", "call", "conditional"}
SENT = {"one-to-one": "collective-permute"}  # what the network between slices calls differently

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_OPERATION = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_GROUPS = re.compile(
    r"replica_groups=(mesh\[[^\]]*\][^{]*\{[^}]*\}|\[[^\]]*\]<=\[[^\]]*\](?:T\([^)]*\))?|\{\{.*?\}\}|\{[\d, ]*\})"
)
_TABLE = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    type: str  # f32[8,128]{1,0}, or a tuple of such
    opcode: str
    operands: tuple[str, ...]  # names in the same computation
    rest: str  # everything after the opening bracket

    def called(self, key: str) -> str:
        """The computation behind `key=%name`, or "" where there is none."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


class Computation(NamedTuple):
    """A list of operations, in the order of the schedule."""

    name: str
    operations: dict[str, Operation]
    root: Operation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: str
    files: dict[int, str]
    locations: dict[int, dict[str, int]]  # file_name_id, line, …
    frames: dict[int, dict[str, int]]  # file_location_id, parent_frame_id: one more than the parent's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One operation that moves bytes between devices; bytes are of one device and one step."""

    kind: str
    axis: str  # mesh axes that it goes along: "fsdp", "data,fsdp"
    count: int  # times a step
    operand_bytes: int
    result_bytes: int
    group: int  # devices that take part
    is_overlapped: bool  # computation is scheduled while it runs
    network: str  # ici, or dcn between slices
    shape: str  # of the result, once: bf16[4096,1024]
    source: str  # model/layers.py:46
    operation: str  # jax's name of what it came from

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in a step, by the usual count of a ring."""
        moved = {"all-gather": self.result_bytes, "all-reduce": 2 * self.operand_bytes}
        return moved.get(self.kind, self.operand_bytes) * (self.group - 1) / max(self.group, 1)


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`."""
    tables: dict[str, dict[int, str]] = {}
    computations, operations, name, entry, table, root = {}, {}, "", "", "", None
    for line in text.splitlines():
        if not name:
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = tables.setdefault(line, {})
            elif isinstance(table, dict) and (row := _TABLE.match(line)):
                table[int(row[1])] = row[2] or row[3]
            elif head := _COMPUTATION.match(line):
                name, operations, root = head[2], {}, None
                entry = name if head[1] else entry
        elif line.startswith("}"):  # perhaps with the core that it runs on
            assert root is not None, f"computation {name} has no root"
            computations[name], name = Computation(name, operations, root), ""
        elif found := _OPERATION.match(line):
            operation = Operation(found[2], found[3], found[4], _names(found[5]), found[5])
            operations[operation.name] = operation
            root = operation if found[1] or root is None else root
    assert entry, "the text has no ENTRY computation"
    return Module(
        computations=computations,
        entry=entry,
        files=tables.get("FileNames", {}),
        locations={key: _numbers(row) for key, row in tables.get("FileLocations", {}).items()},
        frames={key: _numbers(row) for key, row in tables.get("StackFrames", {}).items()},
    )


def _names(rest: str) -> tuple[str, ...]:
    """Operands: the names before the closing bracket."""
    return tuple(re.findall(r"%([\w.\-]+)", rest.partition(")")[0]))


def _numbers(row: str) -> dict[str, int]:
    return {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", row)}


def num_bytes(type_: str) -> int:
    """bf16[8,128]{1,0:T(8,128)} -> 2048; a tuple's is the sum of its parts."""
    bits = 0
    for kind, sides in _SHAPE.findall(type_):
        width = BITS.get(kind, 8 if kind.startswith("f8") else 0)
        bits += width * math.prod(int(side) for side in sides.split(",") if side)
    return -(-bits // 8)


def plain_type(type_: str) -> str:
    """A type without its layout.  bf16[8,128]{1,0:T(8,128)} -> bf16[8,128]"""
    return " ".join(f"{kind}[{sides}]" for kind, sides in _SHAPE.findall(type_) if kind in BITS or kind[:2] == "f8")


def parts_of(type_: str) -> list[str]:
    """The parts of a tuple type, one level deep.  (f32[2], (u32[], u32[])) -> ["f32[2]", "(u32[], u32[])"]"""
    if not type_.startswith("("):
        return [type_]
    parts, depth, start = [], 0, 1
    for at, sign in enumerate(type_):
        depth += (sign in "([{") - (sign in ")]}")
        if (sign == "," and depth == 1) or depth == 0:
            parts.append(re.sub(r"/\*.*?\*/", "", type_[start:at]).strip())
            start = at + 1
        if depth == 0:
            break
    return parts


# How often -----------------------------------------------------------------------------------------------------------


def executions(module: Module) -> dict[str, int]:
    """How often each computation runs in one step; of a branch, as if it were always taken."""
    counts: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        computation = module.computations[name]
        for operation in computation.operations.values():
            for called, more in _calls(module, computation, operation):
                visit(called, times * more)

    visit(module.entry, 1)
    return dict(counts)


def _calls(module: Module, computation: Computation, operation: Operation) -> Iterator[tuple[str, int]]:
    """Computations that an operation runs, and how often. What reduces element by element is no computation."""
    if operation.opcode == "while":
        yield operation.called("body"), trip_count(module, computation, operation) or 1
    elif operation.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", operation.rest)
        two = (operation.called("true_computation"), operation.called("false_computation"))
        yield from ((name.strip().lstrip("%"), 1) for name in (branches[1].split(",") if branches else two))
    elif operation.opcode in ("call", "call-start"):
        yield operation.called("to_apply"), 1
    elif operation.opcode in ("fusion", "async-start", "custom-call") and operation.called("calls"):
        yield operation.called("calls"), 1


def trip_count(module: Module, computation: Computation, loop: Operation) -> int | None:
    """How often a `while` turns, or None where that depends on data: (limit - start) / step of its counter."""
    condition = module.computations[loop.called("condition")]
    limit, place = _limit(module, condition)
    if limit is None or place is None:
        return None
    body = module.computations[loop.called("body")]
    step = _step(body, place)
    start = _start(computation, loop, place)
    return max(-(-(limit - start) // step), 0)


def _limit(module: Module, condition: Computation) -> tuple[int | None, int | None]:
    """The constant of `counter < constant`, and the counter's place in the loop's tuple."""
    root, compared = condition.root, condition.root
    if root.opcode == "fusion":
        compared = module.computations[root.called("calls")].root
    if compared.opcode != "compare" or "direction=LT" not in compared.rest:
        return None, None
    operands = [condition.operations[name] for name in root.operands if name in condition.operations]
    constants = [_constant(operation) for operation in operands if operation.opcode == "constant"]
    places = [_index(operation) for operation in operands if operation.opcode == "get-tuple-element"]
    return (constants[0], places[0]) if len(constants) == len(places) == 1 else (None, None)


def _step(body: Computation, place: int) -> int:
    """What a turn adds to the counter."""
    names = body.root.operands
    added = body.operations.get(names[place]) if place < len(names) else None
    terms = [body.operations[name] for name in added.operands if name in body.operations] if added else []
    return next((_constant(term) or 1 for term in terms if term.opcode == "constant"), 1)


def _start(computation: Computation, loop: Operation, place: int) -> int:
    """Where the counter begins: a constant of the tuple that the loop begins with, else 0."""
    begins = computation.operations.get(loop.operands[0])
    if begins is None or begins.opcode != "tuple":
        return 0
    first = computation.operations.get(begins.operands[place])
    while first is not None and first.opcode in ("copy", "bitcast"):
        first = computation.operations.get(first.operands[0])
    return (_constant(first) or 0) if first is not None and first.opcode == "constant" else 0


def _constant(operation: Operation) -> int | None:
    found = re.match(r"(-?\d+)\)", operation.rest)
    return int(found[1]) if found else None


def _index(operation: Operation) -> int:
    found = re.search(r"\bindex=(\d+)", operation.rest)
    assert found, f"{operation.name} has no index"
    return int(found[1])


# Who with whom --------------------------------------------------------------------------------------------------------


def groups_of(rest: str, num_devices: int) -> list[list[int]]:
    """Devices that take part together, by their number in the mesh.

    {{0,1},{2,3}}              as it stands
    [2,2]<=[2,2]T(1,0)         0..3 as a 2x2 table, transposed, cut in 2 rows: [[0, 2], [1, 3]]
    mesh['a'=2,'b'=2] {'b'}    rows along b: [[0, 1], [2, 3]]
    {}                         all
    """
    if PAIRS in rest:
        listed = rest.partition(PAIRS)[2].partition("}}")[0]
        return [[int(x) for x in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)", listed)]
    found = _GROUPS.search(rest)
    written = found[1] if found else "{}"
    if written.startswith("mesh"):
        return _mesh_groups(written)
    if written.startswith("["):
        shape, _, source = written.partition("<=")
        sides, _, order = source.partition("T")
        ids = np.arange(math.prod(_ints(sides))).reshape(_ints(sides))
        ids = ids.transpose(_ints(order)) if order else ids
        return ids.reshape(_ints(shape) if len(_ints(shape)) == 2 else (1, -1)).tolist()
    rows = re.findall(r"\{([\d, ]+)\}", written)
    return [list(_ints(row)) for row in rows] or [list(range(num_devices))]


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text))


def _mesh_groups(written: str) -> list[list[int]]:
    """Groups along some axes of a table of all devices; 'a':(2)4 is the 4 in the middle of an axis of 2 x 4 x rest."""
    sides = [(name, int(size)) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", written.partition("]")[0])]
    chosen = re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", written.partition("{")[2].rstrip("}"))
    shape, along = [], []
    for name, size in sides:
        pieces = [(size, False)]
        for axis, before, part in chosen:
            if axis == name:
                pieces = [(size, True)] if not part else [
                    (int(before), False), (int(part), True), (size // int(before) // int(part), False),
                ]  # fmt: skip
        along += [len(shape) + at for at, (_, is_along) in enumerate(pieces) if is_along]
        shape += [piece for piece, _ in pieces]
    ids = np.arange(math.prod(shape)).reshape(shape)
    width = math.prod(shape[dim] for dim in along)
    return np.moveaxis(ids, along, range(-len(along), 0)).reshape(-1, width).tolist()


def axes_along(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes whose coordinate differs within a group; device i of the mesh is its i-th in row-major order."""
    sides = tuple(mesh.values())
    varying = set()
    for group in groups:
        where = np.stack(np.unravel_index(np.asarray(group), sides))
        varying |= {axis for axis, row in zip(mesh, where, strict=True) if (row != row[0]).any()}
    return tuple(axis for axis in mesh if axis in varying)


# What moves -----------------------------------------------------------------------------------------------------------


def collectives(
    module: Module, mesh: Mapping[str, int], *, slice_axes: tuple[str, ...] = (), names: Mapping[str, str] | None = None
) -> list[Collective]:
    """Every collective of a step, the most on the wire first.

    `mesh` are the sizes of the mesh's axes, in order; `names` says what an axis is called in the answer (several
    physical axes may be one); `slice_axes` are those that cross from slice to slice.
    """
    names = names or {axis: axis for axis in mesh}
    said = lambda axes: ",".join(dict.fromkeys(names[axis] for axis in axes))  # noqa: E731
    callers = {
        called: (computation, operation)
        for computation in module.computations.values()
        for operation in computation.operations.values()
        if operation.opcode in ("fusion", "custom-call", *ASIDE)
        and (called := operation.called("calls") or operation.called("to_apply"))
    }
    found: dict[tuple, Collective] = {}
    for name, times in executions(module).items():
        computation = module.computations[name]
        for operation in computation.operations.values():
            if operation.opcode == "send" and "_xla_megascale_transfer_type" in operation.rest:
                key = (name, operation.name)
                found[key] = _between_slices(module, computation, operation, times, mesh, slice_axes, said)
            kind = operation.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            caller = callers.get(name)
            is_fused = _is_fused(operation, name, caller)
            channel = re.search(r"channel_id=(\d+)", operation.rest)
            key = (kind, channel[1]) if is_fused and channel else (name, operation.name)
            if key in found and found[key].count >= times:
                continue  # a collective fused with compute stands in several fusions: it starts, goes on and ends
            found[key] = _within_slice(module, computation, operation, times, mesh, said, caller, is_fused)
    return sorted(found.values(), key=lambda row: (-row.wire_bytes, row.kind, row.axis, row.source))


Caller = tuple[Computation, Operation] | None


def _is_fused(operation: Operation, name: str, caller: Caller) -> bool:
    """Whether it runs as a part of fusions that compute."""
    return "chain_id" in operation.rest or any(
        "async_collective_fusion" in where for where in (name, caller[1].name if caller else "")
    )


def _within_slice(module, computation, operation, times, mesh, said, caller: Caller, is_fused: bool) -> Collective:
    """A collective over the chips' own network."""
    kind, result = operation.opcode.removesuffix("-start"), operation.type
    groups = groups_of(operation.rest, math.prod(mesh.values()))
    axes = axes_along(groups, mesh)
    width = math.prod(mesh[axis] for axis in axes) if PAIRS in operation.rest else max(map(len, groups))
    if operation.opcode.endswith("-start") and kind != "all-reduce":
        result = parts_of(operation.type)[1]  # (operands, results, what the device remembers)
    if kind == "all-reduce" and _is_scatter(computation, caller):
        kind, result = "reduce-scatter", computation.root.type
    overlaps = is_fused or _is_overlapped(computation, operation)
    if caller and caller[1].opcode in ASIDE:
        overlaps = _is_overlapped(*caller)
    return Collective(
        kind=kind,
        axis=said(axes),
        count=times,
        operand_bytes=times * sum(num_bytes(computation.operations[name].type) for name in operation.operands),
        result_bytes=times * num_bytes(result),
        group=width,
        is_overlapped=overlaps,
        network="ici",
        shape=plain_type(result),
        **_origin(module, computation, operation, caller),
    )


def _is_scatter(computation: Computation, caller: Caller) -> bool:
    """Whether an all-reduce and the slice after it were made one: each device receives its own part alone."""
    return any("reduce-scatter" in name for name in (computation.name, caller[1].name if caller else "")) or (
        "all-reduce-scatter" in computation.name
    )


def _between_slices(module, computation, operation, times, mesh, slice_axes, said) -> Collective:
    """A transfer over the data centre's network: a send to the host, and the recv that answers it."""
    told = dict(re.findall(r'(_xla_\w+)="([^"]*)"', operation.rest))
    kind: str = told["_xla_megascale_transfer_type"].lower().replace("_", "-")
    answer = next(
        (
            other
            for other in computation.operations.values()
            if other.opcode == "recv" and f'"{told["_xla_host_transfer_rendezvous"]}"' in other.rest
        ),
        operation,
    )
    return Collective(
        kind=SENT.get(kind, kind),
        axis=said(slice_axes),
        count=times,
        operand_bytes=times * num_bytes(parts_of(operation.type)[0]),
        result_bytes=times * num_bytes(parts_of(answer.type)[0]),
        group=math.prod(mesh[axis] for axis in slice_axes),
        is_overlapped=_is_overlapped(computation, operation) or _is_overlapped(computation, answer),
        network="dcn",
        shape=plain_type(parts_of(answer.type)[0]),
        **_origin(module, computation, operation, None),
    )


def _is_overlapped(computation: Computation, operation: Operation) -> bool:
    """Whether something is computed between a start and its done, in the order of the schedule."""
    after = iter(computation.operations.values())
    for other in after:
        if other.name == operation.name:
            break
    computed = False
    for other in after:
        if operation.name in other.operands and other.opcode.endswith(("-done", "-update")):
            return computed
        computed |= other.opcode in COMPUTE
    return False


# Where it comes from --------------------------------------------------------------------------------------------------


def _origin(module: Module, computation: Computation, operation: Operation, caller: Caller) -> dict[str, str]:
    """The line of source and jax's name of an operation; of its neighbours where the compiler made it itself."""
    near = [operation, *([caller[1], computation.root] if caller else []), *_neighbours(computation, operation)]
    if caller:
        near += _neighbours(*caller)
    named = [other for other in near if "op_name=" in other.rest]
    told = next((other for other in named if source_of(module, other)), named[0] if named else operation)
    name = re.search(r'op_name="([^"]*)"', told.rest)
    return {"source": source_of(module, told), "operation": name[1] if name else ""}


def _neighbours(computation: Computation, operation: Operation, limit: int = 64) -> list[Operation]:
    """What an operation's operands come from, nearest first, then what takes its result and the results of that."""
    found, waiting = {}, collections.deque(operation.operands)
    while waiting and len(found) < limit:
        name = waiting.popleft()
        if name in computation.operations and name not in found:
            found[name] = computation.operations[name]
            waiting.extend(found[name].operands)
    users = {operation.name: operation}
    for other in computation.operations.values():  # in the order of the schedule: a user stands after what it uses
        if not users.keys().isdisjoint(other.operands) and len(users) < limit:
            users[other.name] = other
    return [*found.values(), *users.values()]


def source_of(module: Module, operation: Operation) -> str:
    """`model/layers.py:46`: the innermost line of this project on the operation's stack, else its innermost line.

    `parallel/sharding.py` is where every product and layout passes through; who called it is the answer.
    """
    plain = re.search(r'source_file="([^"]*)"(?: source_line=(\d+))?', operation.rest)
    if plain:
        return f"{relative(plain[1])}:{plain[2]}"
    frame = re.search(r"stack_frame_id=(\d+)", operation.rest)
    lines = list(_stack(module, int(frame[1]))) if frame else []
    ours = [line for line in lines if not line.startswith(("/", "<")) and "site-packages" not in line]
    told = [line for line in ours if not line.startswith(PASSED_THROUGH)]
    return next(iter(told or ours or lines), "")


def _stack(module: Module, frame: int) -> Iterator[str]:
    """Lines of a stack from the inside out."""
    seen = set()
    while frame in module.frames and frame not in seen:
        seen.add(frame)
        row = module.frames[frame]
        location = module.locations[row["file_location_id"]]
        yield f"{relative(module.files[location['file_name_id']])}:{location['line']}"
        frame = row.get("parent_frame_id", 0) - 1


@functools.cache
def relative(path: str) -> str:
    """A file of this project as it is called from its root; another one as it is."""
    return path.removeprefix(f"{ROOT}/")


def kernels(module: Module) -> dict[str, int]:
    """Pallas calls by name, and how often each runs in a step: {"flash_forward": 32, …}"""
    counts: collections.Counter[str] = collections.Counter()
    for name, times in executions(module).items():
        for operation in module.computations[name].operations.values():
            if operation.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in operation.rest:
                counts[kernel_name(operation)] += times
    return dict(counts.most_common())


def kernel_name(operation: Operation) -> str:
    """The name that the kernel was given, else the function it stands in."""
    told = re.search(r'op_name="([^"]*)"', operation.rest)
    path = [part for part in (told[1] if told else "").split("/") if part != "pallas_call"]
    if path and path[-1]:
        return re.sub(r"^jit\((.*)\)$", r"\1", path[-1])
    return re.sub(r"\.\d+$", "", operation.name)


def summary(rows: Sequence[Collective]) -> list[dict[str, Any]]:
    """Collectives added up by kind, axis and network: what `python -m perf compile --json` prints."""
    alike: dict[tuple[str, str, str], list[Collective]] = {}
    for row in rows:
        alike.setdefault((row.kind, row.axis, row.network), []).append(row)
    sums = [
        {
            "kind": kind,
            "axis": axis,
            "network": network,
            "count": sum(row.count for row in some),
            "operand_bytes": sum(row.operand_bytes for row in some),
            "result_bytes": sum(row.result_bytes for row in some),
            "wire_bytes": round(sum(row.wire_bytes for row in some)),
            "overlapped_bytes": round(sum(row.wire_bytes for row in some if row.is_overlapped)),
        }
        for (kind, axis, network), some in alike.items()
    ]
    return sorted(sums, key=lambda row: -row["wire_bytes"])
