"""Reports as aligned plain text, and as what JSON can hold. Computes nothing."""

from collections.abc import Iterator, Sequence
from typing import Any

from perf import hlo
from perf.advice import Change, blame
from perf.aot import Report
from perf.columns import aligned, gib
from perf.hlo import Collective
from perf.shardings import Row, total


def compile_json(report: Report, changes: Sequence[Change]) -> dict[str, Any]:
    """One object; bytes are of one device, and of one step where they move."""
    return {
        "step": report.work.step,
        "topology": report.topology.name,
        "devices": report.topology.num_devices,
        "mesh": report.mesh,
        "fits": report.fits,
        "hbm_bytes": report.topology.hbm_bytes,
        "peak_bytes": report.peak_bytes,
        "argument_bytes": report.argument_bytes,
        "output_bytes": report.output_bytes,
        "alias_bytes": report.alias_bytes,
        "temp_bytes": report.temp_bytes,
        "breakdown": report.breakdown,
        "collectives": hlo.summary(report.collectives),
        "wire_bytes": report.wire_bytes,
        "kernels": report.kernels,
        "lower_cpu_seconds": round(report.lower_cpu_seconds, 2),
        "compile_cpu_seconds": round(report.compile_cpu_seconds, 2),
        **({} if report.fits else {"blame": dict(blame(report)), "changes": [row._asdict() for row in changes]}),
    }


def compile_lines(report: Report, changes: Sequence[Change]) -> Iterator[str]:
    """What `python -m perf compile` prints."""
    topology = report.topology
    shape = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "of one device"
    yield f"{report.work.step} step on {topology.name}: {topology.num_devices} devices, mesh {shape}"
    verb = "fits in" if report.fits else "DOES NOT FIT in"
    yield f"peak {gib(report.peak_bytes)} a device {verb} {gib(topology.hbm_bytes)}"
    yield from (f"  {kind:<12} {gib(bytes_):>12}" for kind, bytes_ in report.breakdown.items() if bytes_)
    arguments = f"arguments {gib(report.argument_bytes)}, temporaries {gib(report.temp_bytes)}"
    seconds = f"{report.compile_cpu_seconds:.1f} CPU seconds, of which lowering {report.lower_cpu_seconds:.1f}"
    yield f"{arguments}; {seconds}"
    if not report.fits:
        yield f"to blame: {', '.join(f'{kind} {gib(bytes_)}' for kind, bytes_ in blame(report))}"
        yield from (
            f"  try {change.settings}: about {gib(change.peak_bytes)}, "
            f"{'fits' if change.fits else 'still too much, but less'}"
            for change in changes
        )
        if not changes:
            yield "  no single setting is enough: take more chips"
        return
    if report.collectives:
        unit = "token" if report.work.step == "decode" else "step"
        yield f"collectives of a device and {unit}, MiB:"
        head = ("kind", "axis", "over", "times", "operand", "result", "wire", "overlapped")
        rows = [
            (
                row["kind"], row["axis"], row["network"], f"{row['count']}",
                *(mib(row[name]) for name in ("operand_bytes", "result_bytes", "wire_bytes", "overlapped_bytes")),
            )
            for row in hlo.summary(report.collectives)
        ]  # fmt: skip
        yield from aligned([head, *rows, ("in all", "", "", "", "", "", mib(report.wire_bytes), "")], right=range(3, 8))
    if report.kernels:
        yield f"kernels: {', '.join(f'{name} x {count}' for name, count in report.kernels.items())}"


def collective_lines(rows: Sequence[Collective]) -> Iterator[str]:
    """Every collective with its line of source, those that are alike in one line."""
    head = ("kind", "axis", "times", "MiB sent", "operand MiB", "result MiB", "", "result", "source", "from")
    alike: dict[tuple, list[Collective]] = {}
    for row in rows:
        key = (row.kind, row.axis, row.network, row.is_overlapped, row.shape, row.source, row.operation)
        alike.setdefault(key, []).append(row)
    most_first = sorted(alike.values(), key=lambda some: -sum(row.wire_bytes for row in some))
    yield from aligned(
        [
            head,
            *(
                (
                    row.kind, row.axis if row.network == "ici" else f"{row.axis} (dcn)",
                    f"{sum(row.count for row in some)}", mib(sum(row.wire_bytes for row in some)),
                    mib(sum(row.operand_bytes for row in some)), mib(sum(row.result_bytes for row in some)),
                    "overlapped" if row.is_overlapped else "", short(row.shape, 32), row.source, short(row.operation),
                )
                for some in most_first
                for row in some[:1]
            ),
        ],
        right=range(2, 6),
    )  # fmt: skip


def collective_json(row: Collective) -> dict[str, Any]:
    """One collective."""
    return {
        "kind": row.kind,
        "axis": row.axis,
        "count": row.count,
        "operand_bytes": row.operand_bytes,
        "result_bytes": row.result_bytes,
        "wire_bytes": round(row.wire_bytes),
        "overlapped": row.is_overlapped,
        "network": row.network,
        "shape": row.shape,
        "source": row.source,
        "operation": row.operation,
    }


def sharding_lines(rows: Sequence[Row]) -> Iterator[str]:
    """What `python -m perf shardings` prints of the state."""
    head = ("tensor", "names", "shape", "spec", "type", "MiB")
    listed = [
        (
            row.path,
            ",".join(name or "-" for name in row.names),
            ",".join(map(str, row.shape)),
            " ".join(f"({axes})" if "," in axes else axes or "-" for axes in row.spec),
            row.type,
            mib(row.bytes),
        )
        for row in rows
    ]
    yield from aligned([head, *listed, ("in all", "", "", "", "", mib(total(list(rows))))], right=(5,))
    flags = [row for row in rows if row.flag]
    yield f"{len(flags)} tensors are whole by accident" + ":" * bool(flags)
    yield from (f"  {row.path} ({mib(row.bytes)} MiB): {row.flag}" for row in flags)


def short(operation: str, most: int = 60) -> str:
    """The end of a text that is long, and of jax's name of an operation without the words that say nothing."""
    words = [word for word in operation.split("/") if word not in ("while", "body", "closed_call", "checkpoint")]
    text = "/".join(words[1:] if len(words) > 1 else words)
    return text if len(text) <= most else "…" + text[-most + 1 :]


def mib(bytes_: Any) -> str:
    """1,792.0"""
    return f"{bytes_ / 2**20:,.2f}"


def quantization_lines(result: dict[str, Any]) -> Iterator[str]:
    """What `python -m perf quantize` prints."""
    twin = ", rescaled" if result["is_rescaled"] else ""
    yield f"{result['model']}{twin}, {result['tokens']:,} tokens of {result['file']}"
    yield f"{'weights':<9} {'MB':>7} {'smaller':>8} {'perplexity':>11} {'increase':>9} {'tok/s':>7} {'speed-up':>8}"
    for name, row in result["results"].items():
        loss = f"{row['perplexity']:>11.4f} {row['increase']:>+9.2%}" if "perplexity" in row else " " * 21
        speed = f"{row['tokens_per_second']:>7.1f} {row['speedup']:>7.2f}x" if "speedup" in row else ""
        yield f"{name:<9} {row['bytes'] / 1e6:>7.1f} {row['bytes_ratio']:>7.2f}x {loss} {speed}".rstrip()
