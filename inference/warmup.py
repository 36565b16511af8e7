"""Compiles the steps that a prompt will take from shapes alone, while its model's weights are still being read."""

from typing import Any

import jax
import jax.numpy as jnp

from inference import steps
from inference.cache import slots_for
from inference.config import SamplingConfig
from inference.engine import piece_widths
from inference.sampling import knobs
from inference.steps import Cursor, Limits, Program


def compile_ahead(program: Program, parameters: Any, *, length: int, budget: int, rows: int) -> None:
    """Compile for `rows` answers of up to `budget` tokens to one prompt of `length`; `parameters` are shapes.

    A later call of a step with arrays of these shapes finds its program.
    """
    one, all_rows, V = program.batch(1), program.batch(rows), program.config.vocab_size
    widths = piece_widths(length)
    slots = slots_for(max(length + budget, sum(widths)))

    def shape(*dims: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=steps.on_mesh(program, ()))

    memory = steps.memory_shapes(program, one, slots)
    logits = shape(one, V, dtype=jnp.float32)
    for begins, width in dict.fromkeys((i == 0, width) for i, width in enumerate(widths)):
        prompt = shape(one, width), shape(one), shape(one)
        steps.prefill.lower(parameters, *prompt, logits, memory, program=program, begins=begins).compile()
    seen, limits = shape(all_rows, V, dtype=bool), Limits(shape(V, dtype=bool), shape(all_rows))
    settings = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), knobs([SamplingConfig()] * all_rows))
    logits = shape(all_rows, V, dtype=jnp.float32)
    steps.first.lower(logits, seen, shape(all_rows), limits, settings, program=program).compile()
    row = shape(all_rows)
    cursor = Cursor(token=row, position=row, index=row, finished=shape(all_rows, dtype=bool), seen=seen)
    memory, stopped = steps.memory_shapes(program, all_rows, slots), shape(all_rows, dtype=bool)
    steps.decode.lower(
        parameters, cursor, memory, limits, settings, stopped, shape(), program=program
    ).compile()  # fmt: skip
