"""Measure the training step of the lineage's models on this machine, beside equal ones in PyTorch if asked.

As in perf/bench.py, every round measures us and the peer one after the other, and ratios are taken within a round.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np

from data.pair_batches import PairBatch
from model.parameters import num_parameters
from model.seq2seq_config import Seq2SeqConfig
from model.seq2seq_cost import train_flops
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from perf import roofline
from perf.peer import Peer
from training.config import OptimConfig, TrainConfig
from training.state import create_state
from training.step import make_steps

Pairs = Literal["fixed", "additive", "general", "transformer"]
PADDED, DROPOUT, SMOOTHING = 0.2, 0.1, 0.1  # of both sides
SIZES: dict[str, Any] = {
    **{"vocab_size": 5056, "source_vocab_size": 5056, "embed_dim": 256, "max_length": 64, "dropout": DROPOUT},
}
MODELS: dict[Pairs, Seq2SeqConfig] = {
    "fixed": Seq2SeqConfig(kind="fixed", recurrent_dim=512, bidirectional=False, **SIZES),
    "additive": Seq2SeqConfig(kind="attention", recurrent_dim=512, **SIZES),
    "general": Seq2SeqConfig(kind="attention", score="general", recurrent_dim=512, **SIZES),
    "transformer": Seq2SeqConfig(kind="transformer", num_layers=3, num_heads=4, head_dim=64, ffn_dim=512, **SIZES),
}
PEERS: dict[Pairs, list[str]] = {
    "fixed": ["fixed", "-U", "512"],
    "additive": ["attention", "-U", "256"],
    "general": ["attention", "--attention", "general", "-U", "256"],
    "transformer": ["transformer", "-F", "512", "--attention-dropout", "0"],
}
assert set(MODELS) == set(PEERS) == set(get_args(Pairs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsBench:
    """One measurement."""

    model: Pairs
    batch: int = 96  # B, pairs
    length: int = 24  # S and T, tokens of a row, padding included
    rounds: int = 9
    peer: str = ""  # an interpreter with torch that makes the same step in turns
    peer_options: tuple[str, ...] = ()  # of perf/peers/torch_seq2seq.py


def pairs(bench: PairsBench, vocabulary: int) -> PairBatch:
    """Random pairs; lengths are spread evenly, as the peer's are."""
    rng, (B, T) = np.random.default_rng(0), (bench.batch, bench.length)
    lengths = np.linspace(max(1, (1 - 2 * PADDED) * T), T, B).round().astype(int)
    at = np.arange(T)[None]
    source_mask, mask = (at < rng.permutation(lengths)[:, None] for _ in range(2))
    source, tokens, targets = rng.integers(4, vocabulary, (3, B, T)).astype(np.int32)
    floats = [one.astype(np.float32) for one in (source_mask, mask)]
    return PairBatch(source * source_mask, floats[0], tokens * mask, targets * mask, floats[1])


def step_of(bench: PairsBench) -> tuple[Callable[[], float], int]:
    """A training step that tells its seconds, and the target tokens that count in it."""
    model, mesh, rules = MODELS[bench.model], make_mesh(MeshConfig(data=1), jax.devices()[:1]), AxisRules()
    schedule = TrainConfig(steps=1_000_000, batch_size=bench.batch, seq_len=bench.length, label_smoothing=SMOOTHING)
    steps = make_steps(model, OptimConfig(schedule="constant", warmup_steps=0), schedule, mesh, rules)
    state = [create_state(model, steps.optimizer, mesh, rules, ema=False, seed=0)]
    host = pairs(bench, model.vocab_size)
    batch = jax.device_put(host, steps.batch)

    def step() -> float:
        start = time.perf_counter()
        state[0], _ = steps.train(state[0], batch)
        jax.block_until_ready(state[0])
        return time.perf_counter() - start

    return step, int(host.mask.sum())


def run(bench: PairsBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; -> medians: target tokens a second, the share of the roof reached, and the ratio to the peer."""
    model = MODELS[bench.model]
    step, tokens = step_of(bench)
    flops = train_flops(model, bench.length, bench.length) * bench.batch * bench.length
    say(f"{bench.model}: {num_parameters(model):,} parameters, {bench.batch} x {bench.length}, {tokens:,} that count")
    for _ in range(3):
        step()
    shape = ["-B", bench.batch, "-S", bench.length, "-T", bench.length, "-V", model.vocab_size, "--padded", PADDED]
    asked = [*PEERS[bench.model], *map(str, shape), "--shared", "--dropout", str(DROPOUT), *bench.peer_options]
    peer = Peer(bench.peer, "torch_seq2seq.py", asked) if bench.peer else None
    rows = []
    for number in range(1, bench.rounds + 1):
        roof = roofline.measure(rounds=3)
        seconds, theirs = step(), peer.round() if peer else None
        rows.append({
            "tokens_per_second": tokens / seconds,
            "share_of_roof": flops / roof.flops_per_second / seconds,
            **({"peer_tokens_per_second": tokens / theirs, "ratio_to_peer": theirs / seconds} if theirs else {}),
        })  # fmt: skip
        say(f"round {number}/{bench.rounds}  " + "  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()))
    if peer:
        peer.close()
    medians = {key: roofline.median(row[key] for row in rows) for key in rows[0]}
    return {**dataclasses.asdict(bench), "peer": peer.name if peer else None, **medians}
