"""Words and columns agree with the plans that they are of."""

import json
import re

import pytest

from configs.planning import Wishes, asked, of_model
from perf import columns, explanation
from perf.plan import search

INTERFACE = {
    "mesh",
    "batch",
    "remat",
    "step_seconds",
    "tokens_per_second_per_chip",
    "mfu",
    "hbm_bytes",
    "bound",
    "cost",
}


def answer_of(**wishes):
    return search(*asked(of_model("llama3_2_1b"), True, Wishes(**wishes)))


@pytest.fixture(scope="module")
def trained():
    return answer_of(chip="v5e", chips=16, batches=(64,), length=2048)


@pytest.fixture(scope="module")
def served():
    return answer_of(step="serve", chip="H100", chips=4, length=1024)


def test_groups_are_the_whole_step(trained, served):
    for one in (*trained.plans, *served.plans):
        assert sum(explanation.groups(one).values()) == pytest.approx(one.seconds)


def test_plain_data_has_the_interface_and_is_json(trained, served):
    for answer in (trained, served):
        found = json.loads(json.dumps(explanation.plain(answer, "llama3_2_1b")))
        assert len(found["plans"]) == len(answer.plans)
        for row, one in zip(found["plans"], answer.plans, strict=True):
            assert row.keys() >= INTERFACE | {"parts", "settings"}
            assert sum(part["seconds"] for part in row["parts"]) == pytest.approx(row["step_seconds"])
            assert row["mesh"] == one.candidate.mesh.axes
            assert row["hbm_bytes"] == sum(row["memory"].values())


def test_the_table_has_a_line_a_plan_in_columns(trained):
    lines = list(explanation.table(trained, trained.plans))
    assert len(lines) == len(trained.plans) + 1
    assert lines[0].split()[0] == "#"
    assert [line.split()[0] for line in lines[1:]] == [str(rank) for rank in range(1, len(lines))]
    assert all(len(line) < 160 for line in lines)


def test_why_names_what_bounds_and_what_rivals_lose(trained, served):
    first, *_ = explanation.why(trained)
    assert first.startswith("The first: ")
    assert re.search(r"bound", first)
    for rival in trained.rivals:
        assert rival.seconds >= trained.plans[0].seconds
        assert re.match(r"\d+\.\d% behind", explanation.against(trained.question, rival, trained.plans[0]))
    assert len(list(explanation.why(served))) > 1


def test_a_step_bound_by_an_axis_says_so_in_words():
    """One prompt over eight chips on PCIe: sums take longer than products."""
    answer = answer_of(step="prefill", chip="L4", chips=8, batches=(1,), length=4096)
    (one,) = answer.plans
    assert one.prediction.bound == "tensor"
    assert re.match(
        r"tensor=8 is PCIe 4-bound: [\d.]+ ms of [\d.]+ ms go to sums over tensor\.",
        explanation.bound_words(answer.question, one),
    )


def test_commands_are_of_what_was_asked(trained, served):
    one = trained.plans[0]
    assert explanation.command(trained.question, one, "configs/tiny.py").startswith(
        "uv run train.py configs/tiny.py mesh."
    )
    assert explanation.command(trained.question, one, "llama3_2_1b").startswith("mesh.data=")
    assert explanation.command(served.question, served.plans[0], "x").startswith("uv run infer.py serve MODEL ")


def test_compiled_bytes_stand_beside_predicted_ones():
    row = {"mesh": {"data": 1, "fsdp": 8}, "hbm_bytes": 2**30, "compiled": {
        "topology": "v5e:2x4", "peak_bytes": 2**31, "fits": False, "compile_cpu_seconds": 61.4,
    }}  # fmt: skip
    assert explanation.compiled_line(row) == (
        "fsdp=8 on v5e:2x4: predicted 1.00 GiB, compiled 2.00 GiB (-50.0%), DOES NOT FIT; 61 CPU seconds"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.012"), (0.5, "0.500"), (1.234, "1.23"), (9.5, "9.50"), (12.34, "12.3"), (1234.5, "1,234")],
)
def test_three_digits_count(value, text):
    assert columns.digits(value) == text


def test_seconds_have_the_unit_that_shows_them():
    assert [columns.seconds(value) for value in (3.0, 0.0021, 4e-6)] == ["3.00 s", "2.10 ms", "4.00 µs"]
    assert columns.seconds(0.2, 3.0) == "0.200 s"
