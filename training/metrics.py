"""What a run measured, kept in files: metrics.jsonl, TensorBoard events, loss.png. Knows no device and no terminal.

{"step": 5, "loss": 5.37, "grad_norm": 0.81, "learning_rate": 0.0015, "tokens_per_second": 8312.4, …}
{"step": 5, "eval_loss": 5.31}
"""

import errno
import importlib
import json
import math
import os
import pathlib
import time
from typing import Any

Record = dict[str, int | float | None]  # "step" and what was measured at it; None is a number that is not finite

FLUSH_SECONDS = 10.0  # between writes of TensorBoard events to the disk


class MetricsLog:
    """The files of one run, open for appending. Resuming drops a last line that a kill cut in half."""

    def __init__(self, folder: pathlib.Path):
        path = folder / "metrics.jsonl"
        drop_half_line(path)
        self._lines = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._folder = folder
        self._events: Any = None
        self._waiting: list[tuple[float, Record]] = []  # for TensorBoard's file, with their times
        self._flushed = time.time()

    def write(self, record: Record) -> None:
        """Append one record; a line is written in one call, so a reader sees it whole or not at all."""
        record = {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        if os.write(self._lines, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting.append((time.time(), record))
        if time.time() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring TensorBoard's file up to date; not before the first step, which the import would delay."""
        waiting, self._waiting, self._flushed = self._waiting, [], time.time()
        if waiting and self._events is None:
            self._events = _events(self._folder, int(waiting[0][1]["step"] or 0))
        for at, record in waiting:
            self._events.write_event(_event(at, record))
        if waiting:
            self._events.flush()

    def close(self) -> None:
        """Push everything out."""
        os.close(self._lines)
        self.flush()
        if self._events is not None:
            self._events.close()


def drop_half_line(path: pathlib.Path) -> None:
    """Cut the file after its last line end."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Every whole record of a run, in the order in which they were measured; repeated steps appear again."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, the last measurement where a step was repeated.

    latest([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 2.5}], "loss") -> [1, 2], [3.0, 2.5]
    """
    found = {record["step"]: record[name] for record in records if record.get(name) is not None}
    return sorted(found), [found[step] for step in sorted(found)]


def plot(folder: pathlib.Path) -> None:
    """Draw loss.png: the loss of every step and of every evaluation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read(folder)
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(*latest(records, "loss"), color="#9ab8d8", linewidth=0.9, label="train")
    steps, losses = latest(records, "eval_loss")
    if steps:
        label = f"validation, {losses[-1]:.3f} at step {steps[-1]}"
        axes.plot(steps, losses, color="#c44e27", linewidth=1.6, marker="o", markersize=3.5, label=label)
    axes.set(title=folder.name, xlabel="step", ylabel="loss (nats a token)")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    FigureCanvasAgg(figure).print_png(folder / "loss.png")


def prepare() -> None:
    """Import what writing and drawing need; for a thread with nothing else to do."""
    for module in ("tensorboardX.event_file_writer", "matplotlib.backends.backend_agg", "matplotlib.figure"):
        importlib.import_module(module)


def _events(folder: pathlib.Path, step: int) -> Any:
    """A new TensorBoard file that begins at `step`: what earlier files hold from there on is hidden.

    tensorboardX's own SummaryWriter sends every scalar through a queue between processes; this is one event a step.
    """
    from tensorboardX.event_file_writer import EventsWriter

    (folder / "events").mkdir(exist_ok=True)
    events = EventsWriter(str(folder / "events" / "events"), filename_suffix=f".{time.time_ns()}")
    proto = _proto("event")
    start = proto.SessionLog(status=proto.SessionLog.SessionStatus.Value("START"))
    events.write_event(proto.Event(wall_time=time.time(), step=step, session_log=start))
    return events


def _event(at: float, record: Record) -> Any:
    """One record as one event."""
    summary = _proto("summary").Summary
    measured = {name: value for name, value in record.items() if name != "step" and value is not None}
    values = [summary.Value(tag=name, simple_value=value) for name, value in measured.items()]
    return _proto("event").Event(wall_time=at, step=int(record["step"] or 0), summary=summary(value=values))


def _proto(name: str) -> Any:
    """A module of TensorBoard's messages, which are made when it is imported."""
    return importlib.import_module(f"tensorboardX.proto.{name}_pb2")
