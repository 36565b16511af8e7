"""A recurrence as a scan of one step, its weights' gradients in one product after the scan. Knows no cell and no mesh.

Left to itself, the derivative of a scan adds to every weight's gradient at every step: a sum as large as the weight, T
times. Here a step multiplies by asking for it, `linear(name, v)`; what it multiplied and what came back are kept, and
one product over all steps makes the gradient: as many FLOPs, but in one large matmul, and nothing is added up.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Linear = Callable[[str, Float[Array, "B i"]], Float[Array, "B o"]]
# step(linear, constants, carry, x) -> carry, y: one turn of the scan; linear(name, v) is v @ weights[name].
Step = Callable[[Linear, Any, Any, Any], tuple[Any, Any]]


def linear_of(weights: dict[str, Any]) -> Linear:
    """The products of a step that is taken by itself."""
    return lambda name, v: v @ weights[name].astype(v.dtype)


def recur_plainly(step: Step, weights: dict[str, Any], constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`recur` as one plain scan: the slow twin."""

    linear = linear_of(weights)
    return jax.lax.scan(lambda carry, x: step(linear, constants, carry, x), carry, xs)


def recur(step: Step, weights: dict[str, Any], constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """Run `step` over the leading T of `xs`; -> the last carry and all that it gave, with a leading T.

    `weights` are [i, o] each; `constants` are what every step sees (encoder states); both are differentiated.
    """
    return _recur(step, weights, constants, carry, xs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(step, weights, constants, carry, xs):
    return recur_plainly(step, weights, constants, carry, xs)


def _forward(step, weights, constants, carry, xs):
    def run(shifts, constants, carry, xs):
        def body(carry, turn):
            x, shift = turn
            taken = {}

            def linear(name, v):
                assert name not in taken, f"{name} is multiplied twice in a step; give each product its own weight"
                taken[name] = v
                return v @ weights[name].astype(v.dtype) + shift[name]

            carry, y = step(linear, constants, carry, x)
            return carry, (y, taken)

        carry, (ys, taken) = jax.lax.scan(body, carry, (xs, shifts))
        return (carry, ys), taken

    shifts = _no_shifts(step, weights, constants, carry, xs)
    result, pull, taken = jax.vjp(run, shifts, constants, carry, xs, has_aux=True)
    return result, (pull, taken, weights)


def _no_shifts(step, weights, constants, carry, xs) -> dict[str, Any]:
    """Zeros that are added to every product: their gradient is the products' own."""
    shapes = {}

    def once(constants, carry, x):
        def linear(name, v):
            shapes[name] = jax.eval_shape(lambda v, w: v @ w.astype(v.dtype), v, weights[name])
            return jnp.zeros(shapes[name].shape, shapes[name].dtype)

        return step(linear, constants, carry, x)

    jax.eval_shape(once, constants, carry, jax.tree.map(lambda x: x[0], xs))
    T = jax.tree.leaves(xs)[0].shape[0]
    return {name: jnp.zeros((T, *shape.shape), shape.dtype) for name, shape in shapes.items()}


def _backward(step, residuals, cotangent):
    pull, taken, weights = residuals
    shifts, constants, carry, xs = pull(cotangent)
    grads = {
        name: jnp.einsum("TBi,TBo->io", taken[name], shifts[name], preferred_element_type=jnp.float32).astype(w.dtype)
        if name in taken
        else jnp.zeros_like(w)
        for name, w in weights.items()
    }
    return grads, constants, carry, xs


_recur.defvjp(_forward, _backward)
