"""Matrix products in int8 or fp8, scaled by rows and columns, forward and backward. Knows no mesh, no model.

    x ≈ scale * q,  scale = max|row| / limit        x @ w ≈ (q_x @ q_w) * scale_x * scale_w

Every row of x and every column of w has a scale of its own, so one large number costs its row its precision and no
other. int8 products are summed in int32, exactly; fp8 (e4m3 forward, e5m2 for gradients, arXiv:2209.05433) in float32.
The gradients are products of the same kind, of numbers rounded anew along the dim that is summed over.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Num

Kind = Literal["int8", "fp8"]
Kernel = Literal["plain", "pallas"]
BLOCKS = (512, 384, 256, 128)  # rows, columns or summed numbers of a kernel's tile: the first that divides
FORMS = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}  # of values, of gradients
SUMS = {"int8": jnp.int32, "fp8": jnp.float32}


def quantize(x: Float[Array, "rows D"], dtype: Any) -> tuple[Num[Array, "rows D"], Float[Array, "rows 1"]]:
    """Each row as whole numbers up to 127, or in fp8, and its scale; a row of zeros has scale 1."""
    is_whole = jnp.issubdtype(dtype, jnp.integer)
    limit = 127.0 if is_whole else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(most > 0, most / limit, 1.0)
    q = x / scale
    return (jnp.round(q) if is_whole else q).astype(dtype), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def quantized_matmul(
    x: Float[Array, "T D"], w: Float[Array, "D F"], kind: Kind, kernel: Kernel = "plain", interpret: bool = False
) -> Float[Array, "T F"]:
    """x @ w in the type of x, from numbers of 8 bits."""
    values, _ = FORMS[kind]
    return _product(x, w.T, (values, values), kind, kernel, interpret).astype(x.dtype)


def _forward(x, w, kind, kernel, interpret):
    return quantized_matmul(x, w, kind, kernel, interpret), (x, w)


def _backward(kind, kernel, interpret, residuals, grad):
    x, w = residuals
    values, grads = FORMS[kind]
    d_x = _product(grad, w, (grads, values), kind, kernel, interpret)
    d_w = _product(x.T, grad.T, (values, grads), kind, kernel, interpret)
    return d_x.astype(x.dtype), d_w.astype(w.dtype)


quantized_matmul.defvjp(_forward, _backward)


def quantized_einsum(
    equation: str, x: Float[Array, "..."], w: Float[Array, "..."], *, kind: Kind, kernel: Kernel
) -> Float[Array, "..."]:
    """`jnp.einsum` for an equation that sums over the last letters of x, which are the first of w, and no others."""
    left, right = equation.split("->")[0].split(",")
    num_summed = sum(letter in right for letter in left)
    assert left[-num_summed:] == right[:num_summed], equation
    kept, columns = x.shape[:-num_summed], w.shape[num_summed:]
    inputs = math.prod(w.shape[:num_summed])
    y: Any = quantized_matmul(x.reshape(-1, inputs), w.reshape(inputs, -1), kind, kernel)
    return y.reshape(*kept, *columns)


def _product(x: Float[Array, "T D"], rows: Float[Array, "F D"], forms, kind: Kind, kernel: Kernel, interpret: bool):
    """x @ rowsᵀ in float32, both quantized along D."""
    (q, scale), (q_rows, row_scale) = quantize(x, forms[0]), quantize(rows, forms[1])
    if kernel == "pallas":
        return _tiles(q, q_rows, scale, row_scale.T, kind, interpret)
    sums = jax.lax.dot_general(q, q_rows, (((1,), (1,)), ((), ())), preferred_element_type=SUMS[kind])
    return sums.astype(jnp.float32) * scale * row_scale.T


def _tiles(q, rows, scale, row_scale, kind: Kind, interpret: bool) -> Float[Array, "T F"]:
    """The same as a Pallas kernel: a tile's sums stay in VMEM over D and are scaled as they leave."""
    (T, D), (F, _) = q.shape, rows.shape
    t, f, d = (next((block for block in BLOCKS if size % block == 0), size) for size in (T, F, D))

    def kernel(q, rows, scale, row_scale, out, sums):
        @pl.when(pl.program_id(2) == 0)
        def _():
            sums[...] = jnp.zeros_like(sums)

        contract = (((1,), (1,)), ((), ()))
        sums[...] += jax.lax.dot_general(q[...], rows[...], contract, preferred_element_type=SUMS[kind])

        @pl.when(pl.program_id(2) == D // d - 1)
        def _():
            out[...] = sums[...].astype(jnp.float32) * scale[...] * row_scale[...]

    return pl.pallas_call(
        kernel,
        grid=(T // t, F // f, D // d),
        in_specs=[
            pl.BlockSpec((t, d), lambda i, j, k: (i, k)),
            pl.BlockSpec((f, d), lambda i, j, k: (j, k)),
            pl.BlockSpec((t, 1), lambda i, j, k: (i, 0)),
            pl.BlockSpec((1, f), lambda i, j, k: (0, j)),
        ],
        out_specs=pl.BlockSpec((t, f), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((T, F), jnp.float32),
        scratch_shapes=[pltpu.VMEM((t, f), SUMS[kind])],
        cost_estimate=pl.CostEstimate(flops=2 * T * D * F, bytes_accessed=(T + F) * D + 4 * T * F, transcendentals=0),
        interpret=interpret,
        name=f"{kind}_matmul",
    )(q, rows, scale, row_scale)
