"""A picture of one round of serving: how long requests waited, and how many tokens came when. Measures nothing."""

import pathlib
from typing import Any

import numpy as np

from perf.answers import Played, Tick

# Okabe and Ito's colours, told apart by everybody; the engine's is the darkest and its line the widest
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
NAMES = {
    "engine": "continuous batching",
    "static": "static batches of 8",
    "one_at_a_time": "one at a time",
    "without_reuse": "without prefix reuse",
    "guessing": "with prompt lookup",
}
POINTS = 60  # of throughput over time


def draw(played: dict[str, Played], file: pathlib.Path, title: str) -> None:
    """Write the picture; its suffix says of which kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
    }
    with plt.rc_context(style):
        figure, (first, each, speed) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        for colour, (name, one) in zip(COLOURS, played.items(), strict=False):
            line = {"color": colour, "linewidth": 2.4 if name == "engine" else 1.5, "label": label(name)}
            first.step(*distribution(one.first_tokens), where="post", **line)
            each.step(*distribution([1e3 * seconds for seconds in one.per_tokens]), where="post", **line)
            speed.plot(*throughput(one.ticks, one.seconds), **line)
        first.set(title="Time to first token", xlabel="seconds", ylabel="share of requests", ylim=(0, 1.02))
        each.set(title="Time per further token", xlabel="milliseconds", ylabel="share of requests", ylim=(0, 1.02))
        speed.set(title="Throughput over time", xlabel="seconds since the start", ylabel="output tokens a second")
        for axes in (first, each, speed):
            axes.set_xlim(left=0)
        speed.set_ylim(bottom=0)
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def label(name: str) -> str:
    """A side in words."""
    kind, _, count = name.partition("_")
    return f"fixed batch of {count}" if kind == "fixed" else NAMES.get(name, name)


def distribution(values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Values in order, and the share of all that are at most so large."""
    ordered = np.sort(np.asarray([0.0, *values]))
    return ordered, np.arange(len(ordered)) / max(len(values), 1)


def throughput(ticks: list[Tick], seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Times, and tokens a second in a window around each: what a step gives counts evenly since the step before."""
    times = np.asarray([0.0, *(tick.time for tick in ticks)])
    total = np.cumsum([0, *(tick.tokens for tick in ticks)])
    centres = np.linspace(0, seconds, POINTS)
    half = max(seconds / 20, 1e-9)
    low, high = np.maximum(centres - half, 0), np.minimum(centres + half, seconds)
    return centres, (np.interp(high, times, total) - np.interp(low, times, total)) / (high - low)
