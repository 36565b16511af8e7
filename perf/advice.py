"""What would make a step fit that does not: settings, and what they would come to. Arithmetic; compiles nothing."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from parallel.mesh import make_mesh
from parallel.topology import topology_devices
from perf.aot import Report, Work, batch_parts, train_sizes
from perf.memory import KEPT

POLICIES = ("none", "dots", "minimal", "attention", "full")  # each keeps less than the one before


class Change(NamedTuple):
    """Settings to give, and the peak that they would bring by the breakdown."""

    settings: str  # as the command line takes them: "model.remat=full"
    peak_bytes: int
    fits: bool


def blame(report: Report) -> list[tuple[str, int]]:
    """The kinds that take the most of the peak, down to a tenth of it."""
    rows = sorted(report.breakdown.items(), key=lambda row: -row[1])
    return [row for row in rows if row[1] >= report.peak_bytes / 10]


def changes(report: Report) -> list[Change]:
    """What to change: of each kind the mildest that fits; where none does, the strongest of each, the best first."""
    if report.work.step != "train":
        return list(_smaller_serving(report))
    before = _sizes(report, report.work)
    assert before is not None, "what was compiled has sizes"
    tried = [_mildest(report, before, kind) for kind in _candidates(report)]
    found = [change for change in tried if change is not None]
    fitting = [change for change in found if change.fits]
    return fitting or sorted(found, key=lambda change: change.peak_bytes)


def _mildest(report: Report, before: dict[str, int], kind: Iterator[tuple[str, Work]]) -> Change | None:
    """The first of a kind of change that fits, else the last that helps."""
    last = None
    for settings, work in kind:
        peak = estimate(report, before, work)
        if peak is not None and peak < report.peak_bytes:
            last = Change(settings, peak, peak <= report.topology.hbm_bytes)
            if last.fits:
                return last
    return last


def estimate(report: Report, before: dict[str, int], work: Work) -> int | None:
    """The peak of a changed step: each kind by its arithmetic, and what is no kind grows with the activations.

    None where the mesh or the model does not take the change.
    """
    after = _sizes(report, work)
    if after is None:
        return None
    kinds = sum(after.values()) - sum(before.values())
    is_same_policy = work.model.remat == report.work.model.remat
    scale = after["activations"] / before["activations"] if is_same_policy else 1.0
    other = report.breakdown["other"] * (min(scale, 1.0) - 1.0)
    return max(round(report.peak_bytes + kinds + other), sum(after[kind] for kind in KEPT))


def _sizes(report: Report, work: Work) -> dict[str, int] | None:
    """Bytes by kind of a train step on the report's slices."""
    try:
        return train_sizes(work, make_mesh(work.mesh, topology_devices(report.topology.name)))
    except ValueError:
        return None


def _candidates(report: Report) -> Iterator[Iterator[tuple[str, Work]]]:
    """Kinds of change, each as settings and the work that they make, the mildest first."""
    yield _less_kept(report.work)
    yield _other_meshes(report.work, report.mesh)
    parts = [2**power for power in range(1, report.work.train.batch_size.bit_length())]
    yield _more_parts(report.work, parts, batch_parts(report.work, report.topology))
    yield _shorter_batches(report.work, parts, batch_parts(report.work, report.topology))


def _less_kept(work: Work) -> Iterator[tuple[str, Work]]:
    """Layers that keep less and compute more again."""
    for remat in POLICIES[POLICIES.index(work.model.remat) + 1 :]:
        yield f"model.remat={remat}", dataclasses.replace(work, model=dataclasses.replace(work.model, remat=remat))


def _other_meshes(work: Work, sizes: dict[str, int]) -> Iterator[tuple[str, Work]]:
    """Weights and moments split where they are repeated, then heads and FFN split too."""
    if sizes["data"] > 1:
        mesh = dataclasses.replace(work.mesh, data=1, fsdp=sizes["fsdp"] * sizes["data"])
        yield f"mesh.data=1 mesh.fsdp={mesh.fsdp}", dataclasses.replace(work, mesh=mesh)
    for part in (2, 4, 8):
        if sizes["fsdp"] % part == 0 and work.model.num_kv_heads % (sizes["tensor"] * part) == 0:
            mesh = dataclasses.replace(work.mesh, fsdp=sizes["fsdp"] // part, tensor=sizes["tensor"] * part)
            yield f"mesh.fsdp={mesh.fsdp} mesh.tensor={mesh.tensor}", dataclasses.replace(work, mesh=mesh)


def _more_parts(work: Work, parts: list[int], devices: int) -> Iterator[tuple[str, Work]]:
    """The same batch in more parts, one after the other; each still divides over the devices."""
    for part in parts:
        accumulate = work.train.accumulate * part
        if work.train.batch_size % (accumulate * devices) == 0:
            train = dataclasses.replace(work.train, accumulate=accumulate)
            yield f"train.accumulate={accumulate}", dataclasses.replace(work, train=train)


def _shorter_batches(work: Work, parts: list[int], devices: int) -> Iterator[tuple[str, Work]]:
    """A smaller batch."""
    for part in parts:
        batch = work.train.batch_size // part
        if work.train.batch_size % part == 0 and batch % (work.train.accumulate * devices) == 0:
            train = dataclasses.replace(work.train, batch_size=batch)
            yield f"train.batch_size={batch}", dataclasses.replace(work, train=train)


def _smaller_serving(report: Report) -> Iterator[Change]:
    """A served batch or length that fits, by the cache's part of the peak."""
    cache, over = report.breakdown["cache"], report.peak_bytes - report.topology.hbm_bytes
    weights = report.breakdown["weights"]
    for part in (2, 4, 8, 16, 32, 64):
        peak = report.peak_bytes - cache + cache // part
        if cache - cache // part >= over:
            for name, value in (("--batch", report.work.batch), ("--length", report.work.length)):
                if value // part:
                    yield Change(f"{name} {value // part}", peak, True)
            return
    tensor = report.mesh.get("tensor", 1)
    for part in (2, 4, 8):
        if weights - weights // part >= over and report.work.model.num_kv_heads % (tensor * part) == 0:
            peak = report.peak_bytes - weights + weights // part
            yield Change(f"mesh.tensor={tensor * part} (on as many more chips)", peak, True)
            return
