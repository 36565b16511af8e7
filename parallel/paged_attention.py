"""The kernel for paged keys and values on a mesh: each device attends with its own heads. Knows no model."""

from jaxtyping import Array, Float, Int

from ops import paged_attention
from ops.ragged import Blocks, Groups, Ragged
from parallel.sharding import Names, by_device, divides


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
    heads = _heads(k)
    early = window is None or isinstance(window, int)

    def own(q, k, v, rows, *late):
        sees = window if early else late[0]
        return paged_attention.attend(q, k, v, rows, groups=groups, window=sees, scale=scale, softcap=softcap)

    arguments, names = (q, k, v, rows), (heads, heads, heads, ())
    if not early:
        arguments, names = (*arguments, window), (*names, ())
    return by_device(own, arguments, names, out=heads)


def write(blocks: Blocks, new: Float[Array, "T K H"], slots: Int[Array, "T"]) -> Blocks:
    """As `ops.paged_attention.write`: each device writes its own heads."""
    heads = _heads(blocks)
    return by_device(paged_attention.write, (blocks, new, slots), (heads, heads, ()), out=heads)


def _heads(blocks: Blocks) -> Names:
    """The first two dims of whatever has heads second."""
    _, K, _, _ = blocks.values.shape
    return None, "act_heads" if divides("act_heads", K) else None
