"""What evaluations found as pictures: attention maps, and BLEU by length. Draws what it is given and judges nothing.

Every function returns a figure, and `png` makes bytes of one; `bleu_by_length` writes a file.
"""

import functools
import io
import itertools
import math
import pathlib
import warnings
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evals.attention_maps import AttentionMap

INK, SOFT, GAP, MARK = "#222222", "#777777", "#e4e4e4", "#D55E00"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito's
BLUES = ["#ffffff", "#cfe1f2", "#6aaed6", "#1f6fb2", "#0b2f66"]
SHADES = LinearSegmentedColormap.from_list("meshlight", BLUES).with_extremes(bad=GAP)
SMALL_POWER = 0.5  # of weights in small maps, so that 5 % can be seen beside 100 %
CELL = 0.3  # inches of a token in a large map
WIDEST = 14.0  # inches of an overview
FALLBACKS = (  # for letters that DejaVu lacks, where one of them is installed
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS",
)  # fmt: skip


@functools.cache
def fonts() -> list[str]:
    """Families to look for a letter in, one after the other."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in FALLBACKS if name in installed)]


def png(figure: Figure) -> bytes:
    """A figure as a file's bytes. A letter that no font has is a box."""
    held = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(held, metadata={"Software": None})
    return held.getvalue()


# One head -------------------------------------------------------------------------------------------------------------


def heat_map(map: AttentionMap, head: int, *, queries: Collection[int] = (), keys: Collection[int] = ()) -> Figure:
    """One head, large: queries down, keys across. Some queries and keys may be marked."""
    figure, axes = _large(map, head)
    image = axes.imshow(map.weights[head], cmap=SHADES, norm=PowerNorm(SMALL_POWER, 0, 1), aspect="equal")
    axes.set(xlabel="keys: what is looked at", ylabel="queries: who looks")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=24, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "5 %", "20 %", "50 %", "100 %"])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    for labels, marked in ((axes.get_yticklabels(), queries), (axes.get_xticklabels(), keys)):
        for at in marked:
            labels[at].set(color=MARK, fontweight="bold")
    for query, key in itertools.product(queries, keys):
        weight = map.weights[head, query, key]
        axes.add_patch(Rectangle((key - 0.5, query - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=1.8))
        ink = "white" if weight > 0.2 else INK
        axes.text(key, query, f"{100 * weight:.0f}", ha="center", va="center", fontsize=8.5, color=ink)
    return figure


def alignment(map: AttentionMap, head: int = 0) -> Figure:
    """Source words across, target words down, weights from black to white: figure 3 of arXiv:1409.0473."""
    figure, axes = _large(map, head)
    axes.imshow(map.weights[head], cmap="gray", vmin=0, vmax=1, aspect="equal")
    axes.grid(False, which="minor")
    return figure


def _large(map: AttentionMap, head: int) -> tuple[Figure, Axes]:
    """Axes with a label for every query at the left and for every key, turned, on top."""
    N, T, S = map.weights.shape
    longest = [0.09 * max(_longest(labels), 4) for labels in (map.queries, map.keys)]
    size = (max(S * CELL + longest[0] + 1.6, 4.4), max(T * CELL + longest[1] + 1.2, 3.0))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    words = {"parse_math": False, "fontfamily": fonts(), "color": INK, "fontsize": 10}
    axes.set_xticks(range(S), map.keys, rotation=90, **words)
    axes.set_yticks(range(T), map.queries, **words)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("bottom")
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(1, S) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, T) - 0.5, minor=True)
    axes.grid(which="minor", color="#eeeeee", linewidth=0.6)
    axes.tick_params(which="minor", length=0, top=False, bottom=False)
    axes.spines[:].set(color=GAP)
    title = f"{map.title}, head {head}" if N > 1 else map.title
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK, parse_math=False)
    return figure, axes


def _longest(labels: Sequence[str]) -> int:
    """Characters of the longest label."""
    return max(len(label) for label in labels)


# Many heads -----------------------------------------------------------------------------------------------------------


def layer(map: AttentionMap) -> Figure:
    """All heads of one map side by side, labelled at the edges: a row shares its queries, a column its keys."""
    N, T, S = map.weights.shape
    columns = next((number for number in (4, 3) if N % number == 0), min(4, N))
    rows = -(-N // columns)
    image = tiled([[*map.weights[at : at + columns]] for at in range(0, N, columns)])
    high, wide = image.shape
    cell = min(0.17, 24 / wide)
    left, below, above = cell * 0.55 * _longest(map.queries) + 0.15, cell * 0.55 * _longest(map.keys) + 0.15, 0.4
    width, height = wide * cell + left + 0.1, high * cell + below + above
    figure = Figure(figsize=(width, height), dpi=100)  # no layout engine: it would measure thousands of labels
    figure.subplots_adjust(left / width, below / height, 1 - 0.1 / width, 1 - above / height)
    axes = _small(figure, image)
    words = {"parse_math": False, "fontfamily": fonts(), "color": INK, "fontsize": 72 * cell * 0.62}
    across = [column * (S + 1) + at for column in range(columns) for at in range(S)]
    down = [row * (T + 1) + at for row in range(rows) for at in range(T)]
    axes.set_xticks(across, list(map.keys) * columns, rotation=90, **words)
    axes.set_yticks(down, list(map.queries) * rows, **words)
    for head in range(N):
        place = (head % columns * (S + 1) + S - 0.8, head // columns * (T + 1) - 0.2)
        axes.text(*place, f"head {head}", ha="right", va="top", fontsize=8.5, color=SOFT)
    axes.set_title(map.title, loc="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    return figure


def overview(maps: Sequence[AttentionMap], marked: Sequence[tuple[int, int]] = ()) -> Figure:
    """Every head as a small map: a row for each map, a column for each head, then their mean.

    Heads of `marked`, (map, head), have a frame and their place in that list beside it.
    """
    most = max(len(map.weights) for map in maps)
    has_mean = most > 1
    rows = [[*map.weights, *([None] * (most - len(map.weights)))] for map in maps]
    if has_mean:
        rows = [[*row, np.mean(map.weights, axis=0)] for row, map in zip(rows, maps, strict=True)]
    image, columns = tiled(rows), most + has_mean
    T, S = (max(sizes) for sizes in zip(*(map.weights.shape[1:] for map in maps), strict=True))
    width = min(WIDEST, max(1.1 * columns, 4.0))
    high, wide = image.shape
    size = (width + 1.0, width * high / wide + 0.9)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = _small(figure, image)
    heads = [*(f"head {at}" for at in range(most)), *(["mean"] if has_mean else [])]
    names = {"color": INK, "fontsize": 8.5 if columns <= 16 else 6.5}
    axes.set_xticks([at * (S + 1) + (S - 1) / 2 for at in range(columns)], heads, **names)
    places = [at * (T + 1) + (T - 1) / 2 for at in range(len(maps))]
    axes.set_yticks(places, [map.title for map in maps], parse_math=False, **names)
    axes.xaxis.tick_top()
    for place, (row, column) in enumerate(marked, 1):
        corner = (column * (S + 1) - 0.8, row * (T + 1) - 0.8)
        axes.add_patch(Rectangle(corner, S + 0.6, T + 0.6, fill=False, edgecolor=MARK, linewidth=1.6))
        right, top = corner[0] + S + 0.1, corner[1] + 0.6
        axes.text(right, top, str(place), ha="right", va="top", fontsize=9, fontweight="bold", color=MARK)
    return figure


def tiled(rows: Sequence[Sequence[Float[np.ndarray, "_ _"] | None]]) -> Float[np.ndarray, "_ _"]:
    """Small maps as one image, each with the room of the largest; around each is a line of what is no number."""
    shapes = [part.shape for row in rows for part in row if part is not None]
    T, S = (max(sizes) for sizes in zip(*shapes, strict=True))
    columns = max(map(len, rows))
    image = np.zeros((len(rows) * (T + 1) - 1, columns * (S + 1) - 1), np.float32)
    for down, row in enumerate(rows):
        for across, part in enumerate(row):
            if part is not None:
                (t, s), top, left = part.shape, down * (T + 1), across * (S + 1)
                image[max(top - 1, 0) : top + t + 1, max(left - 1, 0) : left + s + 1] = np.nan
                image[top : top + t, left : left + s] = part
    return image


def _small(figure: Figure, image: Float[np.ndarray, "_ _"]) -> Axes:
    """Axes with nothing but the image."""
    axes = figure.subplots()
    axes.imshow(image, cmap=SHADES, norm=PowerNorm(SMALL_POWER, 0, 1), interpolation="nearest", aspect="equal")
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    return axes


# Translations ---------------------------------------------------------------------------------------------------------


def bleu_by_length(path: pathlib.Path, models: Mapping[str, Sequence[tuple[int, int, int, float]]]) -> None:
    """Draw BLEU against the length of the source: a line for each model, a point for each (low, high, count, BLEU)."""
    figure = Figure(figsize=(7.6, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    counts = {(low, high): count for rows in models.values() for low, high, count, _ in rows}
    places = {lengths: place for place, lengths in enumerate(sorted(counts))}
    for at, (name, rows) in enumerate(models.items()):
        line = sorted((places[low, high], bleu) for low, high, _, bleu in rows)
        colour = COLOURS[at % len(COLOURS)]
        axes.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=4.5, linewidth=1.8, label=name)
    ticks = [f"{low}–{high}\n{counts[low, high]:,}" for low, high in places]
    axes.set_xticks(list(places.values()), ticks, fontsize=8.5)
    highest = max((bleu for rows in models.values() for *_, bleu in rows if math.isfinite(bleu)), default=1.0)
    axes.set(xlabel="words of the source, and how many sentences", ylabel="BLEU", ylim=(0, max(highest * 1.12, 1.0)))
    axes.set_title("BLEU by length of the source", loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path.write_bytes(png(figure))
