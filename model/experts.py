"""The experts' FFN: each token through the experts chosen for it, on whatever devices they are. Knows no router.

Backward sends tokens and gradients again and computes hidden values again, so that it needs but the inputs: under full
remat no exchange runs twice. All-to-alls of tokens: two forward, three backward. A gate is applied before the down
projection, for its gradient is then <hidden, d hidden> and no output needs to be kept.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.layers import ACTIVATIONS
from ops.grouped_matmul import Kernel, grouped_matmul, grouped_outer
from parallel.exchange import Plan, Round, in_rounds, make_plan


class Weights(NamedTuple):
    """The experts of this device; F may be its part of an expert's width."""

    gate: Float[Array, "e D F"]
    up: Float[Array, "e D F"]
    down: Float[Array, "e F D"]


class Execution(NamedTuple):
    """How the experts are run: all of it known when the program is traced."""

    num_experts: int  # E, over all devices
    activation: str
    axes: tuple[str, ...]  # mesh axes that the experts are split over, inside a shard_map
    capacity: float  # of a round of the exchange (parallel/exchange.py)
    kernel: Kernel
    accumulate: Literal["float32", "weight"]  # type in which rounds add to the weights' gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_experts(
    how: Execution,
    x: Float[Array, "tokens D"],
    gates: Float[Array, "tokens A"],
    chosen: Int[Array, "tokens A"],
    weights: Weights,
) -> Float[Array, "tokens D"]:
    """Sum over a token's experts of down(gate * act(x gate) * (x up)). Expert `num_experts` means none.

    Where F is split, the sum over its parts is the caller's.
    """
    _, A = chosen.shape
    matmul = functools.partial(grouped_matmul, kernel=how.kernel)

    def body(turn: Round, y):
        rows, gate = turn.send(x, copies=A), turn.send(gates.reshape(-1))
        a, b = matmul(rows, weights.gate, turn.sizes), matmul(rows, weights.up, turn.sizes)
        out = matmul(_hidden(how.activation, a, b, gate), weights.down, turn.sizes)
        return _add_copies(y, turn.bring_back(out))

    return in_rounds(_plan(how, chosen), body, jnp.zeros_like(x))


def _plan(how: Execution, chosen: Int[Array, "tokens A"]) -> Plan:
    return make_plan(chosen.reshape(-1), num_groups=how.num_experts, axes=how.axes, capacity=how.capacity)


def _hidden(activation: str, a: Float[Array, "rows F"], b: Float[Array, "rows F"], gate: Float[Array, "rows"]):
    h = ACTIVATIONS[activation](a.astype(jnp.float32)) * b.astype(jnp.float32) * gate[:, None]
    return h.astype(a.dtype)


def _add_copies(total: Float[Array, "tokens D"], rows: Float[Array, "rows D"]) -> Float[Array, "tokens D"]:
    """Each token's rows added to it, in float32."""
    sums = jnp.sum(rows.reshape(len(total), -1, rows.shape[-1]), axis=1, dtype=jnp.float32)
    return (total.astype(jnp.float32) + sums).astype(total.dtype)


def _forward(how, x, gates, chosen, weights):
    return apply_experts(how, x, gates, chosen, weights), (x, gates, chosen, weights)


def _backward(how, residuals, d_y):
    x, gates, chosen, weights = residuals
    _, A = chosen.shape

    def body(turn: Round, sums):
        d_x, d_gates, d_weights = sums
        rows, gate, d_out = turn.send(x, copies=A), turn.send(gates.reshape(-1)), turn.send(d_y, copies=A)
        d_rows, d_gate, d_weights = _expert_gradients(how, turn, (rows, gate, d_out), weights, d_weights)
        d_gates = d_gates + turn.bring_back(d_gate).reshape(d_gates.shape)
        return _add_copies(d_x, turn.bring_back(d_rows)), d_gates, d_weights

    def zeros(w):
        return jnp.zeros(w.shape, w.dtype if how.accumulate == "weight" else jnp.float32)

    start = jnp.zeros_like(x), jnp.zeros_like(gates), jax.tree.map(zeros, weights)
    d_x, d_gates, d_weights = in_rounds(_plan(how, chosen), body, start)
    return d_x, d_gates, None, jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)


def _expert_gradients(how, turn, arrived, weights, total):
    """Of the rows that arrived, of their gates, and of the weights, these added to `total`."""
    rows, gate, d_out = arrived
    matmul = functools.partial(grouped_matmul, sizes=turn.sizes, kernel=how.kernel)
    outer = functools.partial(grouped_outer, sizes=turn.sizes, kernel=how.kernel)
    a, b = matmul(rows, weights.gate), matmul(rows, weights.up)
    h, pull = jax.vjp(functools.partial(_hidden, how.activation), a, b, gate)
    d_a, d_b, d_gate = pull(matmul(d_out, weights.down, transposed=True))
    d_rows = matmul(d_a, weights.gate, transposed=True) + matmul(d_b, weights.up, transposed=True)
    d_weights = Weights(
        outer(rows, d_a, total=total.gate), outer(rows, d_b, total=total.up), outer(h, d_out, total=total.down)
    )
    return d_rows, d_gate, d_weights


apply_experts.defvjp(_forward, _backward)
