"""This machine as a chip: what its parts take, measured, and from that the seconds of a step of ours on it.

    python -m perf calibrate            measure (about a minute) and keep the constants
    python -m perf calibrate --check    predicted beside measured, for steps of many sizes

XLA:CPU multiplies small matrices slower than large ones and few rows slower than many, so products are a table by rows
and size. The parts of a layer that are no product and no attention (small programs, passes over activations) are what
small probes of the real step take beyond the rest. Knows no other chip.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

from inference.config import EngineConfig
from inference.room import TILE
from model import cost
from model.config import ModelConfig
from parallel.chips import Chip
from perf.replica import Seconds, Step

SLOTS, BLOCK = 128, 128  # keys that serving looks at together, queries of training: of ops/
LOSS_CHUNK = 512  # of training/config.py
Numbers = tuple[float, ...]


class Table(NamedTuple):
    """Seconds of a product [M, K] x [K, N] by rows M and size K N; between them on straight lines of logarithms."""

    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    seconds: tuple[Numbers, ...]  # by size, then by rows

    def at(self, rows: int | float, size: int | float) -> float:
        """Seconds; beyond the table in proportion."""
        by_size = [line(rows, self.rows, row) for row in self.seconds]
        return line(size, self.sizes, by_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The constants."""

    name: str
    cores: int
    memory: int  # bytes
    flops: float  # FLOP/s of a large float32 product
    bandwidth: float  # B/s of reading memory that no cache holds
    served: Table  # products of serving: one weight, cut into a slab a core
    trained: Table  # products of training: forward and both of backward together
    gather: float  # seconds of a key-value number that a query of an answer looks at
    gather_start: float  # seconds of such attention of one layer, whatever it looks at
    tile_score: float  # seconds of a score of a prompt's query and a key, of one head
    tile_key: float  # and of each key-value number that a tile of queries looks at
    write: float  # seconds of writing one head's key or value of a token into the cache
    train_score: float  # the same forward and backward
    logit: float  # seconds of choosing among each logit
    logit_start: float
    loss_logit: float  # seconds of a logit in the loss, beyond its products
    update: float = 0.0  # seconds of a parameter: AdamW's step, and gradients added up
    served_rest: tuple[tuple[int, float], ...] = ()  # tokens of a step -> seconds of the rest of a layer of PROBE
    trained_rest: tuple[tuple[int, float], ...] = ()  # tokens · D of a step -> seconds of each of these of a layer


PROBE = ModelConfig(
    vocab_size=2048, embed_dim=384, num_layers=4, num_heads=6, num_kv_heads=6, head_dim=64, ffn_dim=1024,
    max_length=512, rope_theta=1e4, norm_eps=1e-6,
)  # fmt: skip
SMALL_PROBE = dataclasses.replace(PROBE, embed_dim=128, num_heads=2, num_kv_heads=2, ffn_dim=384)
WIDE_PROBE = dataclasses.replace(PROBE, vocab_size=32768, embed_dim=512, num_layers=1)  # parameters, and little else


def line(x: int | float, points: tuple[int, ...], values: "Numbers | list[float]") -> float:
    """The value at x between points, logarithms on straight lines; beyond them in proportion to x."""
    if x >= points[-1]:
        return values[-1] * x / points[-1]
    if x <= points[0]:
        return values[0]
    high = next(i for i, point in enumerate(points) if point >= x)
    share = math.log(x / points[high - 1]) / math.log(points[high] / points[high - 1])
    return math.exp(math.log(values[high - 1]) * (1 - share) + math.log(values[high]) * share)


def chip(machine: Machine) -> Chip:
    """The machine as a row of parallel/chips.py."""
    return Chip(
        name="this",
        vendor=machine.name,
        bf16_flops=machine.flops,
        fp32_flops=machine.flops,
        hbm_bytes=machine.memory,
        hbm_bandwidth=machine.bandwidth,
        citations="measured by python -m perf calibrate",
    )


# Predicted -----------------------------------------------------------------------------------------------------------


def layer_products(model: ModelConfig) -> list[tuple[int, int]]:
    """[K, N] of every product of a dense layer."""
    D, N, K, H, F = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim, model.ffn_dim
    if model.num_experts or model.kv_rank:
        raise ValueError("this machine's constants are of dense layers without latent attention; give such a model")
    return [(D, N * H), (D, K * H), (D, K * H), (N * H, D), *[(D, F)] * (2 if model.gated else 1), (F, D)]


def train_seconds(machine: Machine, model: ModelConfig, batch: int, length: int) -> float:
    """An AdamW step."""
    D, L, V, N, H = model.embed_dim, model.num_layers, model.vocab_size, model.num_heads, model.head_dim
    tokens = batch * length
    block = max(BLOCK, -(-length // 16))
    keys = sum(min(block, length - start) * min(start + block, length) for start in range(0, length, block))
    products = sum(machine.trained.at(tokens, K * N) for K, N in layer_products(model))
    attention = batch * N * keys * machine.train_score * (0.5 + H / 128)  # measured at H = 64
    rest = tokens * D * between(tokens * D, machine.trained_rest)
    chunk = min(LOSS_CHUNK, length)
    scored = batch * -(-length // chunk) * chunk
    head = 6 * scored * D * V / machine.flops + scored * V * machine.loss_logit
    layer = products + attention + rest
    return L * layer + head + cost.num_parameters(model) * machine.update


class Shape(NamedTuple):
    """A compiled step of serving, and what its queries look at."""

    rows: int  # answers, padded
    tiles: int  # of prompts, padded
    keys: tuple[int, ...]  # of each eight rows
    tile_keys: tuple[int, ...]  # of each eight tiles


def serve_seconds(machine: Machine, model: ModelConfig, shape: Shape) -> float:
    """A step of the engine."""
    D, L, V = model.embed_dim, model.num_layers, model.vocab_size
    tokens, chosen = shape.rows + TILE * shape.tiles, shape.rows + shape.tiles
    products = sum(machine.served.at(tokens, K * N) for K, N in layer_products(model))
    numbers = 2 * model.num_kv_heads * model.head_dim
    looked = sum(min(8, shape.rows) * keys for keys in shape.keys) * numbers
    attention = looked * machine.gather + (machine.gather_start if shape.rows else 0.0)
    seen = sum(min(8, shape.tiles) * keys for keys in shape.tile_keys)
    attention += seen * TILE * model.num_heads * machine.tile_score * (0.5 + model.head_dim / 128)
    attention += seen * numbers * machine.tile_key + 2 * tokens * model.num_kv_heads * machine.write
    rest = between(tokens, machine.served_rest)
    first = machine.served_rest[0][1] if machine.served_rest else 0.0
    rest = first + (rest - first) * numbers / (2 * PROBE.num_kv_heads * PROBE.head_dim)
    head = machine.served.at(chosen, D * V) + machine.logit_start + chosen * V * machine.logit
    return L * (products + attention + rest) + head


def between(x: int | float, points: "tuple[tuple[int, float], ...]") -> float:
    """The value at x, on straight lines over the logarithm of x; beyond the points as at the last."""
    if not points:
        return 0.0
    if x <= points[0][0]:
        return points[0][1]
    for (low, first), (high, second) in itertools.pairwise(points):
        if x <= high:
            return first + (second - first) * math.log(x / low) / math.log(high / low)
    return points[-1][1]


def steps(machine: Machine, model: ModelConfig, options: EngineConfig) -> Seconds:
    """The engine's steps on this machine."""
    how = {"max_rows": options.max_rows, "tile_counts": tile_counts(options.chunk)}
    return lambda step: serve_seconds(machine, model, shape_of(step, **how))


def padded(keys: int | float) -> int:
    """Keys that are looked at together."""
    return -(-int(keys) // SLOTS) * SLOTS


def shape_of(step: Step, *, max_rows: int, tile_counts: tuple[int, ...]) -> Shape:
    """A step as the engine compiles it."""
    contexts = sorted(step.contexts)
    tiles = [
        start + min(TILE, part.start + part.tokens - start)
        for part in step.parts
        for start in range(part.start, part.start + part.tokens, TILE)
    ]
    power = 1 << max(max_rows - 1, 0).bit_length()
    rows = 1 << max(len(contexts) - 1, 0).bit_length() if contexts else 0
    if tiles:
        rows = power if contexts else 0
    count = next(count for count in tile_counts if count >= len(tiles)) if tiles else 0
    contexts = contexts + [1] * (rows - len(contexts))
    return Shape(rows, count, eights(contexts), eights(tiles + [1] * (count - len(tiles))))


def eights(keys: list[int]) -> tuple[int, ...]:
    """Of each eight, as many as the longest looks at."""
    return tuple(padded(max(keys[start : start + 8])) for start in range(0, len(keys), 8))


def decode_seconds(machine: Machine, model: ModelConfig, batch: int, length: int) -> float:
    """A token of each of a batch of answers, `length` keys each."""
    rows = 1 << max(batch - 1, 0).bit_length()
    return serve_seconds(machine, model, Shape(rows, 0, eights([length + 1] * rows), ()))


def prefill_seconds(machine: Machine, model: ModelConfig, batch: int, length: int, *, chunk: int = 256) -> float:
    """Reading prompts, as many tokens a step as the engine takes."""
    counts = tile_counts(chunk)
    tiles = [min(start + TILE, length) for _ in range(batch) for start in range(0, length, TILE)]
    total = 0.0
    for first in range(0, len(tiles), counts[-1]):
        here = tiles[first : first + counts[-1]]
        count = next(count for count in counts if count >= len(here))
        total += serve_seconds(machine, model, Shape(0, count, (), eights(here + [1] * (count - len(here)))))
    return total


def tile_counts(chunk: int) -> tuple[int, ...]:
    """As Engine._tile_counts."""
    most = 1 << max(max(1, chunk // TILE) - 1, 0).bit_length()
    return tuple([1 << i for i in range(most.bit_length())][::-2][::-1])


# Kept ----------------------------------------------------------------------------------------------------------------


def usual_path() -> pathlib.Path:
    """Where the constants are kept, unless something else is said."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "meshlight" / "this_machine.json"


def save(machine: Machine, path: pathlib.Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(machine), indent=1) + "\n", encoding="utf-8")


def load(path: pathlib.Path | None = None) -> Machine:
    """The constants of a file; ValueError where there is none, or it is no such file."""
    path = path or usual_path()
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tables = {name: table_of(fields[name]) for name in ("served", "trained")}
        rest = tuple((int(tokens), float(seconds)) for tokens, seconds in fields["served_rest"])
        trained = tuple((int(tokens), float(seconds)) for tokens, seconds in fields["trained_rest"])
        return Machine(**{**fields, **tables, "served_rest": rest, "trained_rest": trained})
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: this machine is not measured; run python -m perf calibrate") from None
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no constants of a machine ({error}); run python -m perf calibrate") from None


def table_of(fields: Any) -> Table:
    """From JSON."""
    rows, sizes, seconds = fields
    return Table(tuple(rows), tuple(sizes), tuple(tuple(row) for row in seconds))
