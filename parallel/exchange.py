"""Rows sent to the devices that hold their groups, and back, in rounds of bounded size. Knows no model.

Each device of an axis holds some of E groups and has rows of its own, each of one group. A round sends at most C rows
from each device to each (one all-to-all of [X * C, D] over X devices), and as many back. Nothing is dropped: rounds run
until no device has rows left, one where rows are spread evenly. Without an axis one round holds all rows, none is moved.

    plan = make_plan(groups, num_groups=E, axes=("expert",), capacity=1.25)
    y = in_rounds(plan, lambda turn, y: y + turn.bring_back(work(turn.send(x), turn.sizes)), zeros)
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

Carry = TypeVar("Carry")


class Plan(NamedTuple):
    """Whose rows go where in which round. A device's rows stand in a list sorted by group, hence by device."""

    axes: tuple[str, ...]  # of the exchange; () has one device
    num_devices: int  # X
    capacity: int  # C, rows from each device to each in one round
    order: Int[Array, "rows"]  # row at each place of the list
    starts: Int[Array, "parts"]  # of the part of the list for each device; then of rows of no group
    device: Int[Array, "rows"]  # that a row goes to; X for rows of no group
    rank: Int[Array, "rows"]  # place of a row in the part for its device
    incoming: Int[Array, "X e"]  # rows that each device has for each group of this one
    num_rounds: Int[Array, ""] | int


class Round(NamedTuple):
    """One exchange: the next C rows for each device."""

    sizes: Int[Array, "e"]  # rows here of each group of this device; further rows are of none
    outgoing: Int[Array, "slots"]  # row in each slot, X blocks of C; arbitrary in slots that no row takes
    sorting: Int[Array, "slots"] | None  # slot of each arrived row, sorted by group
    slots: Int[Array, "rows"]  # that a row left from
    present: Bool[Array, "rows"]  # it took part
    axes: tuple[str, ...]

    def send(self, x: Shaped[Array, "items ..."], *, copies: int = 1) -> Shaped[Array, "slots ..."]:
        """Each row's value where its group is, sorted by group. An item has `copies` rows: row r is of item r // copies."""
        leaving = x.at[self.outgoing // copies].get(mode="promise_in_bounds")
        if self.sorting is None:
            return leaving
        arrived = jax.lax.all_to_all(leaving, self.axes, 0, 0, tiled=True)
        return arrived.at[self.sorting].get(mode="promise_in_bounds")

    def bring_back(self, y: Shaped[Array, "slots ..."]) -> Shaped[Array, "rows ..."]:
        """Results for rows as `send` gave them, where the rows came from; zero for rows of other rounds."""
        if self.sorting is not None:
            unsorted = y.at[jnp.argsort(self.sorting)].get(mode="promise_in_bounds")
            y = jax.lax.all_to_all(unsorted, self.axes, 0, 0, tiled=True)
        mine = self.present.reshape(-1, *(1,) * (y.ndim - 1))
        return jnp.where(mine, y.at[self.slots].get(mode="promise_in_bounds"), jnp.zeros((), y.dtype))


def make_plan(groups: Int[Array, "rows"], *, num_groups: int, axes: tuple[str, ...], capacity: float) -> Plan:
    """Plan for rows of these groups (`num_groups` means none), of which each device of `axes` holds equally many.

    A round holds `capacity` times the rows that each device would send to each, were they spread evenly.
    """
    X = jax.lax.axis_size(axes) if axes else 1
    order = jnp.argsort(groups, stable=True)
    sizes = jnp.sum(groups[:, None] == jnp.arange(num_groups)[None], axis=0, dtype=jnp.int32)
    starts = jnp.pad(jnp.cumsum(jnp.sum(sizes.reshape(X, -1), axis=1, dtype=jnp.int32)), (1, 0))
    device = groups // (num_groups // X)
    rank = jnp.argsort(order) - starts[device]
    if not axes:
        return Plan(axes, X, len(groups), order, starts, device, rank, sizes[None], 1)
    C = min(_round_up(math.ceil(capacity * len(groups) / X)), _round_up(len(groups)))
    everyone = jax.lax.all_gather(sizes, axes).reshape(X, X, -1)  # by sender, receiver, group
    most = jnp.max(jnp.sum(everyone, axis=2))
    incoming = jnp.take(everyone, jax.lax.axis_index(axes), axis=1)
    return Plan(axes, X, C, order, starts, device, rank, incoming, (most + C - 1) // C)


def _round_up(rows: int) -> int:
    """To a multiple of 8, or of 128 where that adds little: kernels cut rows into tiles of that divisor."""
    multiple = 128 if rows >= 1024 else 8
    return -(-rows // multiple) * multiple


def in_rounds(plan: Plan, body: Callable[[Round, Carry], Carry], carry: Carry) -> Carry:
    """`body` over all rounds, in a loop that reverse mode can't differentiate unless there is but one device."""
    if not plan.axes:
        return body(_round(plan, 0), carry)
    return jax.lax.fori_loop(0, plan.num_rounds, lambda number, carry: body(_round(plan, number), carry), carry)


def _round(plan: Plan, number: Int[Array, ""] | int) -> Round:
    X, C, first = plan.num_devices, plan.capacity, number * plan.capacity
    present = (plan.device < X) & (plan.rank >= first) & (plan.rank < first + C)
    slots = jnp.where(present, plan.device * C + plan.rank - first, 0)
    if not plan.axes:
        return Round(plan.incoming[0], plan.order, None, slots, present, plan.axes)
    ranks = first + jnp.arange(C)
    places = jnp.minimum(plan.starts[:-1, None] + ranks[None], len(plan.order) - 1)
    ends = jnp.cumsum(plan.incoming, axis=1)
    group = jnp.sum(ranks[None, :, None] >= ends[:, None], axis=2).reshape(-1)  # of each arrived row
    sizes = jnp.sum(group[:, None] == jnp.arange(ends.shape[1])[None], axis=0, dtype=jnp.int32)
    return Round(sizes, plan.order[places.reshape(-1)], jnp.argsort(group, stable=True), slots, present, plan.axes)
