"""Fits the constants of the performance model to measurements, and says how well it does on sources it has not seen.

Least squares of log(predicted / measured) with each constant drawn to its prior, robust to rows that no constant
explains. Leaving a source out is one Gauss-Newton step from the fit to all without that source's rows.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parallel import chips
from perf.constants import FILE, Constants, prior
from perf.measurements import Measurement
from perf.predict import Table, times

NOISE = 0.08  # standard deviation of a measurement's logarithm that is taken for granted
STEP = 1e-4  # of a logarithm, to take derivatives


class Fit(NamedTuple):
    """Constants, and what they were fitted to."""

    table: Table
    measured: np.ndarray  # logarithms of seconds
    logs: np.ndarray  # of the constants
    jacobian: np.ndarray  # of residuals, weighted
    residuals: np.ndarray  # weighted alike, priors last


def table_of(rows: Sequence[Measurement]) -> tuple[Table, np.ndarray]:
    """Jobs of rows, and the logarithms of their seconds."""
    jobs = [row.job for row in rows if row.job is not None]
    assert len(jobs) == len(rows), "rows without a job cannot be fitted"
    table = Table(jobs, [chips.find(row.chip) for row in rows])
    return table, np.log([row.seconds(row.value) for row in rows])


def fit(rows: Sequence[Measurement], *, rounds: int = 60) -> Fit:
    """Constants that fit all rows."""
    from scipy.optimize import least_squares

    table, measured = table_of(rows)
    start, spread = _priors(table)

    def residuals(logs: np.ndarray) -> np.ndarray:
        found = np.log(times(table, logs).total) - measured
        return np.concatenate([found / NOISE, (logs - start) / spread])

    found = least_squares(residuals, start, loss="soft_l1", max_nfev=rounds)
    return around(table, measured, found.x)


def around(table: Table, measured: np.ndarray, logs: np.ndarray) -> Fit:
    """The fit whose constants are known already."""
    start, spread = _priors(table)
    off = (np.log(times(table, logs).total) - measured) / NOISE
    weights = (1 + off**2) ** -0.25  # of soft_l1: outliers count less
    jacobian = derivatives(table, logs) / NOISE * weights[:, None]
    jacobian = np.concatenate([jacobian, np.diag(1 / spread)])
    return Fit(table, measured, logs, jacobian, np.concatenate([off * weights, (logs - start) / spread]))


def _priors(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms that constants are drawn to, and how far they may be off."""
    priors = [prior(name) for name in table.names]
    return np.array([math.log(one.value) for one in priors]), np.array([one.spread for one in priors])


def derivatives(table: Table, logs: np.ndarray) -> np.ndarray:
    """Of log seconds by each constant's logarithm: [rows, constants]."""
    base = np.log(times(table, logs).total)
    columns = []
    for place in range(len(logs)):
        moved = logs.copy()
        moved[place] += STEP
        columns.append((np.log(times(table, moved).total) - base) / STEP)
    return np.stack(columns, axis=1)


def without(found: Fit, rows: np.ndarray) -> np.ndarray:
    """Logarithms of the constants, had these rows (indices) not been there."""
    kept = np.ones(len(found.jacobian), bool)
    kept[rows] = False
    jacobian, residuals = found.jacobian[kept], found.residuals[kept]
    return found.logs - np.linalg.solve(jacobian.T @ jacobian, jacobian.T @ residuals)


def spread(found: Fit) -> np.ndarray:
    """Standard deviation of each constant's logarithm."""
    return np.sqrt(np.diag(np.linalg.inv(found.jacobian.T @ found.jacobian)))


def constants(found: Fit) -> Constants:
    """By name."""
    values = dict(zip(found.table.names, np.exp(found.logs).tolist(), strict=True))
    return Constants(values, dict(zip(found.table.names, spread(found).tolist(), strict=True)))


def write(found: Constants, path: pathlib.Path = FILE) -> None:
    """As JSON, in four digits."""
    rows = {
        name: {"value": float(f"{value:.4g}"), "spread": round(found.spread[name], 3)}
        for name, value in sorted(found.fitted.items())
    }
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
