"""A model that cannot be is refused with the rule and both numbers."""

import dataclasses

import pytest

from tests.model.test_decoder import PLAIN


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_kv_heads": 3}, r"num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, r"head_dim=7 is odd"),
        ({"layers": ("window", "global")}, r"window is not set"),
        ({"window": 5}, r"window=5 is set but layers=\('global',\) has no"),
        ({"num_layers": 0}, r"num_layers=0 must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(PLAIN, **changes)


def test_kinds_are_tiled_over_the_layers():
    config = dataclasses.replace(PLAIN, num_layers=5, layers=("window", "window", "global"), window=4)
    assert config.layer_kinds == ("window", "window", "global", "window", "window")
