"""Rows times the matrix of their group, forward and backward: plain, or in Pallas for TPU. Knows no experts.

Rows stand sorted by group, `sizes` says how many each has; rows beyond their sum belong to none and count as zero.
Plain is XLA's `ragged_dot`; but on CPU, where that multiplies every row by every matrix, a loop over blocks of rows.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

Kernel = Literal["plain", "pallas"]

BLOCK = 128  # rows of a turn of the loop on CPU, fewer where groups are smaller
ROWS = 512  # of a tile; the kernels want a divisor of all rows
WIDTH = 2048  # bytes of a tile's dims D and F, for tiles share 16 MiB of VMEM; in `grouped_outer` of their float32 sum
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
        w = w.swapaxes(1, 2) if transposed else w
        y = jax.lax.platform_dependent(x, w, sizes, cpu=_looped_product, default=jax.lax.ragged_dot)
    else:
        y = _tiled_product(x, w, sizes, transposed)
    return jnp.where((jnp.arange(len(x)) < jnp.sum(sizes))[:, None], y, jnp.zeros((), y.dtype))


def _tiled_product(x, w, sizes, transposed):
    _, D, F = w.shape
    inputs, outputs = (F, D) if transposed else (D, F)
    tiles = _whole_tiles(x)
    width = WIDTH // x.dtype.itemsize
    tiling = (_row_tile(len(tiles)), _tile(inputs, width), _tile(outputs, width))
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
        return jax.lax.platform_dependent(x, y, sizes, total, cpu=_looped_outer, default=_ragged_outer)
    x, y = _whole_tiles(x), _whole_tiles(y)
    tiling = (_row_tile(len(x)), _tile(x.shape[1], WIDTH // 4), _tile(y.shape[1], WIDTH // 4))
    with jax.numpy_dtype_promotion("standard"):
        return tgmm(x.swapaxes(0, 1), y, sizes, total.dtype, tiling, existing_out=total)


def _ragged_outer(x, y, sizes, total):
    dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    product = jax.lax.ragged_dot_general(x, y, sizes, dims, preferred_element_type=jnp.float32)
    return (total.astype(jnp.float32) + product).astype(total.dtype)


class Blocks(NamedTuple):
    """Runs of rows of one group each, in order."""

    size: int  # rows of a block, some of which may be beyond its group
    number: Int[Array, ""]  # of blocks, at most
    group: Int[Array, "blocks"]
    start: Int[Array, "blocks"]  # first row
    end: Int[Array, "blocks"]  # of its group


def _blocks(rows: int, sizes: Int[Array, "E"]) -> Blocks:
    """Each group cut from its first row on."""
    size = min(BLOCK, max(8, 1 << (rows // len(sizes)).bit_length()))
    counts = (sizes + size - 1) // size
    ends, last = jnp.cumsum(sizes), jnp.cumsum(counts)
    block = jnp.arange(rows // size + len(sizes))
    group = jnp.minimum(jnp.sum(block[:, None] >= last[None], axis=1), len(sizes) - 1)
    start = (ends - sizes)[group] + (block - (last - counts)[group]) * size
    return Blocks(size, last[-1], group, start, ends[group])


def _looped_product(x, w, sizes):
    blocks = _blocks(len(x), sizes)
    x = jnp.pad(x, ((0, blocks.size), (0, 0)))

    def body(i, y):  # rows beyond the group are put right by the next block
        block = jax.lax.dynamic_slice_in_dim(x, blocks.start[i], blocks.size) @ w[blocks.group[i]]
        return jax.lax.dynamic_update_slice_in_dim(y, block, blocks.start[i], 0)

    return jax.lax.fori_loop(0, blocks.number, body, jnp.zeros((len(x), w.shape[2]), x.dtype))[: -blocks.size]


def _looped_outer(x, y, sizes, total):
    blocks = _blocks(len(x), sizes)
    x, y = [jnp.pad(rows, ((0, blocks.size), (0, 0))) for rows in (x, y)]

    def body(i, total):
        start, group = blocks.start[i], blocks.group[i]
        left, right = [jax.lax.dynamic_slice_in_dim(rows, start, blocks.size) for rows in (x, y)]
        is_inside = (start + jnp.arange(blocks.size) < blocks.end[i])[:, None]
        left = jnp.where(is_inside, left, jnp.zeros((), x.dtype))
        product = jnp.einsum("MD,MF->DF", left, right, preferred_element_type=jnp.float32)
        return total.at[group].add(product)

    return jax.lax.fori_loop(0, blocks.number, body, total.astype(jnp.float32)).astype(total.dtype)


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
