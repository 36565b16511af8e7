"""Pictures are drawn of every kind of plan, and their pieces are the whole step."""

import pytest

from configs.planning import Wishes, asked, of_model
from perf import machine, pictures, report
from perf.plan import search

SETTINGS = {
    "train": Wishes(chip="v5e", chips=16, batches=(64,), length=2048),
    "serve": Wishes(step="serve", chip="H100", chips=4, length=1024),
}


@pytest.fixture(scope="module", params=["train", "serve"])
def found(request):
    question, check = asked(of_model("llama3_2_1b"), True, SETTINGS[request.param])
    return search(question, check), check


def test_pieces_are_the_whole_step(found):
    answer, _ = found
    for one in answer.plans:
        pieces = pictures.pieces(one.prediction.parts)
        assert sum(piece.seconds for piece in pieces) == pytest.approx(one.seconds)
        assert len({(piece.name, piece.kind) for piece in pieces}) == len(pieces)
        assert not any(piece.name.endswith((", dX", ", dW", ", again", ", backward")) for piece in pieces)


def test_every_picture_of_a_plan_is_a_png(found):
    answer, _ = found
    question, best = answer.question, answer.plans[0]
    figures = [
        pictures.roofline(best, question.chip),
        pictures.timeline(best),
        pictures.memory(answer.plans[:3], machine.room(question.chip)),
    ]
    if answer.front:
        figures.append(pictures.front(answer.front, what="a token"))
    for figure in figures:
        assert figure.axes[0].get_title(loc="left")
        assert pictures.png(figure).startswith(b"\x89PNG")


def test_a_scaling_curve_has_the_neighbours_that_form_slices(found):
    answer, check = found
    points = report.neighbours(answer, check)
    assert [point.chips for point in points] == sorted({point.chips for point in points})
    assert max(answer.question.chips) in [point.chips for point in points]
    assert len(points) > 2
    assert all(machine.forms(answer.question.chip, point.chips) for point in points)
    figure = pictures.scaling(points, max(answer.question.chips), is_fixed=True)
    assert len(figure.axes) == 2
    pictures.png(figure)


def test_measured_rows_without_a_prediction_are_left_out():
    rows = [
        {"kind": "train", "measured": 2.0, "predicted": 2.1},
        {"kind": "decode", "measured": 0.01, "predicted": 0.012},
        {"kind": "train", "measured": 2.0, "predicted": None},
    ]
    figure = pictures.measured(rows)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[1:] == ["train: 1 rows, median error 5.0%", "decode: 1 rows, median error 20.0%"]
    pictures.png(figure)


@pytest.mark.parametrize(
    ("wanted", "places"),
    [([1, 1, 9], [0, 2, 9]), ([5, 5, 5], [3, 5, 7]), ([0, 4, 9], [0, 4, 9]), ([9, 9, 9], [6, 8, 10]), ([], [])],
)
def test_names_are_spread_out(wanted, places):
    found = pictures.spread([float(x) for x in wanted], apart=2.0, low=0.0, high=10.0)
    assert found == [float(x) for x in places]
