"""Prompts go away where that is quicker, or where others run and it is not much slower."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from inference.disaggregation import DisaggregationConfig, Rates, break_even, estimate, learned

CONFIG = DisaggregationConfig(min_away=64, slowdown=2.0)
RATES = Rates(here=500.0, there=500.0, link=1e9, delay=0.01)
rate = st.floats(1.0, 1e6)


@pytest.mark.parametrize(
    ("missing", "others", "rates", "is_away"),
    [
        (1000, 0, RATES, False),  # as fast there, but the way takes time
        (1000, 3, RATES, True),  # others would wait for two seconds
        (63, 3, RATES, False),  # too short to be worth a call
        (1000, 0, Rates(here=500.0, there=2000.0, link=1e9, delay=0.01), True),  # a faster machine
        (1000, 3, Rates(here=500.0, there=2000.0, link=1e7, delay=0.01), False),  # 4.6 s on the way
        (1000, 3, Rates(here=500.0, there=100.0, link=1e9, delay=0.01), False),  # a busy one
    ],
)
def test_where_prompts_go(missing, others, rates, is_away):
    found = estimate(missing, others, bytes_per_token=46_080.0, rates=rates, config=CONFIG)
    assert found.is_away == is_away
    assert found.here == pytest.approx(missing / rates.here)
    assert found.there == pytest.approx(rates.delay + missing / rates.there + missing * 46_080 / rates.link)


@hypothesis.given(here=rate, there=rate, link=rate, delay=st.floats(0.001, 10), missing=st.integers(1, 10**6))
@hypothesis.settings(max_examples=200, deadline=None)
def test_the_break_even_parts_the_prompts_that_go_from_those_that_stay(here, there, link, delay, missing):
    rates = Rates(here=here, there=there, link=link, delay=delay)
    config = DisaggregationConfig(min_away=1, slowdown=1.5)
    edge = break_even(bytes_per_token=3.0, rates=rates, limit=1.5)
    if not math.isclose(edge, missing, rel_tol=1e-3):
        found = estimate(missing, 1, bytes_per_token=3.0, rates=rates, config=config)
        assert found.is_away == (missing > edge)


def test_rates_follow_what_is_seen_and_keep_what_is_not():
    seen = {"tokens": 1000, "computing": 1.0, "num_bytes": 0, "moving": 0.0}
    once = learned(RATES, **seen)
    assert once.there == pytest.approx(1 / (0.7 / 500 + 0.3 / 1000))
    assert (once.link, once.delay, once.here) == (RATES.link, RATES.delay, RATES.here)
    rates = RATES
    for _ in range(50):
        rates = learned(rates, **seen)
    assert rates.there == pytest.approx(1000, rel=1e-4)
    assert learned(RATES, **seen, weight=1.0).there == pytest.approx(1000)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"disaggregation\.slowdown=0\.5 must be between 1 and 1000"):
        DisaggregationConfig(slowdown=0.5)
    with pytest.raises(ValueError, match=r"rates\.link=0\.0 must be at least"):
        Rates(here=1.0, there=1.0, link=0.0, delay=0.0)
