"""Plans as pictures: roofline, timeline of a step, memory, scaling, the front of serving, predicted beside measured.

Every function returns a figure; `png` makes bytes of one. Draws what it is given and predicts nothing.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from parallel.chips import Chip
from perf.columns import seconds, unit_of
from perf.explanation import WORDS, mesh_words
from perf.plan import Plan
from perf.predict import Part

# Okabe and Ito's colours, told apart by everybody
COLOURS = {
    "matmul": "#0072B2", "attention": "#E69F00", "vector": "#009E73", "collective": "#CC79A7", "bubble": "#B0B0B0",
    "overhead": "#D8D8D8",
}  # fmt: skip
MEMORY = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#B0B0B0", "#D55E00")
INK, GRID = "#222222", "#e6e6e6"
STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "axes.axisbelow": True, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 10, "text.color": INK, "axes.labelcolor": INK, "svg.hashsalt": "meshlight",
}  # fmt: skip
PASSES = re.compile(r"(, (dX|dW|again|backward))+$")  # of an operation, that a picture does not tell apart
LABELLED = 0.055  # of a bar's length: shorter pieces have no room for a name


class Piece(NamedTuple):
    """What a step spends on one operation, all its passes together."""

    name: str
    kind: str
    seconds: float  # that nothing hides
    wire: float  # on the network, hidden or not
    flops: float
    bytes: float


class Point(NamedTuple):
    """The best plan for so many chips."""

    chips: int
    plan: Plan


def png(figure: Figure) -> bytes:
    """A figure as a file's bytes."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    return held.getvalue()


def _styled(draw: Callable) -> Callable:
    """Draw in the house's style."""

    def drawn(*arguments, **options) -> Figure:
        with plt.rc_context(STYLE):
            return draw(*arguments, **options)

    drawn.__doc__ = draw.__doc__
    return drawn


def _plainly(*axis: Axis) -> None:
    """Numbers of a logarithmic axis as they are written: 0.2 5 1,000."""
    for one in axis:
        one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.15g}"))
        one.set_minor_formatter(NullFormatter())


def pieces(parts: Sequence[Part]) -> list[Piece]:
    """Operations with their passes added up, what is computed first, then what is waited for."""
    found: dict[tuple[str, str], Piece] = {}
    for part in parts:
        name = PASSES.sub("", part.name)
        old = found.get((name, part.kind), Piece(name, part.kind, 0.0, 0.0, 0.0, 0.0))
        wire = old.wire + (part.wire if part.kind == "collective" else 0.0)
        flops, moved = old.flops + part.flops, old.bytes + part.bytes
        found[name, part.kind] = Piece(name, part.kind, old.seconds + part.seconds, wire, flops, moved)
    kinds = list(COLOURS)
    return sorted(found.values(), key=lambda piece: (kinds.index(piece.kind), -piece.seconds))


# One plan -------------------------------------------------------------------------------------------------------------


@_styled
def roofline(plan: Plan, chip: Chip) -> Figure:
    """Each operation of a device by its FLOPs a byte; as large as its share of the step."""
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    all_ = pieces(plan.prediction.parts)
    shown = [piece for piece in all_ if piece.flops and piece.bytes and piece.seconds]
    number = plan.candidate.precision.compute
    peak, bandwidth = chip.rate(number) / chip.devices_per_chip, chip.hbm_bandwidth / chip.devices_per_chip
    ridge, intensities = peak / bandwidth, [piece.flops / piece.bytes for piece in shown]
    low, high = min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3
    axes.plot([low, ridge, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12], color=INK, linewidth=1.8)
    for piece, intensity in zip(shown, intensities, strict=True):
        size = 30 + 2200 * piece.seconds / plan.seconds
        rate = piece.flops / piece.seconds / 1e12
        axes.scatter(intensity, rate, s=size, color=COLOURS[piece.kind], alpha=0.75, edgecolor="white", linewidth=1)
    lowest = min([low * bandwidth, *(piece.flops / piece.seconds for piece in shown)]) / 1e12
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(lowest / 1.6, peak * 1.7 / 1e12))
    axes.set(xlabel="FLOPs a byte of memory", ylabel="TFLOP/s of a device")
    _plainly(axes.xaxis, axes.yaxis)
    small = {"textcoords": "offset points", "fontsize": 9}
    axes.annotate(f"{peak / 1e12:,.0f} TFLOP/s {number}", (high, peak / 1e12), xytext=(-2, 5), ha="right", **small)
    axes.annotate(f"{bandwidth / 1e9:,.0f} GB/s of HBM", (low, low * bandwidth / 1e12), xytext=(14, 4), **small)
    _named(axes, shown, plan.seconds)
    idle = sum(piece.seconds for piece in all_ if not piece.flops) / plan.seconds
    axes.set_title(f"Roofline: {mesh_words(plan)}")
    note = f"areas are shares of the step; {idle:.0%} of it have no FLOPs"
    axes.text(1, 1.03, note, transform=axes.transAxes, ha="right", fontsize=9, color="#666666")
    return figure


def _named(axes, shown: Sequence[Piece], whole: float) -> None:
    """Names below the points, in their order from left to right and on two lines, so that none lies on another."""
    axes.figure.canvas.draw()
    ordered = sorted(shown, key=lambda piece: (piece.flops / piece.bytes, piece.name))
    points = [(piece.flops / piece.bytes, piece.flops / piece.seconds / 1e12) for piece in ordered]
    pixels = [axes.transData.transform(point) for point in points]
    places = spread([x for x, _ in pixels], apart=75.0, low=axes.bbox.x0 + 40, high=axes.bbox.x1 - 60)
    for at, (piece, point, (x, y), place) in enumerate(zip(ordered, points, pixels, places, strict=True)):
        lowest = min(b for a, b in pixels if abs(a - x) < 200)
        drop = lowest - y - (46 if at % 2 == 0 else 84)
        scale = 72 / axes.figure.dpi
        axes.annotate(
            f"{piece.name}\n{piece.seconds / whole:.0%}", point, xytext=((place - x) * scale, drop * scale),
            textcoords="offset points", ha="center", va="top", fontsize=8.5, linespacing=1.05,
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def spread(wanted: Sequence[float], *, apart: float, low: float, high: float) -> list[float]:
    """Ascending places near the wanted ones, at least so far apart, between two bounds where there is room.

    spread([1, 1, 9], apart=2, low=0, high=10)  ->  [0, 2, 9]
    """
    groups: list[tuple[float, int]] = []  # centre and number of places that touch
    for place in wanted:
        centre, count = place, 1
        while True:
            half = (count - 1) * apart / 2
            centre = max(low + half, min(centre, high - half))
            if not groups or groups[-1][0] + (groups[-1][1] - 1) * apart / 2 + apart <= centre - half:
                break
            before, more = groups.pop()
            centre, count = (before * more + centre * count) / (more + count), more + count
        groups.append((centre, count))
    return [centre + (at - (count - 1) / 2) * apart for centre, count in groups for at in range(count)]


@_styled
def timeline(plan: Plan) -> Figure:
    """A step as it is spent, and the network beside it: what it moves meanwhile, and what the step waits for."""
    figure, axes = plt.subplots(figsize=(11, 3.2), layout="constrained")
    scale, unit = unit_of(plan.seconds)
    shown = [piece for piece in pieces(plan.prediction.parts) if piece.seconds or piece.wire]
    at = 0.0
    busy = sum(piece.seconds for piece in shown if piece.kind != "collective")
    hidden = sum(max(piece.wire - piece.seconds, 0.0) for piece in shown if piece.kind == "collective")
    beside = 0.0
    for piece in sorted(shown, key=lambda piece: piece.kind in ("bubble", "overhead")):
        colour, width = COLOURS[piece.kind], piece.seconds * scale
        axes.barh(1, width, left=at, height=0.62, color=colour, edgecolor="white", linewidth=1.2)
        if piece.seconds > LABELLED * plan.seconds:
            _inside(axes, at + width / 2, 1, piece.name, piece.seconds / plan.seconds, colour)
        if piece.kind == "collective" and piece.wire:
            under = max(piece.wire - piece.seconds, 0.0) * scale * (min(busy / hidden, 1.0) if hidden else 0.0)
            axes.barh(0, under, left=beside, height=0.62, color=colour, alpha=0.35, edgecolor="white", linewidth=1.2)
            if under > LABELLED * plan.seconds * scale:
                _inside(axes, beside + under / 2, 0, piece.name, None, "#ffffff")
            beside += under
            axes.barh(0, width, left=at, height=0.62, color=colour, edgecolor="white", linewidth=1.2)
        at += width
    axes.set(yticks=[0, 1], yticklabels=["network", "step"], xlabel=unit, xlim=(0, at * 1.005), ylim=(-0.5, 1.5))
    axes.grid(axis="y", visible=False)
    axes.set_title(f"One step of {seconds(plan.seconds)}: {mesh_words(plan)}")
    kinds = [kind for kind in COLOURS if any(piece.kind == kind and piece.seconds for piece in shown)]
    names = WORDS | {"collective": "waiting for the network"}
    handles = [Patch(color=COLOURS[kind], label=names[kind]) for kind in kinds]
    if hidden:
        handles.append(Patch(color=COLOURS["collective"], alpha=0.35, label="network, hidden behind the step"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def _inside(axes, x: int | float, y: int | float, name: str, share: float | None, colour: str) -> None:
    """A name within its piece of a bar, broken into lines where that is narrow."""
    lines = textwrap.wrap(name, 12 if (share or 1.0) > 0.1 else 9, break_long_words=False)
    lines += [f"{share:.0%}"] if share else []
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 140 else INK
    axes.text(x, y, "\n".join(lines), ha="center", va="center", fontsize=8, color=ink, linespacing=1.1)


# Several plans --------------------------------------------------------------------------------------------------------


@_styled
def memory(plans: Sequence[Plan], room: int) -> Figure:
    """What a device holds at the peak of each plan."""
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.42 * len(plans)), layout="constrained")
    kinds = [
        kind
        for kind in dict.fromkeys(k for plan in plans for k in plan.memory)
        if any(p.memory.get(kind) for p in plans)
    ]
    places = range(len(plans), 0, -1)
    for place, plan in zip(places, plans, strict=True):
        left = 0.0
        for kind, colour in zip(kinds, MEMORY, strict=False):
            width = plan.memory.get(kind, 0) / 2**30
            axes.barh(place, width, left=left, height=0.68, color=colour, edgecolor="white", linewidth=0.8)
            if width > 0.06 * room / 2**30:
                _inside(axes, left + width / 2, place, f"{width:,.1f}", None, colour)
            left += width
    axes.axvline(room / 2**30, color=INK, linewidth=1.6)
    axes.annotate(
        f"{room / 2**30:,.1f} GiB", (room / 2**30, len(plans) + 0.52), xytext=(4, 0), textcoords="offset points",
        ha="left", va="center", fontsize=9,
    )  # fmt: skip
    names = [f"{rank}  {mesh_words(plan)}, batch {plan.candidate.batch:,}" for rank, plan in enumerate(plans, 1)]
    axes.set(yticks=list(places), yticklabels=names, xlabel="GiB of a device", xlim=(0, room / 2**30 * 1.1))
    axes.set_ylim(0.4, len(plans) + 0.75)
    axes.grid(axis="y", visible=False)
    axes.set_title("Memory at the peak")
    handles = [Patch(color=colour, label=kind) for kind, colour in zip(kinds, MEMORY, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


@_styled
def scaling(points: Sequence[Point], asked: int, *, is_fixed: bool) -> Figure:
    """The best plan for fewer and for more chips: seconds of a step, tokens a second of a chip."""
    figure, (time, rate) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    chips = [point.chips for point in points]
    steps = [point.plan.seconds for point in points]
    rates = [point.plan.tokens_per_second_per_chip for point in points]
    here = chips.index(asked) if asked in chips else 0
    scale, unit = unit_of(steps[here])
    if is_fixed:
        ideal = [scale * steps[here] * chips[here] / n for n in chips]
        time.plot(
            chips, ideal, color="#999999", linestyle=(0, (4, 3)), linewidth=1.4, label=f"as well as {asked:,} chips"
        )
    time.plot(chips, [scale * value for value in steps], color=COLOURS["matmul"], marker="o", linewidth=2)
    rate.plot(chips, rates, color=COLOURS["matmul"], marker="o", linewidth=2)
    for axes, ys in ((time, [scale * value for value in steps]), (rate, rates)):
        axes.scatter(
            [chips[here]], [ys[here]], s=130, facecolor="none", edgecolor=COLOURS["attention"], linewidth=2.4, zorder=3
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(chips, [f"{n:,}" for n in chips])
        axes.minorticks_off()
        axes.set_xlabel("chips")
    for at, point in enumerate(points):
        rate.annotate(
            "\n".join(mesh_words(point.plan).split(" · ")), (point.chips, rates[at]), xytext=(0, -9),
            textcoords="offset points", ha="center", va="top", fontsize=7.5, color="#555555",
        )  # fmt: skip
    time.set_yscale("log")
    _plainly(time.yaxis)
    time.set(title="Time of a step" if is_fixed else "Time of a step, each with its own batch", ylabel=unit)
    rate.margins(x=0.1)
    rate.set(title="Tokens a second of a chip", ylim=(0, max(rates) * 1.12))
    if is_fixed:
        time.legend(frameon=False, fontsize=9)
    return figure


@_styled
def front(plans: Sequence[Plan], *, what: str) -> Figure:
    """Serving: latency against throughput, no plan of which another beats."""
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    scale, unit = unit_of(max(plan.seconds for plan in plans))
    meshes = list(dict.fromkeys(mesh_words(plan) for plan in plans))
    xs, ys = [scale * plan.seconds for plan in plans], [plan.tokens_per_second_per_chip for plan in plans]
    axes.plot(xs, ys, color="#bbbbbb", linewidth=1.4, zorder=1)
    for mesh, colour in zip(meshes, (MEMORY * math.ceil(len(meshes) / len(MEMORY))), strict=False):
        mine = [at for at, plan in enumerate(plans) if mesh_words(plan) == mesh]
        axes.scatter([xs[at] for at in mine], [ys[at] for at in mine], s=52, color=colour, zorder=2, label=mesh)
    axes.set(xlabel=f"{what}, {unit}", ylabel="tokens/s/chip", xlim=(0, max(xs) * 1.2), ylim=(0, max(ys) * 1.1))
    last = (-1.0, -1.0)
    for plan, x, y in zip(plans, xs, ys, strict=True):
        if math.hypot((x - last[0]) / max(xs), (y - last[1]) / max(ys)) < 0.05:
            continue  # no room
        last = (x, y)
        cost = f", US$ {plan.cost:.3g}" if plan.cost is not None else ""
        axes.annotate(
            f"batch {plan.candidate.batch:,}{cost}", (x, y), xytext=(8, -4), textcoords="offset points", fontsize=8,
            va="top", color="#555555",
        )  # fmt: skip
    axes.set_title("None is better in latency and throughput together")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


# Beside what was measured ---------------------------------------------------------------------------------------------


@_styled
def measured(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted against measured, each row of perf/score.py as a point; rows without a prediction are left out."""
    shown = [row for row in rows if row.get("predicted") and row.get("measured")]
    figure, axes = plt.subplots(figsize=(6.4, 6), layout="constrained")
    kinds = list(dict.fromkeys(row["kind"] for row in shown))
    low = min(min(row["predicted"], row["measured"]) for row in shown) / 2
    high = max(max(row["predicted"], row["measured"]) for row in shown) * 2
    axes.fill_between(
        [low, high], [low * 0.9, high * 0.9], [low * 1.1, high * 1.1], color="#eeeeee", label="within 10 %"
    )
    axes.plot([low, high], [low, high], color="#999999", linewidth=1)
    for kind, colour in zip(kinds, MEMORY, strict=False):
        mine = [row for row in shown if row["kind"] == kind]
        errors = sorted(abs(row["predicted"] / row["measured"] - 1) for row in mine)
        label = f"{kind}: {len(mine)} rows, median error {errors[len(errors) // 2]:.1%}"
        axes.scatter(
            [row["measured"] for row in mine], [row["predicted"] for row in mine], s=26, color=colour, alpha=0.8,
            edgecolor="white", linewidth=0.5, label=label,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel="measured, seconds", ylabel="predicted, seconds")
    axes.set_title("Predicted beside measured")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure
