"""How wrong the performance model is, row by row of a file of measurements. Knows no plan.

    python -m perf score perf/measurements.csv

A row that the model has learned from is predicted without its whole source: neither the constants nor the neighbours
have seen any row of it. Other rows are predicted from all that is known.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from perf import fit, neighbours
from perf.constants import load
from perf.fit import Fit
from perf.measurements import Measurement, read, reported
from perf.neighbours import Settings
from perf.predict import times

KNOWN = pathlib.Path(__file__).with_name("measurements.csv")
SETTINGS = (
    "kind source chip num_chips model seq_len output_len global_batch microbatch dtype_weights dtype_act parallelism "
    "remat metric notes"
).split()


class Scored(NamedTuple):
    """One row."""

    measurement: Measurement
    predicted: float | None  # in the row's metric; None where it has no job
    by_constants: float | None  # the same without neighbours

    @property
    def error(self) -> float | None:
        """Predicted / measured - 1."""
        return None if self.predicted is None else self.predicted / self.measurement.value - 1


class Known(NamedTuple):
    """What the model has learned from."""

    rows: list[Measurement]
    fit: Fit
    settings: Settings
    inverted: np.ndarray  # neighbours.inverse of all rows


@functools.cache
def known() -> Known:
    """The measurements that the project ships, and the constants fitted to them."""
    rows = [row for row in read(KNOWN) if row.job is not None]
    table, measured = fit.table_of(rows)
    base, settings = fit.around(table, measured, table.logs(load())), _settings(rows)
    rest = measured - np.log(times(table, base.logs).total)
    return Known(rows, base, settings, neighbours.inverse(neighbours.covariance(settings, settings), rest))


def score(rows: Sequence[Measurement]) -> list[Scored]:
    """All rows, each predicted without the source that it was learned from."""
    learned = {_key(row): row.source for row in known().rows}
    asked = [row for row in rows if row.job is not None]
    groups: dict[str, list[Measurement]] = {}
    for row in asked:
        groups.setdefault(learned.get(_key(row), ""), []).append(row)
    found: dict[int, Scored] = {}
    for source, some in groups.items():
        for row, one in zip(some, _without(source, some), strict=True):
            found[id(row)] = one
    return [found.get(id(row), Scored(row, None, None)) for row in rows]


def _without(source: str, rows: list[Measurement]) -> list[Scored]:
    """Rows predicted by all that is known but one source."""
    base, settings = known().fit, known().settings
    is_left_out = np.array([row.source == source for row in known().rows])
    logs = fit.without(base, np.flatnonzero(is_left_out)) if source else base.logs
    rest = base.measured - np.log(times(base.table, logs).total)
    seconds = _seconds(rows, dict(zip(base.table.names, logs, strict=True)))
    weights = neighbours.weights(known().inverted, rest, is_left_out)
    factors = np.exp(neighbours.covariance(_settings(rows), settings) @ weights)
    return [
        Scored(row, reported(row, float(alone * factor)), reported(row, float(alone)))
        for row, alone, factor in zip(rows, seconds, factors, strict=True)
    ]


def _seconds(rows: list[Measurement], logs: dict[str, float]) -> np.ndarray:
    """By constants, of which those that no row has fitted are as they ship."""
    table, _ = fit.table_of(rows)
    return times(table, np.array([logs.get(name, load().log(name)) for name in table.names])).total


def _settings(rows: Sequence[Measurement]) -> Settings:
    jobs = [row.job for row in rows if row.job is not None]
    return neighbours.settings(jobs, [row.chip for row in rows], [neighbours.released(row.source) for row in rows])


def _key(row: Measurement) -> tuple[str, ...]:
    return tuple(row.row[name] for name in SETTINGS)


# Summaries ------------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Scored]) -> dict[str, Any]:
    """Counts and errors of rows together."""
    errors = [abs(row.error) for row in rows if row.error is not None]
    return {
        "num_rows": len(rows),
        "modelled": len(errors),
        "median_abs_error": float(np.median(errors)) if errors else None,
        "p90_abs_error": float(np.percentile(errors, 90)) if errors else None,
    }


def report(rows: Sequence[Scored]) -> dict[str, Any]:
    """Everything, as JSON has it."""
    by = {
        "by_source": lambda row: row.measurement.source,
        "by_kind": lambda row: row.measurement.row["kind"],
        "by_chip": lambda row: row.measurement.chip,
    }
    groups = {
        name: {key: summary([row for row in rows if of(row) == key]) for key in dict.fromkeys(map(of, rows))}
        for name, of in by.items()
    }
    return {"rows": [_row(row) for row in rows], **summary(rows), **groups}


def _row(row: Scored) -> dict[str, Any]:
    found = row.measurement
    said = {name: found.row[name] for name in ("id", "kind", "source", "chip", "model", "metric")}
    if row.predicted is None:
        return {**said, "measured": found.value, "predicted": None, "relative_error": None, "reason": found.reason}
    numbers = {"measured": found.value, "predicted": row.predicted, "relative_error": row.error, "reason": ""}
    return {**said, **numbers, "predicted_by_constants": row.by_constants}


def lines(rows: Sequence[Scored]) -> list[str]:
    """A line a row, then a line a kind, a chip and a source."""
    found = [f"{'id':>6} {'kind':8} {'chip':16} {'model':20} {'metric':20} {'measured':>10} {'predicted':>10}  error"]
    for row in rows:
        one = row.measurement
        start = (
            f"{one.row['id']:>6} {one.row['kind']:8} {one.chip[:16]:16} {one.row['model'][:20]:20} {one.metric[:20]:20}"
        )
        if row.error is None:
            found.append(f"{start} {one.value:>10.4g}  not modelled: {one.reason}")
        else:
            found.append(f"{start} {one.value:>10.4g} {row.predicted:>10.4g} {row.error:+7.1%}")
    whole = report(rows)
    for name in ("by_kind", "by_chip", "by_source"):
        found += ["", f"{name[3:]:60} rows  modelled  median |error|  90th percentile"]
        found += [_summary_line(key[-60:], one) for key, one in whole[name].items()]
    return [*found, "", _summary_line("all", summary(rows))]


def _summary_line(name: str, one: dict[str, Any]) -> str:
    start = f"{name:60} {one['num_rows']:4}  {one['modelled']:8}"
    return start if not one["modelled"] else f"{start}  {one['median_abs_error']:14.1%}  {one['p90_abs_error']:15.1%}"
