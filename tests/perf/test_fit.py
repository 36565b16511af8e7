"""Constants are found again in times that were made of them, and leaving rows out is a fit without them."""

import numpy as np
import pytest

from perf import fit
from perf.measurements import read
from perf.predict import times
from perf.score import KNOWN


@pytest.fixture(scope="module")
def rows():
    some = [row for row in read(KNOWN) if row.job is not None and "llm-foundry" in row.source]
    return some[::3]


def made(rows, logs):
    """The rows, their values as the constants have them."""
    table, _ = fit.table_of(rows)
    seconds = times(table, logs).total
    return [
        row._replace(value=row.value * row.seconds(row.value) / one) for row, one in zip(rows, seconds, strict=True)
    ]


def test_what_was_made_of_constants_is_explained_by_the_fit(rows):
    table, _ = fit.table_of(rows)
    truth = np.random.default_rng(0).normal(fit.fit(rows, rounds=1).logs, 0.1)
    found = fit.fit(made(rows, truth), rounds=30)
    off = times(table, found.logs).total / times(table, truth).total
    assert np.abs(off - 1).max() < 0.02


def test_leaving_rows_out_is_fitting_without_them(rows):
    left_out = np.arange(0, len(rows), 5)
    base = fit.fit(rows, rounds=40)
    rest = fit.fit([row for place, row in enumerate(rows) if place not in left_out], rounds=40)
    stepped = dict(zip(base.table.names, fit.without(base, left_out), strict=True))
    again = np.array([stepped[name] for name in rest.table.names])
    ratio = times(rest.table, again).total / times(rest.table, rest.logs).total
    assert np.abs(ratio - 1).max() < 0.02


def test_constants_are_written_and_read(rows, tmp_path):
    from perf.constants import load

    found = fit.constants(fit.fit(rows, rounds=3))
    fit.write(found, tmp_path / "constants.json")
    again = load(tmp_path / "constants.json")
    assert again.fitted == pytest.approx(found.fitted, rel=1e-3)


def test_the_command_fits_and_writes(tmp_path, capsys):
    import json

    from perf.__main__ import main

    header, *lines = KNOWN.read_text(encoding="utf-8").splitlines()
    few = tmp_path / "few.csv"
    few.write_text("\n".join([header, *(line for line in lines if "NVIDIA_L4/" in line)]) + "\n", encoding="utf-8")
    assert main(["calibrate", "--from", str(few), "--file", str(tmp_path / "made.json"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < said["constants"]["matmul/L4/fp32"] < 1.1
    assert main(["calibrate", "--from", str(few), "--check"]) == 2
