"""What is checked is none of the probes, spans sizes, and is summed up as errors."""

import numpy as np
import pytest

from model import cost
from perf import calibration
from perf.calibration import Checked, configs, row_of, summary
from perf.this_machine import PROBE, SMALL_PROBE, WIDE_PROBE


def test_no_config_that_is_checked_is_a_probe():
    found = list(configs())
    assert len(found) >= 12
    assert {kind for kind, *_ in found} == {"train", "prefill", "decode"}
    assert not {model for _, _, model, _, _ in found} & {PROBE, SMALL_PROBE, WIDE_PROBE}
    sizes = [cost.num_parameters(model) for _, _, model, _, _ in found]
    assert max(sizes) > 20 * min(sizes)


def test_errors_are_of_what_was_measured():
    rows = [Checked("train", "tiny", 1, 8, predicted, 2.0, 1.0) for predicted in (1.0, 2.2, 2.0)]
    rows.append(Checked("decode", "tiny", 1, 8, 0.1, 0.1, 0.5))
    found = summary(rows)
    assert found["configs"] == 4
    assert found["span"] == pytest.approx(20)
    assert found["median_abs_error"] == pytest.approx(np.median([0.5, 0.1, 0.0, 0.0]))
    assert "-50.0%" in row_of(rows[0])
    assert found["rows"][0]["error"] == -0.5


def test_a_table_has_every_product():
    asked = []
    found = calibration.table(lambda M, K, N: asked.append((M, K, N)) or float(M * K * N), (1, 4), ((2, 3), (5, 6)))
    assert asked == [(1, 2, 3), (4, 2, 3), (1, 5, 6), (4, 5, 6)]
    assert found.sizes == (6, 30)
    assert found.at(4, 30) == pytest.approx(120)


def test_the_quickest_of_some_calls_counts():
    assert 0 < calibration.seconds_of(lambda x: x + 1, calibration.ones(8), budget=0.01) < 1
    assert calibration.writing(4, 2) > 0
