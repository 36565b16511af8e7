"""No part of a stop string is shown, however the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.stopping import UntilStop

words = st.text("ab", max_size=4)


@given(st.lists(words, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_end_where_the_whole_does(pieces, stops):
    whole = "".join(pieces)
    until = UntilStop(stops)
    shown = ""
    for piece in pieces:
        shown += until.feed(piece)
        assert whole.startswith(shown)
        assert not any(stop in shown for stop in stops)
    shown += until.finish()
    ends = [(end, end - len(stop)) for end in range(len(whole) + 1) for stop in stops if whole[:end].endswith(stop)]
    assert until.found == bool(ends)
    assert shown == (whole[: min(ends)[1]] if ends else whole)


def test_text_goes_through_as_soon_as_it_is_safe():
    until = UntilStop(["END"])
    assert [until.feed(piece) for piece in ("the E", "nd", ". END, and", "more")] == ["the ", "End", ". ", ""]
    assert until.found


def test_the_stop_that_is_first_complete_counts():
    for pieces in (["ab", "b"], ["abb"]):
        until = UntilStop(["abb", "b"])
        assert "".join(map(until.feed, pieces)) == "a"


@pytest.mark.parametrize(("text", "stop", "shown"), [("aab", "aab", ""), ("aaaab", "aab", "aa"), ("x", "x", "")])
def test_overlapping_beginnings(text, stop, shown):
    until = UntilStop([stop])
    assert "".join(map(until.feed, text)) == shown
