"""Rows of a batch that are of any length, and blocks of keys and values that belong to them. Knows no attention.

What kernels for paged memory are given (PagedAttention, arXiv:2309.06180): queries stand flat, one row after the other,
and a row's table says in which blocks its keys and values stand.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LANES = 128  # numbers in a row of a TPU's memory: XLA would turn a pool of shorter rows, and turn it back for a kernel


class Ragged(NamedTuple):
    """Rows of queries among flat T, each with the blocks that it looks at."""

    tables: Int[Array, "B M"]  # in the order of positions; entries past the row's end, or before its window, are 0
    starts: Int[Array, "B"]  # where the row's first query stands
    lengths: Int[Array, "B"]  # its queries; 0 is an idle row
    positions: Int[Array, "B"]  # of its first query in its sequence: query i sees slots 0 … positions + i


class Blocks(NamedTuple):
    """Keys or values of one layer. H, and of scales Z, may be more than they hold: whole lanes, zeros at their ends."""

    values: Array  # [P, K, Z, H], floats or int8
    scales: Array | None  # float32 [P, K, Z] that int8 values are multiplied by; None for floats


Groups = tuple[tuple[int, int], ...]  # ((32, 1), (8, 32)): 32 rows of 1 query, then 8 rows of 32; T = 288, B = 40


def quantized(x: Float[Array, "*rows H"]) -> tuple[Int[Array, "*rows H"], Float[Array, "*rows"]]:
    """-> int8 values and the scale of each row: the largest of the row is 127, and zeros stay zeros."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    safe = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / safe[..., None]).astype(jnp.int8), scale
