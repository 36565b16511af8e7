"""How wrong the performance model is: the claims of docs/benchmarks/planner.md, held on every published row."""

import json

import numpy as np
import pytest

from perf.__main__ import main
from perf.measurements import read
from perf.score import KNOWN, known, lines, report, score


@pytest.fixture(scope="module")
def scored():
    return score(read(KNOWN))


def errors(scored, *kinds):
    return [abs(row.error) for row in scored if row.error is not None and row.measurement.row["kind"] in kinds]


def test_training_is_within_six_percent_without_its_source(scored):
    assert np.median(errors(scored, "train")) <= 0.06


def test_inference_is_within_twelve_percent_without_its_source(scored):
    assert np.median(errors(scored, "prefill", "decode", "generate")) <= 0.12


def test_what_is_not_modelled_says_why(scored):
    for row in scored:
        assert (row.predicted is None) == bool(row.measurement.reason)
    assert sum(row.predicted is not None for row in scored) > 0.9 * len(scored)


def test_a_row_that_was_learned_is_not_looked_up(scored):
    """By what its own source taught it would be nearer."""
    row = next(row for row in known().rows if "llm-foundry" in row.source)
    (alone,) = score([row])
    assert alone.predicted != pytest.approx(row.value, rel=1e-4)
    changed = row._replace(value=2 * row.value)
    assert score([changed])[0].predicted == pytest.approx(alone.predicted)


def test_a_row_that_is_new_is_predicted_by_all_that_is_known():
    row = next(row for row in known().rows if "llm-foundry" in row.source)
    fresh = row._replace(row=row.row | {"notes": "another run of the same"})
    (alone,), (with_source,) = score([row]), score([fresh])
    assert abs(with_source.error or 1) < abs(alone.error or 1) + 0.02


def test_the_report_counts(scored):
    found = report(scored)
    assert found["num_rows"] == len(found["rows"]) == len(scored)
    assert found["modelled"] == sum(group["modelled"] for group in found["by_kind"].values())
    assert found["modelled"] == sum(group["modelled"] for group in found["by_source"].values())
    assert 0 < found["median_abs_error"] < found["p90_abs_error"]
    assert len(lines(scored)) > len(scored)


def test_the_command_prints_json_last(tmp_path, capsys):
    header, *rows = KNOWN.read_text(encoding="utf-8").splitlines()
    few = tmp_path / "few.csv"
    few.write_text("\n".join([header, *rows[:3]]) + "\n", encoding="utf-8")
    assert main(["score", str(few), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_rows"] == 3


def test_the_command_refuses_a_broken_file(tmp_path, capsys):
    broken = tmp_path / "broken.csv"
    broken.write_text("kind,source\ntrain,here\n", encoding="utf-8")
    assert main(["score", str(broken)]) == 2
    assert "no column chip" in capsys.readouterr().err
