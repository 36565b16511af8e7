"""A weight in parts, one buffer a core: how XLA:CPU is brought to multiply by it on all cores. Knows no mesh, no model.

XLA:CPU runs a matrix-vector product on one core, and products that don't depend on each other at the same time. Cut by
rows into as many buffers as there are cores, a weight is read at the speed of the memory (docs/benchmarks/decoding.md).
"""

import dataclasses
import math
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slabs:
    """A weight as rows [outputs, inputs], the rows cut into parts. Multiplies as the array it was made from."""

    parts: tuple[Any, ...]  # [rows, inputs] each; the last may have fewer rows
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of that array

    def __getitem__(self, whole: EllipsisType) -> "Slabs":
        """The weight itself, as `array[...]` is."""
        return self

    def einsum(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`jnp.einsum(equation, x, weight)` for an equation that sums over the last letters of x and no others."""
        left, right = equation.split("->")[0].split(",")
        summed = [letter for letter in left if letter in right]
        kept = x.shape[: x.ndim - len(summed)]
        # the barrier keeps the input from being computed again in every part's product
        rows = jax.lax.optimization_barrier(x.reshape(math.prod(kept), -1))
        product = jnp.concatenate([rows @ part.astype(x.dtype).T for part in self.parts], axis=-1)
        outputs = [size for letter, size in zip(right, self.shape, strict=True) if letter not in summed]
        return product.reshape(*kept, *outputs)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... inputs"]:
        """Rows `ids`, each looked up in every part and chosen from the one that has it."""
        size, _ = self.parts[0].shape
        found = self.parts[0].at[jnp.minimum(ids, size - 1)].get(mode="promise_in_bounds")
        for start, part in zip(range(size, self.shape[0], size), self.parts[1:], strict=True):
            mine = jnp.clip(ids - start, 0, len(part) - 1)
            found = jnp.where((ids >= start)[..., None], part.at[mine].get(mode="promise_in_bounds"), found)
        return found


def slabs(w: Float[Array, "..."], summed: tuple[int, ...], num_parts: int) -> Slabs:
    """Cut `w` into `num_parts` parts; `summed` are its dims that a product sums over."""
    kept = tuple(dim for dim in range(w.ndim) if dim not in summed)
    inputs = math.prod(w.shape[dim] for dim in summed)
    rows = w.transpose(*kept, *summed).reshape(-1, inputs)
    size = -(-len(rows) // num_parts)
    return Slabs(tuple(rows[start : start + size] for start in range(0, len(rows), size)), w.shape)
