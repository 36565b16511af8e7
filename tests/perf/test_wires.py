"""Collectives take the links and networks that they lie on."""

import pytest

from parallel.chips import find
from perf.operations import Operation
from perf.wires import wire
from perf.work import Layout

SENT = 1e9


def of(chip, layout, group, stride=1, axis="fsdp"):
    return wire(Operation("", "collective", wire=SENT, group=group, stride=stride, axis=axis), find(chip), layout)


def test_inside_a_host_only_links_count():
    found = of("H100", Layout(fsdp=8), 8)
    assert found.inside == pytest.approx(SENT / find("H100").link_bandwidth)
    assert found.between == 0


def test_beyond_a_host_the_network_counts_and_its_cards_share_the_bytes():
    one, eight = of("H100", Layout(fsdp=16), 2, stride=8), of("H100", Layout(fsdp=16), 16)
    network = find("H100").network_bandwidth
    assert one.between == pytest.approx(SENT / network)
    assert eight.between == pytest.approx(SENT / network * (1 / 2) / (15 / 16) / 8)
    assert eight.inside > 0


def test_experts_send_what_leaves_the_host_by_their_own_card():
    found = of("H100", Layout(fsdp=16, expert=16), 16, axis="expert")
    assert found.between == pytest.approx(SENT / find("H100").network_bandwidth * (1 / 2) / (15 / 16))


def test_a_torus_gives_a_long_axis_more_links():
    layout = Layout(fsdp=16, tensor=16)
    chip = find("v5e")
    row, all_ = of("v5e", layout, 16), of("v5e", Layout(fsdp=256), 256)
    assert row.inside == pytest.approx(SENT / (chip.link_bandwidth / 2))
    assert all_.inside == pytest.approx(SENT / chip.link_bandwidth)
    assert row.hops == pytest.approx(16)


def test_slices_are_joined_by_the_network_alone():
    found = of("v5e", Layout(data=2, slices=2), 2, axis="slices")
    assert found.inside == 0
    assert found.between == pytest.approx(SENT / find("v5e").network_bandwidth)
