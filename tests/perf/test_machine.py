"""Numbers of chips become slices, or an error that names the nearest."""

import pytest

from parallel.chips import find
from perf import machine


@pytest.mark.parametrize(
    ("chip", "chips", "slices", "name"),
    [
        ("v5p", 1024, 1, "1,024 TPU v5p (8x8x16)"),
        ("v5e", 256, 1, "256 TPU v5e (16x16)"),
        ("v5e", 512, 2, "512 TPU v5e (2 slices of 16x16)"),
        ("H100", 16, 1, "16 H100-SXM-80GB"),
        ("H100", 4, 1, "4 H100-SXM-80GB"),
    ],
)
def test_chips_come_in_slices(chip, chips, slices, name):
    assert machine.fewest(find(chip), chips) == slices
    assert machine.named(find(chip), chips, slices) == name


@pytest.mark.parametrize(("chip", "chips", "near"), [("v5p", 65, "64, 128"), ("v5e", 3, "1, 4"), ("H100", 12, "8, 16")])
def test_others_are_refused_with_the_nearest(chip, chips, near):
    with pytest.raises(ValueError, match=f"nearest are {near}") as error:
        machine.fewest(find(chip), chips)
    assert "\n" not in str(error.value)
    assert not machine.forms(find(chip), chips)


def test_slices_are_of_one_size_and_of_tpus():
    machine.require(find("v5e"), 32, 2)
    with pytest.raises(ValueError, match="not a multiple of 3 slices"):
        machine.require(find("v5e"), 32, 3)
    with pytest.raises(ValueError, match="leave it out"):
        machine.require(find("H100"), 16, 2)


def test_what_can_be_compiled_has_a_topology():
    found = machine.topology(find("v5p"), 128, 2)
    assert found is not None
    assert found.name == "v5p:4x4x4*2"
    assert machine.room(find("v5p")) == found.hbm_bytes
    assert machine.topology(find("H100"), 8, 1) is None
    assert machine.room(find("H100")) < 80 * 2**30


def test_larger_numbers_ascend():
    for name in ("v5e", "v5p", "H100"):
        some = [n for n, _ in zip(machine.more(find(name), 64), range(8), strict=False)]
        assert some == sorted(set(some))
        assert some[0] > 64
