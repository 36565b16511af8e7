"""Every row arrives where its group is and its result comes back, however unevenly rows are spread."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel.exchange import in_rounds, make_plan

E, ROWS, X = 8, 6, 4


def multiply(groups, x, axes, capacity):
    """x * (group + 1), multiplied by the device that holds the group; and the number of rounds."""
    plan = make_plan(groups, num_groups=E, axes=axes, capacity=capacity)
    held = E // plan.num_devices
    first = jax.lax.axis_index(axes) * held if axes else 0

    def body(turn, y):
        rows = turn.send(x)
        here = first + jnp.repeat(jnp.arange(held), turn.sizes, total_repeat_length=len(rows))
        return y + turn.bring_back(rows * (here + 1).astype(x.dtype)[:, None])

    return in_rounds(plan, body, jnp.zeros_like(x)), jnp.full(1, plan.num_rounds)


@functools.cache
def on_devices(capacity):
    mesh = Mesh(np.array(jax.devices()[:X]), ("expert",))
    inside = functools.partial(multiply, axes=("expert",), capacity=capacity)
    spread = P("expert")
    return jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False))


def check(groups, capacity):
    groups = jnp.asarray(groups, jnp.int32)
    x = jnp.arange(2.0 * len(groups)).reshape(-1, 2) + 1
    expected = jnp.where((groups < E)[:, None], x * (groups + 1).astype(x.dtype)[:, None], 0)
    y, rounds = on_devices(capacity)(groups, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(multiply(groups, x, (), capacity)[0], expected)
    return set(rounds.tolist())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, E), min_size=X * ROWS, max_size=X * ROWS))
def test_any_groups(groups):
    check(groups, 1.25)


@pytest.mark.parametrize(
    ("groups", "capacity", "rounds"),
    [
        ([0, 2, 4, 6] * 24, 1.25, 1),  # even: 6 of 24 rows to each device, 8 slots
        ([5] * 96, 1.25, 3),  # 24 rows of every device to one
        ([8] * 96, 1.25, 0),  # none to anyone
        ([8] * 95 + [7], 1.25, 1),
        ([3] * 96, 4.0, 1),  # room for the worst
    ],
)
def test_rounds(groups, capacity, rounds):
    assert check(groups, capacity) == {rounds}
