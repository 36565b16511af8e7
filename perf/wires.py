"""How long a collective takes on links and networks at their stated rates. Knows no model and no constants."""

import math
from typing import NamedTuple

from parallel.chips import Chip
from perf.operations import Operation
from perf.work import Layout


class Wire(NamedTuple):
    """Seconds of one collective at the stated rates, and how many devices a byte passes one after the other."""

    inside: float  # over the links of a domain or slice
    between: float  # over the network
    hops: float


def wire(op: Operation, chip: Chip, layout: Layout) -> Wire:
    """Of a collective of `op.group` devices that stand `op.stride` apart."""
    if op.axis == "slices":
        return Wire(0.0, op.wire * chip.devices_per_chip / chip.network_bandwidth, math.log2(op.group))
    if chip.topology.startswith("torus"):
        return _on_torus(op, chip, layout)
    return _on_hosts(op, chip)


def _on_torus(op: Operation, chip: Chip, layout: Layout) -> Wire:
    """A group lies along as many dims of the torus as it needs, and has the links of those."""
    dims = int(chip.topology[5])
    side = (layout.num_devices / chip.devices_per_chip / layout.slices) ** (1 / dims)
    chips = max(op.group / (chip.devices_per_chip if op.stride == 1 else 1), 1.01)
    along = min(dims, max(1.0, math.log(chips) / math.log(max(side, 2.0))))
    bandwidth = chip.link_bandwidth / dims * along / chip.devices_per_chip
    return Wire(op.wire / bandwidth, 0.0, op.group ** (1 / along))


def _on_hosts(op: Operation, chip: Chip) -> Wire:
    """Inside a domain by its links; beyond it each chip sends its part by its own network card."""
    n, hops = op.group, math.log2(op.group)
    domain = max(chip.domain, 1)
    inside = max(1, min(n, domain // min(op.stride, domain)))
    if inside >= n and domain > 1:
        return Wire(op.wire / chip.link_bandwidth, 0.0, hops)
    if domain == 1 and n <= chip.chips_per_host:
        return Wire(op.wire / (chip.link_bandwidth or chip.network_bandwidth), 0.0, hops)
    groups = n / inside
    share = (1 - 1 / groups) / (1 - 1 / n)  # of what is sent, that leaves the domain
    if op.axis != "expert":
        share /= inside  # each byte leaves once, by one of the domain's cards
    within = (1 - 1 / inside) / (1 - 1 / n) if inside > 1 else 0.0
    links = chip.link_bandwidth or chip.network_bandwidth
    return Wire(op.wire * within / links, op.wire * share / chip.network_bandwidth, hops)
