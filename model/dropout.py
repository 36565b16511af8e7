"""Dropout whose masks are a function of where a number stands: the same on every mesh. Knows no layer.

A mask bit is a hash of its row's seed, the place in the model where dropout happens, the token and the dim. Rows carry
their seeds with them (training/step.py), so a device needs to know neither its own index nor the others'; and a few
integer operations cost a CPU far less than a counter-based generator.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

Seeds = UInt32[Array, "B"]  # one for each row of the batch, other ones at every step


def dropout(
    x: Float[Array, "B T d"], rate: int | float, seeds: Seeds | None, site: int | Int[Array, ""]
) -> Float[Array, "B T d"]:
    """x with a share `rate` of its numbers 0 and the others larger by as much (arXiv:1207.0580); as it is unseeded.

    `site` tells masks of one step apart; no dim of T or d may be split over devices.
    """
    if seeds is None or rate == 0:
        return x
    B, T, d = x.shape
    row = mixed(seeds + jnp.asarray(site).astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
    token = mixed(row[:, None] + jnp.arange(T, dtype=jnp.uint32)[None])
    bits = mixed(token[:, :, None] + jnp.arange(d, dtype=jnp.uint32)[None, None])
    kept = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


def mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Every bit of the result depends on every bit of x: the finalizer of MurmurHash3."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
