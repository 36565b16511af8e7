"""Batches on their way to the devices: each process loads the rows that its devices need. Knows no step and no file."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

FLOATS = ("mask", "source_mask")  # of a batch's arrays; the others are int32


class Loaded(NamedTuple):
    """A batch on its devices."""

    batch: Any
    cursor: dict[str, Any]  # where the loader stands after it
    data_wait: float  # seconds


class Feed(NamedTuple):
    """How the batches of a run lie on the devices."""

    sharding: NamedSharding  # of every [B, T] array
    kind: Any  # the batches' own type
    shapes: tuple[tuple[int, int], ...]  # every B, T over all processes; no two of one T

    def rows(self, num_rows: int) -> tuple[int, ...]:
        """Rows of so many that this process's devices need; the same as another's where a row is shared."""
        places = self.sharding.addressable_devices_indices_map((num_rows, self.shapes[0][1])).values()
        ranges = {place[0].indices(num_rows) for place in places if place is not None}
        return tuple(sorted({row for bounds in ranges for row in range(*bounds)}))

    def place(self, batch: Any) -> Any:
        """These rows as this process's part of the whole batch."""
        T = batch.tokens.shape[1]
        (shape,) = (shape for shape in self.shapes if shape[1] == T)
        return self.kind._make(jax.make_array_from_process_local_data(self.sharding, column, shape) for column in batch)

    def load(self, loader: Any) -> Loaded:
        """The next batch, on its way to the devices."""
        start = time.perf_counter()
        batch = next(loader)
        data_wait = time.perf_counter() - start
        return Loaded(self.place(batch), loader.state(), data_wait)

    def abstract(self) -> Iterator[Any]:
        """A batch of each shape without its numbers, over all processes."""
        types = [jnp.float32 if name in FLOATS else jnp.int32 for name in self.kind._fields]
        for shape in self.shapes:
            yield self.kind._make(jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding) for dtype in types)
