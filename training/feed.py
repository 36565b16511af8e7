"""Batches on their way to the devices: each process loads the rows that its devices need. Knows no step and no file."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from data import pipeline
from data.packing import Batch


class Loaded(NamedTuple):
    """A batch on its devices."""

    batch: Batch
    cursor: dict[str, Any]  # where the loader stands after it
    data_wait: float  # seconds


class Feed(NamedTuple):
    """How the batches of a run lie on the devices."""

    sharding: NamedSharding  # of every [B, T] array
    shape: tuple[int, int]  # B, T over all processes

    def rows(self) -> tuple[int, ...]:
        """Rows that this process's devices need, all columns of them; the same as another's where a row is shared."""
        places = self.sharding.addressable_devices_indices_map(self.shape).values()
        ranges = {place[0].indices(self.shape[0]) for place in places if place is not None}
        return tuple(sorted({row for bounds in ranges for row in range(*bounds)}))

    def place(self, batch: Batch) -> Batch:
        """These rows as this process's part of the whole batch."""
        return Batch._make(
            jax.make_array_from_process_local_data(self.sharding, column, self.shape) for column in batch
        )

    def load(self, loader: pipeline.TrainLoader) -> Loaded:
        """The next batch, on its way to the devices."""
        start = time.perf_counter()
        batch = next(loader)
        data_wait = time.perf_counter() - start
        return Loaded(self.place(batch), loader.state(), data_wait)

    def abstract(self) -> Batch:
        """A batch without its numbers, over all processes."""
        types = [jnp.float32 if name == "mask" else jnp.int32 for name in Batch._fields]
        return Batch._make(jax.ShapeDtypeStruct(self.shape, dtype, sharding=self.sharding) for dtype in types)
