"""Matrix products in 8 bits for training, forward and backward: plain, or in Pallas for TPU. Knows no model, no mesh.

    y = (q(x) @ q(w)) * scale of x's row * scale of w's column      q(x) = x / scale, rounded; scale = absmax / largest

All three products of training (y, d_x, d_w) are of this kind: each has its operands scaled anew, along the dim that it
sums over. int8 is added up in int32, without error; fp8 in float32, with e4m3 for values and e5m2 for gradients.
Rounding is to nearest, so that a step is a function of its inputs alone. NaN and infinity make scales, and so results,
that are not finite: a step that overflows is seen.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

Kind = Literal["int8", "fp8"]
Kernel = Literal["plain", "pallas"]
Gradients = Literal["quantized", "plain"]  # plain: in the type of x
Dims = tuple[tuple[int], tuple[int]]

SMALLEST = 1e-30  # absmax that a scale is made of: rows of zeros stay zeros, and a scale does not underflow
TILES = (512, 1024, 1024)  # rows, columns and summed dim of a visit: 7 MiB of VMEM, twice buffered, with the sums
PLAIN, ACROSS, TRANSPOSED = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # products a b, a bᵀ and aᵀ b
LANES = 128  # multiple that all three are padded to


class Scaled(NamedTuple):
    """8-bit values, and the scales that make them real again."""

    values: Shaped[Array, "rows columns"]
    scales: Float[Array, "..."]  # one for each row or column


def quantized_einsum(
    equation: str, x: Float[Array, "..."], w: Float[Array, "..."], *, kind: Kind, kernel: Kernel
) -> Float[Array, "..."]:
    """`jnp.einsum` where the last letters of x are the first of w, and nothing else is summed: "BTNH,NHD->BTD"."""
    left, right = equation.split("->")[0].split(",")
    count = next(size for size in range(len(right), -1, -1) if left.endswith(right[:size]))
    summed, kept = right[:count], right[count:]
    if not summed or equation != f"{left},{right}->{left[: len(left) - count]}{kept}":
        raise ValueError(f"{equation!r} is not a product over the last dims of x and the first of w; give it plain")
    rows, matrix = x.reshape(*x.shape[: x.ndim - count], -1), w.reshape(math.prod(w.shape[:count]), -1)
    y = quantized_matmul(rows, matrix, kind=kind, kernel=kernel)
    return y.reshape(*x.shape[: x.ndim - count], *w.shape[count:])


def quantized_matmul(
    x: Float[Array, "*rows inputs"],
    w: Float[Array, "inputs outputs"],
    *,
    kind: Kind,
    kernel: Kernel,
    gradients: Gradients = "quantized",
) -> Float[Array, "*rows outputs"]:
    """x @ w in 8 bits, and its gradients alike, or in the type of x where `gradients` is plain."""
    y: Any = _matmul(x.reshape(-1, x.shape[-1]), w, kind, kernel, gradients)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(x, w, kind, kernel, gradients):
    value, _ = _types(kind)
    return _product(quantized(x, value, axis=1), quantized(w, value, axis=0), PLAIN, kernel, x.dtype)


def _forward(x, w, kind, kernel, gradients):
    return _matmul(x, w, kind, kernel, gradients), (x, w)


def _backward(kind, kernel, gradients, residuals, d_y):
    x, w = residuals
    if gradients == "plain":
        return d_y @ w.T, x.T @ d_y
    value, gradient = _types(kind)
    rows, columns = quantized(d_y, gradient, axis=1), quantized(d_y, gradient, axis=0)
    d_x = _product(rows, quantized(w, value, axis=1), ACROSS, kernel, x.dtype)
    d_w = _product(quantized(x, value, axis=0), columns, TRANSPOSED, kernel, w.dtype)
    return d_x, d_w


_matmul.defvjp(_forward, _backward)


def _types(kind: Kind) -> tuple[jnp.dtype, jnp.dtype]:
    """Of values and of gradients."""
    if kind == "int8":
        return jnp.dtype(jnp.int8), jnp.dtype(jnp.int8)
    return jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)


def quantized(x: Float[Array, "rows columns"], dtype: jnp.dtype, *, axis: int) -> Scaled:
    """`x` in 8 bits with one scale for all that stands along `axis`."""
    x = x.astype(jnp.float32)
    is_whole = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if is_whole else jnp.finfo(dtype).max)
    most = jnp.maximum(jnp.max(jnp.abs(x), axis=axis, keepdims=True), SMALLEST)
    values = x * (largest / most)  # one division a scale, not one a value
    return Scaled((jnp.round(values) if is_whole else values).astype(dtype), most.reshape(-1) / largest)


def _product(x: Scaled, w: Scaled, dims: Dims, kernel: str, dtype: jnp.dtype) -> Float[Array, "rows columns"]:
    if kernel == "pallas":
        return _tiled(x, w, dims, dtype)
    sums = _dot(x.values, w.values, dims)
    return (sums.astype(jnp.float32) * x.scales[:, None] * w.scales[None]).astype(dtype)


def _dot(x: Shaped[Array, "..."], w: Shaped[Array, "..."], dims: Dims) -> Shaped[Array, "rows columns"]:
    return jax.lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=_sum_type(x.dtype))


def _sum_type(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32)


# In Pallas


def _tiled(x: Scaled, w: Scaled, dims: Dims, dtype: jnp.dtype) -> Float[Array, "rows columns"]:
    """A tile of the result stays in VMEM while all tiles of the summed dim pass, and is scaled when it leaves."""
    (x_sum,), (w_sum,) = dims
    rows, inputs, outputs = x.values.shape[1 - x_sum], x.values.shape[x_sum], w.values.shape[1 - w_sum]
    m, n, k = (_tile(size, most) for size, most in zip((rows, outputs, inputs), TILES, strict=True))
    tall, wide, deep = (-(-size // tile) * tile for size, tile in ((rows, m), (outputs, n), (inputs, k)))
    x_tile, w_tile = ((m, k) if x_sum else (k, m)), ((n, k) if w_sum else (k, n))
    y = pl.pallas_call(
        functools.partial(_kernel, dims=dims),
        out_shape=jax.ShapeDtypeStruct((tall, wide), dtype),
        grid=(tall // m, wide // n, deep // k),
        in_specs=[
            pl.BlockSpec(x_tile, lambda i, j, s: (i, s) if x_sum else (s, i)),
            pl.BlockSpec(w_tile, lambda i, j, s: (j, s) if w_sum else (s, j)),
            pl.BlockSpec((m, 1), lambda i, j, s: (i, 0)),
            pl.BlockSpec((1, n), lambda i, j, s: (0, j)),
        ],
        out_specs=pl.BlockSpec((m, n), lambda i, j, s: (i, j)),
        scratch_shapes=[pltpu.VMEM((m, n), _sum_type(x.values.dtype))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * tall * deep * wide,
            bytes_accessed=tall * deep * (wide // n) + deep * wide * (tall // m) + tall * wide * dtype.itemsize,
            transcendentals=0,
        ),
        name="quantized_matmul",
    )(
        _padded(x.values, *x_tile),
        _padded(w.values, *w_tile),
        _padded(x.scales[:, None], m, 1),
        _padded(w.scales[None], 1, n),
    )
    return y[:rows, :outputs]


def _kernel(x, w, x_scales, w_scales, y, sums, *, dims):
    """x [m k] and w [k n] in 8 bits, the other way round where `dims` says so; y [m n] is scaled `sums`.

    x_scales [m 1], w_scales [1 n]; `sums` [m n] are over the last dim of the grid.
    """

    @pl.when(pl.program_id(2) == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    sums[...] += _dot(x[...], w[...], dims)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y[...] = (sums[...].astype(jnp.float32) * x_scales[...] * w_scales[...]).astype(y.dtype)


def _tile(size: int, most: int) -> int:
    """The largest multiple of LANES up to `most` that divides `size` once that is a multiple itself."""
    size = -(-size // LANES) * LANES
    return next(tile for tile in range(min(most, size), 0, -LANES) if size % tile == 0)


def _padded(x: Shaped[Array, "rows columns"], rows: int, columns: int) -> Shaped[Array, "tall wide"]:
    """Zeros after both dims, up to multiples."""
    tall, wide = x.shape
    return jnp.pad(x, ((0, -tall % rows), (0, -wide % columns)))
