"""The kernel for paged keys and values on a mesh: each device attends with its own heads. Knows no model."""

from jaxtyping import Array, Float, Int

from ops import paged_attention
from ops.ragged import Blocks, Groups, Ragged
from parallel.sharding import by_device, divides


def attend(
    q: Float[Array, "T N H"],
    k: Blocks,
    v: Blocks,
    rows: Ragged,
    *,
    groups: Groups,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "T N H"]:
    """As `ops.paged_attention.attend`, of whole arrays in an automatic layout.

    Where the mesh does not divide K, every device attends with all heads.
    """
    _, K, _, _ = k.values.shape
    heads = (None, "act_heads" if divides("act_heads", K) else None)
    early = window is None or isinstance(window, int)

    def own(q, k, v, rows, *late):
        sees = window if early else late[0]
        return paged_attention.attend(q, k, v, rows, groups=groups, window=sees, scale=scale, softcap=softcap)

    arguments, names = (q, k, v, rows), (heads, heads, heads, ())
    if not early:
        arguments, names = (*arguments, window), (*names, ())
    return by_device(own, arguments, names, out=heads)
