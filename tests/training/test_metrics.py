import json
import math

import pytest

from training import metrics
from training.metrics import MetricsLog, latest, plot, read

STEP = {"loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 10.0, "mfu": 0.5, "data_wait": 0.0}


def events(folder):
    """Every scalar in the TensorBoard files, as (step, name, value), and the steps at which files begin."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, starts = [], []
    for path in sorted((folder / "events").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            starts += [event.step] * event.HasField("session_log")
    return scalars, starts


def test_one_object_a_record_in_both_files(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 2.5})
    log.write({"step": 1, "eval_loss": 2.25})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5}\n{"step": 1, "eval_loss": 2.25}\n'
    assert read(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 1, "eval_loss": 2.25}]
    assert events(tmp_path) == ([(1, "loss", 2.5), (1, "eval_loss", 2.25)], [1])


def test_what_is_not_finite_is_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 3, "loss": math.nan, "grad_norm": math.inf, "learning_rate": None})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert strict == {"step": 3, "loss": None, "grad_norm": None, "learning_rate": None}


def test_a_record_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 2.5})
    assert read(tmp_path) == [{"step": 1, "loss": 2.5}]
    log.close()


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ('{"step": 1}\n{"step": 2, "lo', '{"step": 1}\n'),
        ('{"step": 1}\n', '{"step": 1}\n'),
        ('{"st', ""),
        ("", ""),
    ],
)
def test_a_line_that_a_kill_cut_is_dropped(tmp_path, before, kept):
    (tmp_path / "metrics.jsonl").write_text(before)
    log = MetricsLog(tmp_path)
    log.write({"step": 2, "loss": 1.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == kept + '{"step": 2, "loss": 1.0}\n'


def test_a_resumed_run_appends_and_tells_tensorboard_where_it_begins(tmp_path):
    for steps in ([1, 2, 3], [3, 4]):
        log = MetricsLog(tmp_path)
        for step in steps:
            log.write({"step": step, "loss": float(step)})
        log.close()
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 3, 4]
    assert events(tmp_path)[1] == [1, 3]


def test_the_last_measurement_of_a_step_counts():
    records = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 9.0},
        {"step": 2, "loss": 2.5},
    ]
    assert latest([*records, {"step": 3, "loss": None}], "loss") == ([1, 2], [3.0, 2.5])


def test_half_a_line_is_a_full_disk(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path)
    monkeypatch.setattr(metrics.os, "write", lambda descriptor, line: 1)
    with pytest.raises(OSError, match="No space left on device"):
        log.write({"step": 1, "loss": 1.0})
    log.close()


def test_the_plot_shows_what_was_measured(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = {}
    draw = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, x, y, **style: lines.update({style["label"]: (x, y)}) or draw(axes, x, y, **style)
    )
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step, **STEP, "loss": 4.0 - step})
    log.write({"step": 3, "eval_loss": 1.5})
    log.close()
    plot(tmp_path)
    assert lines == {"train": ([1, 2, 3], [3.0, 2.0, 1.0]), "validation, 1.500 at step 3": ([3], [1.5])}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
