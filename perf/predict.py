"""Seconds of a step: each operation's compute, memory or wire time, and what of it hides behind what. Few constants.

    predict(job, find("v5p"))  ->  Prediction(seconds=…, parts=(…), bound="compute", …)

An operation takes launch + (compute³ + memory³)^⅓, where compute = FLOPs / (peak × share), a product's share falls with
small M, N, K, and memory = bytes / (bandwidth × share). A step's parameter traffic hides behind its compute as
(busy^q + traffic^q)^(1/q); a pipeline's devices wait (p - 1) / (virtual × microbatches) of the busy time. Many jobs are
computed at once: `times` is one pass over arrays.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from model import cost
from parallel.chips import Chip
from perf.constants import CLASSES, Constants, family, load
from perf.operations import Operation, operations
from perf.wires import wire
from perf.work import Job

SHARPNESS = 3.0  # of an operation's compute hiding its memory traffic, or the other way round
TENSOR, CONTEXT, EXPERT, FSDP, DATA = 1, 2, 3, 4, 5
AXES = {"": 0, "tensor": TENSOR, "context": CONTEXT, "expert": EXPERT, "fsdp": FSDP, "data": DATA, "slices": DATA}
BOUND = ("matmul", "memory", "link", "network", "tensor", "expert")


class Part(NamedTuple):
    """What a share of the step is spent on. `seconds` of all parts sum to the step's."""

    name: str
    kind: str  # matmul, attention, vector, collective, bubble, overhead
    seconds: float  # that the step is longer for it
    compute: float  # seconds that each would take alone
    memory: float
    wire: float
    flops: float
    bytes: float
    count: float  # times a step


class Prediction(NamedTuple):
    """A step, or a request."""

    seconds: float
    parts: tuple[Part, ...]
    bound: str  # what takes the most of it: compute, memory, or the axis of a collective, bubble, overhead
    flops: float  # the model's, over all devices
    mfu: float  # of the chips' bf16 peak


class Table:
    """Operations of some jobs as arrays; which constant each takes is an index into `names`."""

    def __init__(self, jobs: Sequence[Job], chips: Sequence[Chip]):
        self.jobs, self.chips = list(jobs), list(chips)
        self.names: list[str] = []
        self._places: dict[str, int] = {}
        rows = [(row, op) for row, job in enumerate(self.jobs) for op in operations(job)]
        self.ops = [op for _, op in rows]
        self.row = np.array([row for row, _ in rows])
        self._fill([(self.jobs[row], self.chips[row], op) for row, op in rows])
        self._fill_rows()

    def _index(self, name: str) -> int:
        if name not in self._places:
            self._places[name] = len(self.names)
            self.names.append(name)
        return self._places[name]

    def _fill(self, rows: list[tuple[Job, Chip, Operation]]) -> None:
        """Times at the stated rates, and the constants of each operation."""
        wires = [wire(op, chip, job.layout) if op.kind == "collective" else (0.0, 0.0, 0.0) for job, chip, op in rows]
        self.inside, self.between, self.hops = (np.array(column) for column in zip(*wires, strict=True))
        self.compute = np.array([op.flops / chip.rate(op.number) * chip.devices_per_chip for _, chip, op in rows])
        self.memory = np.array([op.bytes / chip.hbm_bandwidth * chip.devices_per_chip for _, chip, op in rows])
        self.small = np.array([_smallness(op) for _, _, op in rows])
        self.count = np.array([op.count for _, _, op in rows], float)
        self.axis = np.array([AXES[op.axis] for _, _, op in rows])
        self.in_pipe = np.array([op.in_pipe for _, _, op in rows])
        self.is_attention = np.array([op.kind == "attention" for _, _, op in rows])
        self.is_vector = np.array([op.kind == "vector" for _, _, op in rows])
        self.is_collective = np.array([op.kind == "collective" for _, _, op in rows])
        self.is_expert = np.array([op.kind == "matmul" and op.name.startswith("experts") for _, _, op in rows])
        names = [_of_operation(job, chip, op) for job, chip, op in rows]
        self.of_operation = {key: np.array([self._index(row[key]) for row in names]) for key in names[0]}

    def _fill_rows(self) -> None:
        """What there is one of a job."""
        self.is_train = np.array([job.kind == "train" for job in self.jobs])
        self.bubble = np.array([_bubble(job) for job in self.jobs])
        self.tokens = np.array([max(job.output, 1) for job in self.jobs], float)
        names = ("overlap", "tensor", "expert", "host", "whole")
        self.of_row = {name: np.array([self._index(f"{name}/{job.stack}") for job in self.jobs]) for name in names}

    def logs(self, constants: Constants) -> np.ndarray:
        """Logarithms of the constants, in the order of `names`."""
        return np.array([constants.log(name) for name in self.names])


def _smallness(op: Operation) -> float:
    """1/M + 1/N + 1/K of a product."""
    if op.kind != "matmul":
        return 0.0
    return sum(1 / max(size, 1.0) for size in (op.rows, op.columns, op.inner))


def _of_operation(job: Job, chip: Chip, op: Operation) -> dict[str, str]:
    """Names of the constants that an operation's time takes."""
    vendor, die = chip.vendor, family(chip.name)
    return {
        "matmul": f"matmul/{die}/{CLASSES[op.number]}",
        "attention": f"attention/{die}",
        "memory": f"memory/{vendor}",
        "ramp": f"ramp/{vendor}",
        "vectors": f"vectors/{job.stack}",
        "launch": f"launch/{job.stack}",
        "experts": f"experts/{job.stack}",
        "link": f"link/{vendor}",
        "network": f"network/{vendor}",
        "hop": f"hop/{vendor}",
    }


def _bubble(job: Job) -> float:
    """Idle share of a pipeline's busy time."""
    return (job.layout.pipe - 1) / (job.layout.virtual * job.microbatches) if job.kind == "train" else 0.0


class Times(NamedTuple):
    """Seconds of each operation, all its times together, and of each job."""

    compute: np.ndarray
    memory: np.ndarray
    wire: np.ndarray
    exposed: np.ndarray  # of it, that the step is longer for it
    bubble: np.ndarray  # of a job
    overhead: np.ndarray  # of a job, in which nothing runs
    total: np.ndarray  # of a job


def times(table: Table, logs: np.ndarray) -> Times:
    """All jobs of a table with constants whose logarithms are `logs`."""
    of = {key: _bounded(key, np.exp(logs[index])) for key, index in table.of_operation.items()}
    share = np.where(table.is_attention, of["attention"], 1 / (1 + of["ramp"] * table.small)) * of["matmul"]
    compute = table.compute / np.minimum(share * np.where(table.is_expert, of["experts"], 1.0), 1.0)
    memory = table.memory / of["memory"] * np.where(table.is_vector, of["vectors"], 1.0)
    on_wire = table.inside / of["link"] + table.between / of["network"] + of["hop"] * table.hops
    local = _hidden(compute, memory, SHARPNESS)
    taken = (np.where(table.is_collective, on_wire, local) + of["launch"]) * table.count
    return _summed(table, logs, taken, (compute * table.count, memory * table.count, on_wire * table.count))


def _bounded(key: str, values: np.ndarray) -> np.ndarray:
    """Nothing runs above its peak; links may pass the rates that are stated for them by a little."""
    return np.minimum(values, 1.2 if key in ("link", "network") else 1.0) if key in BOUND else values


def _hidden(a: np.ndarray, b: np.ndarray, sharpness: float | np.ndarray) -> np.ndarray:
    """Two times of which the shorter hides behind the longer, but not wholly."""
    most = np.maximum(np.maximum(a, b), 1e-30)
    return most * ((a / most) ** sharpness + (b / most) ** sharpness) ** (1 / sharpness)


def _summed(table: Table, logs: np.ndarray, taken: np.ndarray, alone: tuple[np.ndarray, ...]) -> Times:
    """From operations to jobs."""
    of = {key: _bounded(key, np.exp(logs[index])) for key, index in table.of_row.items()}
    per_row = lambda values: np.bincount(table.row, values, len(table.jobs))  # noqa: E731
    axis, row = table.axis, table.row
    shown = np.where(table.is_train, of["tensor"], 1.0)[row] * ((axis == TENSOR) | (axis == CONTEXT))
    shown = shown + np.where(table.is_train, of["expert"], 1.0)[row] * (axis == EXPERT)
    is_local = ~table.is_collective
    exposed = taken * np.where(is_local, 1.0, shown)
    busy = per_row(exposed * table.in_pipe)
    once = per_row(exposed * ~table.in_pipe)
    traffic = per_row(taken * (axis >= FSDP))
    added = _hidden(busy, traffic, 1 + of["overlap"]) - busy
    exposed = exposed + taken * (axis >= FSDP) * (added / np.maximum(traffic, 1e-30))[row]
    bubble, overhead = busy * table.bubble, of["host"] * table.tokens
    total = busy + added + bubble + once + overhead
    compute, memory, on_wire = alone
    whole = of["whole"]
    return Times(compute, memory, on_wire, exposed * whole[row], bubble * whole, overhead * whole, total * whole)


@functools.lru_cache(maxsize=4096)
def predict(job: Job, chip: Chip) -> Prediction:
    """One job, as the constants that the project ships have it."""
    return predict_all([job], [chip])[0]


def predict_all(jobs: Sequence[Job], chips: Sequence[Chip], constants: Constants | None = None) -> list[Prediction]:
    """Many at once: a thousand layouts take about a second."""
    if not jobs:
        return []
    table = Table(jobs, chips)
    found = times(table, table.logs(constants or load()))
    starts = np.searchsorted(table.row, np.arange(len(jobs) + 1))
    return [_prediction(table, found, row, slice(starts[row], starts[row + 1])) for row in range(len(jobs))]


def _prediction(table: Table, found: Times, row: int, ops: slice) -> Prediction:
    job, chip = table.jobs[row], table.chips[row]
    columns = np.stack([found.exposed[ops], found.compute[ops], found.memory[ops], found.wire[ops]], axis=1).tolist()
    parts = [
        Part(
            op.name, op.kind, exposed, compute, memory, on_wire, op.flops * op.count, op.bytes * op.count, op.count,
        )
        for op, (exposed, compute, memory, on_wire) in zip(table.ops[ops], columns, strict=True)
    ]  # fmt: skip
    idle = functools.partial(Part, compute=0.0, memory=0.0, wire=0.0, flops=0.0, bytes=0.0, count=1.0)
    if found.bubble[row]:
        parts.append(idle("pipeline bubble", "bubble", float(found.bubble[row])))
    parts.append(idle("host", "overhead", float(found.overhead[row])))
    flops, seconds = model_flops(job), float(found.total[row])
    peak = chip.bf16_flops * job.layout.num_devices / chip.devices_per_chip
    return Prediction(seconds, tuple(parts), _bound(table.ops[ops], parts), flops, flops / seconds / peak)


def _bound(ops: Sequence[Operation], parts: Sequence[Part]) -> str:
    """Where most of the time goes."""
    sums: dict[str, float] = {}
    axes = [op.axis for op in ops] + [""] * (len(parts) - len(ops))
    for part, axis in zip(parts, axes, strict=True):
        local = "compute" if part.compute >= part.memory else "memory"
        name = axis or (part.kind if part.kind in ("bubble", "overhead") else local)
        sums[name] = sums.get(name, 0.0) + part.seconds
    return max(sums, key=lambda name: sums[name])


def model_flops(job: Job) -> float:
    """FLOPs that the model needs, by the convention of model/cost.py."""
    model = job.model
    if job.kind == "train":
        return cost.train_flops(model, job.length) * job.tokens
    if job.kind == "prefill":
        return float(cost.prefill_flops(model, job.length)) * job.batch
    if job.kind == "decode":
        return float(cost.decode_flops(model, job.length)) * job.batch
    tokens = cost.decode_flops(model, job.length + job.output // 2) * max(job.output - 1, 1)
    return float(cost.prefill_flops(model, job.length) + tokens) * job.batch
