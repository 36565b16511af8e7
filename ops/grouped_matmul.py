"""Rows times the matrix of their group, forward and backward: plain `ragged_dot`, or Pallas on TPU. Knows no experts.

Rows stand sorted by group, `sizes` says how many each group has; rows beyond their sum belong to none and count as zero.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

Kernel = Literal["plain", "pallas"]

ROWS = 512  # of a tile; the kernels want a divisor of all rows
WIDTH = 1024  # of a tile's dims D and F; in `grouped_outer` half of it, since a float32 tile of the result stays in VMEM
LANES = 128  # of a TPU register: the smallest width of a tile that is not a whole dim


def grouped_matmul(
    x: Float[Array, "rows inputs"],
    w: Float[Array, "E D F"],
    sizes: Int[Array, "E"],
    *,
    kernel: Kernel,
    transposed: bool = False,
) -> Float[Array, "rows outputs"]:
    """x @ w[group of the row], from D to F, or transposed from F to D; zeros for rows of no group."""
    return _product(x, w, sizes, kernel, transposed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x, w, sizes, kernel, transposed):
    if kernel == "plain":
        y = jax.lax.ragged_dot(x, w.swapaxes(1, 2) if transposed else w, sizes)
    else:
        y = _tiled_product(x, w, sizes, transposed)
    return jnp.where((jnp.arange(len(x)) < jnp.sum(sizes))[:, None], y, jnp.zeros((), y.dtype))


def _tiled_product(x, w, sizes, transposed):
    _, D, F = w.shape
    inputs, outputs = (F, D) if transposed else (D, F)
    tiles = _whole_tiles(x)
    tiling = (_row_tile(len(tiles)), _tile(inputs, WIDTH), _tile(outputs, WIDTH))
    with jax.numpy_dtype_promotion("standard"):  # the library's own code leans on it
        return gmm(tiles, w, sizes, x.dtype, tiling, transpose_rhs=transposed)[: len(x)]


def _forward(x, w, sizes, kernel, transposed):
    return _product(x, w, sizes, kernel, transposed), (x, w, sizes)


def _backward(kernel, transposed, residuals, d_y):
    x, w, sizes = residuals
    d_x = _product(d_y, w, sizes, kernel, not transposed)
    left, right = (d_y, x) if transposed else (x, d_y)
    d_w = grouped_outer(left, right, sizes, jnp.zeros_like(w), kernel=kernel)
    return d_x, d_w, None


_product.defvjp(_forward, _backward)


def grouped_outer(
    x: Float[Array, "rows D"],
    y: Float[Array, "rows F"],
    sizes: Int[Array, "E"],
    total: Float[Array, "E D F"],
    *,
    kernel: Kernel,
) -> Float[Array, "E D F"]:
    """total + xᵀ y over each group's rows, added in float32: the gradient of `grouped_matmul` in its matrices."""
    if kernel == "plain":
        product = jax.lax.ragged_dot_general(x, y, sizes, _OUTER, preferred_element_type=jnp.float32)
        return (total.astype(jnp.float32) + product).astype(total.dtype)
    x, y = _whole_tiles(x), _whole_tiles(y)
    tiling = (_row_tile(len(x)), _tile(x.shape[1], WIDTH // 2), _tile(y.shape[1], WIDTH // 2))
    with jax.numpy_dtype_promotion("standard"):
        return tgmm(x.swapaxes(0, 1), y, sizes, total.dtype, tiling, existing_out=total)


_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _row_tile(rows: int) -> int:
    """Largest power of two up to ROWS that divides `rows`."""
    return min(ROWS, rows & -rows)


def _tile(dim: int, limit: int) -> int:
    """Largest multiple of LANES up to `limit` that divides `dim`; else `limit`, or all of a narrower dim."""
    return next((tile for tile in range(limit, 0, -LANES) if dim % tile == 0), min(dim, limit))


def _whole_tiles(x: Float[Array, "rows D"]) -> Float[Array, "padded D"]:
    """`x` with rows of zeros up to a multiple of 128, or of 16 where they are few, where tiles would be smaller."""
    multiple = 128 if len(x) >= 1024 else 16
    return jnp.pad(x, ((0, -len(x) % multiple), (0, 0)))
