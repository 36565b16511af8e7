"""Measures serving on this machine: the engine on a trace beside other ways of answering the same requests.

Every round plays all sides one after the other, since the machine's speed drifts: ratios are taken within a round, and
medians over the rounds are reported. Requests that share nothing are compared with ways of batching, those that share
beginnings with not sharing, and copying with not guessing.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from inference import location, weights
from inference.config import EngineConfig
from inference.engine import Engine
from model import families
from model.config import ModelConfig
from model.parameters import Parameters, initialize
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from perf import workload
from perf.answers import Played
from perf.overhead import sampling_shares, watched
from perf.peer import Peer
from perf.playing import play
from perf.roofline import median
from perf.workload import Trace, Workload

RULES = AxisRules()
STATIC = 8  # requests of a static batch
DOCUMENTS = ("model/memory.py", "inference/engine.py", "perf/peer.py", "CONTRIBUTING.md")  # that are copied
COPIED = 160  # tokens of each
LENGTH = 1024  # tokens of a sequence that an engine has room for, at least

Say = Callable[[str], None]
Sides = dict[str, Callable[[str], Played]]  # each given a salt that no play before it had


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One measurement."""

    work: Workload = Workload()
    copy: bool = False  # copying tasks instead of the workload; needs a model that can copy
    model: str = ""  # as infer.py takes it; empty is SmolLM2-135M with random weights
    rows: int = 32  # sequences computed at once
    rounds: int = 3
    peer: str = ""  # an interpreter with torch and transformers that runs static batches in turns

    def __post_init__(self):
        if self.copy and not self.model:
            raise ValueError("random weights copy nothing; give --model smollm2 with --mix copy")
        shares = self.copy or self.work.mix in ("prefix", "chat")
        if self.peer and (shares or math.isfinite(self.work.rate)):
            raise ValueError("--peer answers static batches of requests that share nothing and come all at once; "
                             "leave out --peer, or give --mix sharegpt or fixed and no --rate")  # fmt: skip


class Served(NamedTuple):
    """A model with its numbers."""

    config: ModelConfig
    parameters: Parameters
    mesh: Mesh
    encode: Callable[[str], list[int]] | None  # text to tokens, where the model is a real one


def run(bench: ServeConfig, say: Say) -> tuple[dict[str, Any], dict[str, Played]]:
    """Measure; -> medians of figures and of ratios, and the last round as it was played."""
    served = serve(bench.model)
    trace = copying(served) if bench.copy else workload.trace(
        dataclasses.replace(bench.work, vocab=served.config.vocab_size)
    )  # fmt: skip
    engine = ready(served, bench, trace, say)
    sides = ways(bench, served, engine, trace, say)
    peer = peer_of(bench, served.config, trace)
    rounds, played = [], {}
    for number in range(1, bench.rounds + 1):
        with watched(engine) as watch:
            played = {"engine": play(engine, trace, salt=f"{number}")}
        played |= {name: side(f"{number} {name}") for name, side in sides.items()}
        rounds.append({
            **played["engine"].figures(),
            "host_share": watch.host_share,
            **compared(played),
            **(against(peer, played["engine"]) if peer else {}),
        })  # fmt: skip
        say(f"round {number}/{bench.rounds}  " + "  ".join(f"{key} {value:.4g}" for key, value in rounds[-1].items()))
    if peer:
        peer.close()
    figures = {key: median(row[key] for row in rounds) for key in rounds[0]}
    shares = sampling_shares(
        engine.program, engine.parameters, rows=bench.rows, context=middle(trace), rounds=4 * bench.rounds
    )
    return {**described(bench, trace), **figures, **shares}, played


def serve(model: str) -> Served:
    """The model that is named, or SmolLM2-135M's shape with random weights."""
    mesh = make_mesh(MeshConfig())
    if not model:
        config = families.smollm2_135m()
        parameters = initialize(config, mesh, RULES, key=jax.random.key(0))
        return Served(*weights.serving_parameters(config, parameters, mesh), mesh, None)
    opened = weights.open_model(location.locate(model))
    config, parameters = weights.serving_parameters(opened.config, opened.load(mesh, RULES), mesh)
    return Served(config, parameters, mesh, opened.tokenizer.encode)


def engine_for(served: Served, options: EngineConfig) -> Engine:
    """An engine where the model's numbers are."""
    V = served.config.vocab_size
    return Engine(served.config, served.parameters, served.mesh, RULES, num_tokens=V, options=options)


def ready(served: Served, bench: ServeConfig, trace: Trace, say: Say, **options: Any) -> Engine:
    """An engine that has compiled what it needs, with room for rows of the longest sequence.

    Sequences of up to LENGTH tokens share sizes and so, on disk, compiled programs.
    """
    room = min(max(LENGTH, workload.longest(trace)), served.config.max_length)
    tokens = (bench.rows + 1) * room
    engine = engine_for(served, EngineConfig(max_rows=bench.rows, cache_tokens=tokens, max_length=room, **options))
    if bench.copy:  # all at once, so that every play has the steps of this one
        play(engine, trace, salt="warm")
    else:
        engine.warm_up(say)
    return engine


def ways(bench: ServeConfig, served: Served, engine: Engine, trace: Trace, say: Say) -> Sides:
    """What the engine's play is compared with."""
    if bench.copy:
        guessing = ready(served, bench, trace, say, speculation="ngram")
        return {"guessing": lambda salt: play(guessing, trace, salt=salt)}
    if bench.work.mix in ("prefix", "chat"):
        return {"without_reuse": lambda salt: play(engine, trace, salt=salt, apart=True)}
    batches = {
        f"fixed_{count}": workload.trace(
            Workload(
                mix="fixed",
                requests=count,
                scale=bench.work.scale,
                vocab=served.config.vocab_size,
                seed=bench.work.seed,
            )
        )
        for count in sorted({max(bench.rows // 2, 1), bench.rows})
    }
    some = [arrival._replace(time=0.0) for arrival in trace[: max(1, len(trace) // 4)]]
    return {
        **{name: lambda salt, batch=batch: play(engine, batch, salt=salt) for name, batch in batches.items()},
        "static": lambda salt: play(engine, trace, salt=salt, together=STATIC),
        "one_at_a_time": lambda salt: play(engine, some, salt=salt, together=1),
    }


def compared(played: dict[str, Played]) -> dict[str, float]:
    """Ratios of one round."""
    engine, found = played["engine"], {}
    speeds = {name: one.throughput for name, one in played.items()}
    fixed = [speed for name, speed in speeds.items() if name.startswith("fixed")]
    if fixed:
        found = {f"{name}_tokens_per_second": speed for name, speed in speeds.items() if name != "engine"}
        found["ratio_to_best_fixed_batch"] = speeds["engine"] / max(fixed)
        found |= {f"ratio_to_{name}": speeds["engine"] / speeds[name] for name in ("static", "one_at_a_time")}
    if "without_reuse" in played:
        alone = played["without_reuse"]
        found["ttft_ratio_to_without_reuse"] = median(engine.first_tokens) / median(alone.first_tokens)
        found["without_reuse_ttft_p50_ms"] = median(alone.first_tokens) * 1e3
    if "guessing" in played:
        guessing = played["guessing"]
        steps = [sum(answer.outputs for answer in one.answers) for one in (engine, guessing)]
        found["plain_decode_steps"], found["guessing_decode_steps"] = map(float, steps)
        found["ratio_of_decode_steps"] = steps[0] / steps[1]
        found["acceptance_rate"] = guessing.counted["accepted"] / max(guessing.counted["drafted"], 1)
        found["speedup_by_guessing"] = guessing.throughput / engine.throughput
    return found


def peer_of(bench: ServeConfig, config: ModelConfig, trace: Trace) -> Peer | None:
    """`transformers` with static batches of the same requests in the same order."""
    if not bench.peer:
        return None
    lengths = [[len(arrival.prompt), arrival.max_tokens] for arrival in trace]
    batches = [lengths[start : start + STATIC] for start in range(0, len(lengths), STATIC)]
    ask = {"batches": batches, "threads": weights.cores(), "model": dataclasses.asdict(config)}
    return Peer(bench.peer, "transformers_static.py", ask)


def against(peer: Peer, engine: Played) -> dict[str, float]:
    """A round of the peer, and how much quicker the engine was."""
    speed = sum(answer.tokens for answer in engine.answers) / peer.round()
    return {"peer_tokens_per_second": speed, "ratio_to_peer": engine.throughput / speed}


def copying(served: Served) -> Trace:
    """Files of this repository, to be repeated."""
    assert served.encode is not None
    root = pathlib.Path(__file__).parents[1]
    documents = [served.encode((root / name).read_text(encoding="utf-8"))[:COPIED] for name in DOCUMENTS]
    return workload.copying(documents, answer=COPIED)


def middle(trace: Trace) -> int:
    """Tokens that a query of the middle sequence sees halfway through its answer."""
    return max(1, round(median(len(arrival.prompt) + arrival.max_tokens / 2 for arrival in trace)))


def described(bench: ServeConfig, trace: Trace) -> dict[str, Any]:
    """What was measured."""
    return {
        "model": bench.model or "SmolLM2-135M, random weights",
        "mix": "copy" if bench.copy else bench.work.mix,
        "requests": len(trace),
        "rate": "all at once" if math.isinf(bench.work.rate) else bench.work.rate,
        "rows": bench.rows,
        "rounds": bench.rounds,
        "prompt_tokens": sum(len(arrival.prompt) for arrival in trace),
        "answer_tokens": sum(arrival.max_tokens for arrival in trace),
    }
