"""Measures this machine's constants, each by the piece of the real program that it is of. Knows no prediction's use."""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inference import sampling
from inference.room import TILE
from model import cost
from model.config import ModelConfig
from ops import attention, paged_reference
from ops.ragged import Blocks, Ragged
from perf import bench, roofline, this_machine
from perf.bench import BenchConfig
from perf.roofline import Roof, median
from perf.this_machine import PROBE, SMALL_PROBE, WIDE_PROBE, Machine, Table
from training.losses import chunked_token_loss

Say = Callable[[str], None]
STEADY = 0.1  # by which the roof may differ before and after
CHAIN = 12_000_000  # numbers of the weights of a chain
SERVED_ROWS, SERVED_SIZES = (1, 2, 8, 16, 32, 64, 256), ((256, 256), (256, 704), (512, 1408), (576, 16384))
TRAINED_ROWS, TRAINED_SIZES = (128, 512, 2048), ((128, 128), (128, 384), (256, 704), (512, 1408))


def seconds_of(run: Callable, *given: Any, budget: float = 0.1) -> float:
    """Least seconds of a jitted call, within a budget: what others take of the machine is not of the call."""
    call, times = jax.jit(run), []
    for _ in range(2):
        jax.block_until_ready(call(*given))
    end = time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(call(*given))
        times.append(time.perf_counter() - start)
    return min(times)


def ones(*shape: int) -> jax.Array:
    """Numbers to compute with; time does not depend on them."""
    return jnp.ones(shape, jnp.float32)


def served_product(rows: int, inner: int, columns: int) -> float:
    """As ops/slabs.py multiplies, a slab a core: in a chain, by weights that no cache holds, as layers are."""
    pairs = max(1, min(16, CHAIN // (2 * inner * columns)))
    weights = [[ones(out // 2, given) for _ in range(2)] for out, given in ((columns, inner), (inner, columns)) * pairs]

    def chain(x, weights):
        for parts in weights:
            x = jnp.concatenate([jax.lax.optimization_barrier(x) @ part.T for part in parts], -1)
        return x

    return seconds_of(chain, ones(rows, inner), weights) / (2 * pairs)


def trained_product(rows: int, inner: int, columns: int) -> float:
    """Forward, the gradient of the input and that of the weight."""
    x, w, y = ones(rows, inner), ones(inner, columns), ones(rows, columns)
    products = (lambda x, w, y: x @ w), (lambda x, w, y: y @ w.T), (lambda x, w, y: x.T @ y)
    return sum(seconds_of(product, x, w, y, budget=0.03) for product in products)


def table(product: Callable, rows: tuple[int, ...], sizes: tuple[tuple[int, int], ...]) -> Table:
    """Of a product, by rows and size."""
    seconds = tuple(tuple(product(M, K, N) for M in rows) for K, N in sizes)
    return Table(rows, tuple(K * N for K, N in sizes), seconds)


def paged(batch: int, before: int, queries: int, *, heads: int = 4, shared: int = 1) -> float:
    """One layer's attention of serving, H = 64; `shared` query heads look at the same keys."""
    Z, M = 32, 16
    pool = Blocks(ones(batch * M + 1, heads, Z, 64), None)
    rows = Ragged(
        jnp.arange(batch * M, dtype=jnp.int32).reshape(batch, M) + 1,
        jnp.arange(batch, dtype=jnp.int32) * queries,
        jnp.full(batch, queries, jnp.int32),
        jnp.full(batch, before, jnp.int32),
    )

    def attend(q, k, v, rows):
        how = {"groups": ((batch, queries),), "window": None, "scale": 1.0, "softcap": None}
        return paged_reference.attend(q, k, v, rows, **how)

    return seconds_of(attend, ones(batch * queries, heads * shared, 64), pool, pool, rows)


def writing(tokens: int, heads: int) -> float:
    """Seconds of putting one head's key or value of a token into its block."""
    Z = 32
    pool, new = Blocks(ones(1025, heads, Z, 64), None), ones(tokens, heads, 64)
    places = jnp.arange(tokens, dtype=jnp.int32) + Z
    write = jax.jit(paged_reference.write, donate_argnums=0)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        pool = jax.block_until_ready(write(pool, new, places))
        times.append(time.perf_counter() - start)
    return min(times) / (tokens * heads)


def choosing(rows: int, vocab: int) -> float:
    """Greedy choosing among logits."""
    slots = sampling.empty_slots(rows, vocab)
    index = jnp.arange(rows, dtype=jnp.int32)

    def choose(logits, slots):
        return sampling.choose(logits, slots, index, index, num_tokens=vocab)

    return seconds_of(choose, ones(rows, vocab) * jnp.arange(vocab, dtype=jnp.float32)[None], slots)


def train_attention(batch: int, length: int, heads: int) -> float:
    """Seconds of a score, forward and backward, H = 64."""
    segments, x = jnp.ones((batch, length), jnp.int32), ones(batch, length, heads, 64)

    def both(q, k, v, grad):
        how = {"window": None, "scale": 1.0, "softcap": None}
        out, back = jax.vjp(lambda q, k, v: attention.causal(q, k, v, segments, **how), q, k, v)
        return out, back(grad)

    scores = batch * heads * sum(128 * (start + 128) for start in range(0, length, 128))
    return seconds_of(both, x, x, x, x) / scores


def loss(flops: float, batch: int = 2, length: int = 512, width: int = 256, vocab: int = 8192) -> float:
    """Seconds of a logit beyond the three products."""
    targets, mask = jnp.zeros((batch, length), jnp.int32), ones(batch, length)

    def total(hidden, table):
        found: Any = chunked_token_loss(hidden, table, targets, mask, length, None, 0.0)
        return found.total

    took = seconds_of(jax.value_and_grad(total, (0, 1)), ones(batch, length, width), ones(vocab, width))
    return max(took - 6 * batch * length * width * vocab / flops, 0.0) / (batch * length * vocab)


def measure(say: Say) -> Machine:
    """All constants: pieces first, then what probes of the real steps take beyond them."""
    roof = roofline.measure()
    say(f"roofs: {roof.flops_per_second / 1e9:.0f} GFLOP/s, {roof.bytes_per_second / 1e9:.1f} GB/s")
    gather = paged(8, 250, 1), paged(1, 100, 1)
    numbers = 8 * 256 * 2 * 4 * 64, 128 * 2 * 4 * 64
    each = (gather[0] - gather[1]) / (numbers[0] - numbers[1])
    one, three = (paged(8, 224, TILE, shared=shared) / (8 * TILE * 4 * 256) for shared in (1, 3))
    score = max(three - one, 0.0) / 2
    key = max(one - score, 0.0) * TILE / 128
    few, many = choosing(1, 16384), choosing(16, 16384)
    logit = (many - few) / 15 / 16384
    found = Machine(
        name=platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        flops=roof.flops_per_second,
        bandwidth=roof.bytes_per_second,
        served=table(served_product, SERVED_ROWS, SERVED_SIZES),
        trained=table(trained_product, TRAINED_ROWS, TRAINED_SIZES),
        gather=each,
        gather_start=max(gather[1] - each * numbers[1], 0.0),
        tile_score=score,
        tile_key=key,
        write=writing(256, 4),
        train_score=train_attention(2, 256, 4),
        logit=logit,
        logit_start=max(few - 16384 * logit, 0.0),
        loss_logit=loss(roof.flops_per_second),
    )
    say("pieces are measured; now probes of whole steps")
    found = with_rest(found, say)
    drift = roofline.measure().flops_per_second / roof.flops_per_second
    if not 1 - STEADY < drift < 1 + STEADY:
        say(f"the roof is {drift:.2f} of what it was at the start: the machine was busy; measure again when it is not")
    return found


def with_rest(machine: Machine, say: Say) -> Machine:
    """What probes of the real steps take beyond the pieces, which may be less than nothing where pieces overlap."""
    rest = []
    for batch in (1, 8, 32):
        beyond = real("decode", PROBE, batch, 64) - this_machine.decode_seconds(machine, PROBE, batch, 64 + TOKENS // 2)
        rest.append((batch, beyond / PROBE.num_layers))
    beyond = real("prefill", PROBE, 1, 256) - this_machine.prefill_seconds(machine, PROBE, 1, 256)
    rest.append((256, beyond / PROBE.num_layers))
    say("the rest of a layer in serving: " + ", ".join(f"{t} tokens {s * 1e3:.2f} ms" for t, s in rest))
    beyond = real("train", WIDE_PROBE, 1, 32) - this_machine.train_seconds(machine, WIDE_PROBE, 1, 32)
    machine = dataclasses.replace(machine, update=max(beyond, 0.0) / cost.num_parameters(WIDE_PROBE))
    say(f"a parameter in training: {machine.update * 1e9:.2f} ns")
    trained = []
    for model, batch in ((SMALL_PROBE, 4), (PROBE, 2), (PROBE, 8)):
        numbers = batch * 256 * model.embed_dim
        beyond = real("train", model, batch, 256) - this_machine.train_seconds(machine, model, batch, 256)
        trained.append((numbers, beyond / model.num_layers / numbers))
    say("a number of a token in training: " + ", ".join(f"{n:,} {s * 1e9:.0f} ns" for n, s in trained))
    return dataclasses.replace(machine, served_rest=tuple(rest), trained_rest=tuple(trained))


def real(kind: bench.Kind, model: ModelConfig, batch: int, length: int, rounds: int = 3) -> float:
    """Least seconds of our own step."""
    return min(work_seconds(kind, model, batch, length, rounds))


def work_seconds(kind: bench.Kind, model: ModelConfig, batch: int, length: int, rounds: int) -> list[float]:
    """Of each round."""
    make = {"train": bench.train_work, "prefill": bench.prefill_work, "decode": bench.decode_work}[kind]
    asked = BenchConfig(kind=kind, batch=batch, length=length, tokens=TOKENS)
    work = make(model, asked)
    for _ in range(2):
        work.round()
    return [work.round() / (TOKENS if kind == "decode" else 1) for _ in range(rounds)]


TOKENS = 16  # of a round of decoding


class Checked(NamedTuple):
    """A step, predicted and measured, in turns with the roof."""

    kind: bench.Kind
    model: str
    batch: int
    length: int
    predicted: float  # seconds, at the machine's speed of that minute
    measured: float
    speed: float  # of the machine against the calibration's

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1


def llama(width: int, layers: int, ffn: int, vocab: int) -> ModelConfig:
    """A Llama-style decoder with heads of 64."""
    heads = width // 64
    return ModelConfig(
        vocab_size=vocab, embed_dim=width, num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=64,
        ffn_dim=ffn, max_length=1024, rope_theta=1e4, norm_eps=1e-6,
    )  # fmt: skip


def configs() -> Iterator[tuple[bench.Kind, str, ModelConfig, int, int]]:
    """What is checked: none of them is a probe."""
    from model import families

    small, middle, large = llama(256, 4, 704, 4096), bench.bench_model(), families.smollm2_135m()
    yield "train", "5M", small, 4, 128
    yield "train", "5M", small, 8, 256
    yield "train", "42M", middle, 1, 256
    yield "train", "42M", middle, 1, 512
    yield "train", "42M", middle, 2, 512
    yield "prefill", "5M", small, 4, 128
    yield "prefill", "42M", middle, 1, 256
    yield "prefill", "SmolLM2-135M", large, 1, 128
    yield "prefill", "SmolLM2-135M", large, 1, 512
    yield "decode", "5M", small, 1, 64
    yield "decode", "5M", small, 16, 64
    yield "decode", "42M", middle, 4, 128
    yield "decode", "SmolLM2-135M", large, 1, 64
    yield "decode", "SmolLM2-135M", large, 8, 128


def predicted(machine: Machine, kind: bench.Kind, model: ModelConfig, batch: int, length: int) -> float:
    """Seconds of a step."""
    if kind == "train":
        return this_machine.train_seconds(machine, model, batch, length)
    if kind == "prefill":
        return this_machine.prefill_seconds(machine, model, batch, length)
    return this_machine.decode_seconds(machine, model, batch, length + TOKENS // 2)


def check(machine: Machine, say: Say, *, rounds: int = 3) -> list[Checked]:
    """Predicted beside measured. The machine's speed drifts, so the roof is measured before each round."""
    found = []
    for kind, name, model, batch, length in configs():
        make = {"train": bench.train_work, "prefill": bench.prefill_work, "decode": bench.decode_work}[kind]
        work = make(model, BenchConfig(kind=kind, batch=batch, length=length, tokens=TOKENS))
        for _ in range(2):
            work.round()
        ratios, speeds = [], []
        for _ in range(rounds):
            roof: Roof = roofline.measure(rounds=2)
            speed = roof.flops_per_second / machine.flops
            ratios.append(work.round() / (TOKENS if kind == "decode" else 1) * speed)
            speeds.append(speed)
        seconds = predicted(machine, kind, model, batch, length)
        found.append(Checked(kind, name, batch, length, seconds, median(ratios), median(speeds)))
        say(row_of(found[-1]))
    return found


def row_of(row: Checked) -> str:
    """One line of the table."""
    return (
        f"{row.kind:<8}{row.model:<14}{row.batch:>3} x {row.length:<5}{row.predicted * 1e3:>9.1f} ms"
        f"{row.measured * 1e3:>9.1f} ms{row.error:>+8.1%}   speed {row.speed:.2f}"
    )


def summary(rows: list[Checked]) -> dict[str, Any]:
    """Of all."""
    errors = np.abs([row.error for row in rows])
    times = [row.measured for row in rows]
    return {
        "configs": len(rows),
        "span": max(times) / min(times),
        "median_abs_error": float(np.median(errors)),
        "p90_abs_error": float(np.percentile(errors, 90)),
        "rows": [row._asdict() | {"error": row.error} for row in rows],
    }
