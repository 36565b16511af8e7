"""Measure the real train step, prefill and decode on this machine, beside its roofs and, if asked, beside a peer.

Every round measures the roof, us, and the peer one after the other: the machine's speed drifts, so only ratios taken
within a round mean anything. Medians over the rounds are reported. Weights are random: time does not depend on them.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from data.packing import Batch
from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.generate import cache_for
from inference.request import Request
from inference.weights import serving_parameters
from model import cost, families
from model.config import ModelConfig
from model.parameters import initialize
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from perf import roofline
from perf.peer import Peer
from training.config import OptimConfig, TrainConfig
from training.state import create_state
from training.step import make_steps

Kind = Literal["train", "prefill", "decode"]
RULES = AxisRules()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One measurement."""

    kind: Kind
    batch: int  # B, sequences
    length: int  # T, tokens of a sequence, or of a prompt
    tokens: int = 32  # decoded after each prompt (decode)
    rounds: int = 5
    peer: str = ""  # an interpreter with torch and transformers that runs the same work in turns


class Work(NamedTuple):
    """One side of the comparison: a round of it, and what bounds it."""

    round: Callable[[], float]  # -> seconds
    tokens: int  # in a round
    flops: float  # in a round
    bytes: float  # in a round: weights and cache, each time they are read


def bench_model() -> ModelConfig:
    """The 42.5M-parameter Llama-style decoder that training is compared on: L 8, D 512, F 1408, V 32,768, tied."""
    return ModelConfig(
        vocab_size=32768, embed_dim=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, ffn_dim=1408,
        max_length=512, rope_theta=1e4, norm_eps=1e-6,
    )  # fmt: skip


def train_work(model: ModelConfig, bench: BenchConfig) -> Work:
    """AdamW steps on random tokens: the step that train.py runs."""
    B, T = bench.batch, bench.length
    schedule = TrainConfig(steps=1_000_000, batch_size=B, seq_len=T)
    mesh = make_mesh(MeshConfig())
    steps = make_steps(model, OptimConfig(schedule="constant", warmup_steps=0), schedule, mesh, RULES)
    state = [create_state(model, steps.optimizer, mesh, RULES, ema=False, seed=0)]
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (B, T + 1), dtype=np.int32)
    ones, places = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    batch = jax.device_put(Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, places), steps.batch)

    def round_() -> float:
        start = time.perf_counter()
        state[0], _ = steps.train(state[0], batch)
        jax.block_until_ready(state[0])
        return time.perf_counter() - start

    return Work(round_, B * T, cost.train_flops(model, T) * B * T, 0.0)


def decode_work(model: ModelConfig, bench: BenchConfig) -> Work:
    """Greedy tokens after a prompt whose reading is not timed: the engine that infer.py runs."""
    engine, prompts = _engine(model, bench)
    greedy, B = SamplingConfig(temperature=0.0), bench.batch

    def round_() -> float:
        stream = engine.run([Request(prompt=p, sampling=greedy, max_tokens=bench.tokens + 1) for p in prompts()])
        begun: set[int] = set()
        while len(begun) < B:
            begun |= {output.id for output in next(stream)}
        start, counted = time.perf_counter(), 0
        for outputs in stream:
            counted += sum(len(output.tokens) for output in outputs)
        return (time.perf_counter() - start) / counted * B * bench.tokens

    middle = bench.length + bench.tokens // 2
    flops = cost.decode_flops(model, middle) * B * bench.tokens
    traffic = cost.decode_bytes(model, middle, batch=B, weight_bytes=4, cache_bytes=4) * bench.tokens
    return Work(round_, B * bench.tokens, flops, traffic)


def prefill_work(model: ModelConfig, bench: BenchConfig) -> Work:
    """Reading prompts into the cache and choosing the first token: the engine that infer.py runs."""
    engine, prompts = _engine(model, bench)
    greedy = SamplingConfig(temperature=0.0)

    def round_() -> float:
        requests = [Request(prompt=prompt, sampling=greedy, max_tokens=1) for prompt in prompts()]
        start = time.perf_counter()
        for _ in engine.run(requests):
            pass
        return time.perf_counter() - start

    flops = cost.prefill_flops(model, bench.length) * bench.batch
    return Work(round_, bench.batch * bench.length, flops, 4.0 * cost.num_parameters(model))


def _engine(model: ModelConfig, bench: BenchConfig) -> tuple[Engine, Callable[[], list[tuple[int, ...]]]]:
    """An engine with random weights, and prompts that it has not seen."""
    mesh = make_mesh(MeshConfig())
    config, parameters = serving_parameters(model, initialize(model, mesh, RULES, key=jax.random.key(0)), mesh)
    random = np.random.default_rng(0)

    def prompts() -> list[tuple[int, ...]]:
        return [tuple(row) for row in random.integers(0, model.vocab_size, (bench.batch, bench.length)).tolist()]

    room = cache_for([bench.length + bench.tokens + 1] * bench.batch)
    options = EngineConfig(max_rows=bench.batch, cache_tokens=room, prefix_cache=False)
    return Engine(config, parameters, mesh, RULES, num_tokens=model.vocab_size, options=options), prompts


KINDS: dict[Kind, tuple[Callable[[], ModelConfig], Callable[[ModelConfig, BenchConfig], Work]]] = {
    "train": (bench_model, train_work),
    "prefill": (families.smollm2_135m, prefill_work),
    "decode": (families.smollm2_135m, decode_work),
}


def run(bench: BenchConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; -> medians: tokens a second, the roof and the share of it reached, and the ratio to the peer."""
    shape, make = KINDS[bench.kind]
    model = shape()
    work = make(model, bench)
    say(f"{bench.kind}: {cost.num_parameters(model):,} parameters, batch {bench.batch}, length {bench.length}")
    work.round()
    ask = {**dataclasses.asdict(bench), "model": dataclasses.asdict(model), "threads": len(_cores())}
    peer = Peer(bench.peer, "transformers_llama.py", ask) if bench.peer else None
    rounds = []
    for number in range(1, bench.rounds + 1):
        roof = roofline.measure(rounds=3)
        seconds, theirs = work.round(), peer.round() if peer else None
        bound = max(work.flops / roof.flops_per_second, work.bytes / roof.bytes_per_second)
        rounds.append({
            "tokens_per_second": work.tokens / seconds,
            "roof_tokens_per_second": work.tokens / bound,
            "share_of_roof": bound / seconds,
            "matmul_gflops": roof.flops_per_second / 1e9,
            "memory_gbytes_per_second": roof.bytes_per_second / 1e9,
            **({"peer_tokens_per_second": work.tokens / theirs, "ratio_to_peer": theirs / seconds} if theirs else {}),
        })  # fmt: skip
        say(f"round {number}/{bench.rounds}  " + "  ".join(f"{key} {value:.4g}" for key, value in rounds[-1].items()))
    if peer:
        peer.close()
    medians = {key: roofline.median(row[key] for row in rounds) for key in rounds[0]}
    return {**dataclasses.asdict(bench), "peer": peer.name if peer else None, **medians}


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
