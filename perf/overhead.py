"""What serving costs beside the model: the host's part of each step, and choosing tokens. Knows no trace.

Host: within `watched`, calls into the device (enqueue a step, fetch a result) are timed; what is left of `Engine.step`
is scheduling, arrays for the device and handing out tokens. The device computes meanwhile, so this bounds from above
what the host adds. Choosing: the compiled decode step, in turns with the same step whose `choose` takes any token.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from inference import sampling, steps
from inference.config import SamplingConfig
from inference.engine import Engine
from model.parameters import Parameters
from perf.roofline import median


class Watch:
    """Seconds of an engine's steps, and of these inside calls into the device."""

    def __init__(self):
        self.steps = self.device = 0.0

    @property
    def host_share(self) -> float:
        """The part of the steps' time that the host worked, the device beside it or not."""
        return (self.steps - self.device) / max(self.steps, 1e-9)


@contextlib.contextmanager
def watched(engine: Engine) -> Iterator[Watch]:
    """Time the engine's steps inside the block."""
    watch, step, enqueue, fetch = Watch(), engine.step, steps.step, jax.device_get

    def timed(call: Callable, name: str) -> Callable:
        def timing(*given, **named):
            start = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                setattr(watch, name, getattr(watch, name) + time.perf_counter() - start)

        return timing

    engine.step, steps.step, jax.device_get = timed(step, "steps"), timed(enqueue, "device"), timed(fetch, "device")
    try:
        yield watch
    finally:
        del engine.step
        steps.step, jax.device_get = enqueue, fetch


def sampling_shares(
    program: steps.Program, parameters: Parameters, *, rows: int, context: int, rounds: int, block_size: int = 32
) -> dict[str, float]:
    """The share of a decode step that choosing takes, greedy and drawn (temperature 0.8, top-p 0.95); medians."""
    shape = steps.Shape(rows, 1, 0)
    batch = decode_batch(program, shape, context, block_size)
    pools = steps.empty_pools(program, _num_blocks(program, rows, context, block_size), block_size, int8=False)
    greedy = sampling.empty_slots(rows, program.config.vocab_size)
    drawn = sampling.knobs_of(SamplingConfig(temperature=0.8, top_p=0.95))
    knobs = jax.tree.map(lambda one: jnp.full(rows + 1, one), drawn)
    sides = {
        "bare": (_without_choosing(), greedy),
        "greedy": (steps.step, greedy),
        "drawn": (steps.step, jax.tree.map(jnp.copy, greedy)._replace(knobs=knobs)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, (step, slots) in sides.items():
            given = jax.tree.map(jnp.copy, slots)
            jax.block_until_ready(given)
            start = time.perf_counter()
            stepped = step(parameters, given, pools, batch, program=program, shape=shape)
            jax.block_until_ready(stepped)
            pools = stepped.pools
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    ratios = {name: median(b / s for b, s in zip(seconds["bare"], seconds[name], strict=True)) for name in sides}
    return {f"{name}_sampling_share": 1 - ratios[name] for name in ("greedy", "drawn")}


def decode_batch(program: steps.Program, shape: steps.Shape, context: int, block_size: int) -> steps.Batch:
    """Rows that all stand at the same place of sequences of their own."""
    rows, per = shape.rows, -(-context // block_size)
    table = 1 + jnp.arange(rows * per, dtype=jnp.int32).reshape(rows, per)
    return steps.Batch(
        tokens=jnp.zeros(rows, jnp.int32),
        slots=jnp.arange(rows, dtype=jnp.int32),
        positions=jnp.full(rows, context - 1, jnp.int32),
        lengths=jnp.ones(rows, jnp.int32),
        index=jnp.zeros(rows, jnp.int32),
        chooses=jnp.ones(rows, bool),
        tables=dict.fromkeys(_kinds(program), table),
    )


def _num_blocks(program: steps.Program, rows: int, context: int, block_size: int) -> dict[str, int]:
    return dict.fromkeys(_kinds(program), 1 + rows * -(-context // block_size))


def _kinds(program: steps.Program) -> list[str]:
    return sorted(set(program.config.layer_kinds))


def _without_choosing() -> Any:
    """The step with a `choose` that takes any token, compiled for itself."""
    jitted: Any = steps.step

    def step(parameters, slots, pools, batch, *, program, shape):
        choose, steps.choose = steps.choose, any_token
        try:
            return jitted.__wrapped__(parameters, slots, pools, batch, program=program, shape=shape)
        finally:
            steps.choose = choose

    return jax.jit(step, static_argnames=("program", "shape"), donate_argnames=("slots", "pools"))


def any_token(logits, slots, slot, index, *, num_tokens, drafts=None) -> sampling.Choice:
    """Looks at one logit of each row, but only when all have been computed."""
    logits = jax.lax.optimization_barrier(logits)
    shape = (len(logits), sampling.MAX_TOP)
    tokens = (logits[:, 0] > 1e30).astype(jnp.int32)
    return sampling.Choice(tokens, logits[:, 0], jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
