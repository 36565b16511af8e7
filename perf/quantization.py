"""What quantized weights cost and save on this machine: bytes, perplexity, decoding speed. Knows no file format.

Each scheme is loaded as infer.py loads it. Perplexities are of the same tokens; decoding takes turns, so ratios are of
rounds. A model whose file is quantized already lies on a grid that a scheme may meet exactly: `is_rescaled` measures
its twin, the same function with weights on no grid.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from inference.config import EngineConfig, SamplingConfig
from inference.engine import Engine
from inference.generate import cache_for
from inference.location import locate
from inference.request import Request
from inference.score import Score, score
from inference.weights import Model, open_model, quantized_on_load, serving_parameters
from model.config import ModelConfig
from model.parameters import Parameters
from ops.quantize import SCHEMES, Quantized, Scheme
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from perf import roofline

RULES = AxisRules()
FLOAT = "float32"
PROMPT = 32  # tokens before those that are decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """One comparison."""

    model: str
    file: pathlib.Path  # the text that is measured on
    schemes: tuple[str, ...] = SCHEMES  # as asked for: `run` refuses those it does not know
    tokens: int = 16384  # of the text, from its beginning; 0 leaves perplexity out
    window: int = 1024  # tokens read at once
    decoded: int = 48  # tokens a round; 0 leaves speed out
    rounds: int = 5
    is_rescaled: bool = False


class Side(NamedTuple):
    """A model in one scheme, ready to run."""

    engine: Engine
    bytes: int


def run(config: QuantizationConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; -> for each scheme, float32 first: bytes, perplexity, its increase, tokens a second, their ratio."""
    unknown = [scheme for scheme in config.schemes if scheme not in SCHEMES]
    if unknown:
        raise ValueError(f"--schemes {unknown[0]} is unknown; {', '.join(SCHEMES)} are known")
    model = open_model(locate(config.model))
    if model.scheme is not None:
        raise ValueError(f"{model.name} has {model.scheme} weights already; give the model that it was made from")
    if config.is_rescaled:
        model = rescaled_on_load(model)
    content = config.file.read_bytes()
    tokens = tuple(model.tokenizer.encode(content.decode()))[: config.tokens]
    sides, rows = {}, {}
    for scheme in (None, *cast(tuple[Scheme, ...], config.schemes)):
        name, room = scheme or FLOAT, cache_for([PROMPT + config.decoded + 1])
        sides[name] = side(model if scheme is None else quantized_on_load(model, scheme), room)
        rows[name] = {"bytes": sides[name].bytes, "bytes_ratio": sides[FLOAT].bytes / sides[name].bytes}
        if config.tokens:
            found = scored(sides[name].engine, tokens, config.window)
            base = rows[FLOAT].get("perplexity", found.perplexity)
            rows[name] |= {"perplexity": found.perplexity, "increase": found.perplexity / base - 1}
        say(f"{name}  " + "  ".join(f"{key} {value:.6g}" for key, value in rows[name].items()))
    if config.decoded:
        speeds(config, {name: side.engine for name, side in sides.items()}, tokens or (0,), rows, say)
    plain = {**dataclasses.asdict(config), "file": str(config.file), "tokens": len(tokens)}
    return {**plain, "results": rows}


def side(model: Model, cache_tokens: int) -> Side:
    """Load a model on one device and start its engine."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    parameters = model.load(mesh, RULES)
    size = num_bytes(parameters)
    config, parameters = serving_parameters(model.config, parameters, mesh)
    options = EngineConfig(max_rows=1, cache_tokens=cache_tokens, prefix_cache=False)
    engine = Engine(config, parameters, mesh, RULES, num_tokens=model.tokenizer.vocab_size, options=options)
    return Side(engine, size)


def num_bytes(parameters: Parameters) -> int:
    """Of all parameters, as they are stored."""
    held = jax.tree.leaves(parameters, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return sum(leaf.num_bytes if isinstance(leaf, Quantized) else leaf.nbytes for leaf in held)


def scored(engine: Engine, tokens: tuple[int, ...], window: int) -> Score:
    """How well the engine predicts the tokens; bits per byte are not asked for."""
    window = min(window, engine.program.config.max_length)
    return score(engine, tokens, num_bytes=1, window=window, stride=max(1, window // 2))


def speeds(config: QuantizationConfig, engines: dict[str, Engine], tokens, rows: dict[str, dict], say) -> None:
    """Decode in turns; medians over the rounds go into `rows`."""
    prompt, found = tokens[:PROMPT], {name: [] for name in engines}
    for number in range(config.rounds + 1):  # the first compiles
        for name, engine in engines.items():
            found[name].append(seconds(engine, prompt, config.decoded))
        if number:
            say(
                f"round {number}/{config.rounds}  "
                + "  ".join(f"{k} {config.decoded / v[-1]:.4g}" for k, v in found.items())
            )
    for name, times in found.items():
        ratios = [float_ / mine for float_, mine in zip(found[FLOAT][1:], times[1:], strict=True)]
        rows[name] |= {
            "tokens_per_second": config.decoded / roofline.median(times[1:]),
            "speedup": roofline.median(ratios),
        }


def seconds(engine: Engine, prompt: tuple[int, ...], count: int) -> float:
    """Of `count` greedy tokens of one sequence after the first."""
    request = Request(prompt=prompt, sampling=SamplingConfig(temperature=0.0), max_tokens=count + 1)
    start, counted = 0.0, 0
    for outputs in engine.run([request]):
        new = sum(len(output.tokens) for output in outputs)
        counted += new if start else 0
        start = start or (time.perf_counter() if new else 0.0)
    return (time.perf_counter() - start) / counted * count


# The twin


def rescaled_on_load(model: Model) -> Model:
    """The same function with other weights: channels scaled by random factors, which what follows makes up for."""
    config = model.config
    if config.norm != "rms" or not config.gated or config.kv_rank or config.num_experts:
        raise ValueError(f"{model.name}: --rescaled is written for dense gated decoders with RMSNorm, such as smollm2")
    return model._replace(load=lambda mesh, rules: rescaled(config, model.load(mesh, rules)))


def rescaled(config: ModelConfig, parameters: Parameters) -> Parameters:
    """Channels between norms and matrices, v and o, up and down are scaled against each other, by 0.9 to 1.1."""
    random, offset = np.random.default_rng(0), float(config.norm_zero_centered)

    def factors(*shape: int):
        return jnp.asarray(random.uniform(0.9, 1.1, shape), jnp.float32)

    layers = {}
    for l, layer in parameters["layers"].items():
        attention, ffn = dict(layer["attention"]), dict(layer["ffn"])
        before, middle = factors(config.embed_dim), factors(config.embed_dim)
        heads, channels = factors(config.num_kv_heads, config.head_dim), factors(config.ffn_dim)
        for name in "qkv":
            attention[name] = attention[name] * before[:, None, None]
        attention["v"] = attention["v"] * heads[None]
        each = jnp.repeat(heads, config.num_heads // config.num_kv_heads, axis=0)
        attention["o"] = attention["o"] / each[..., None]
        ffn["gate"], ffn["up"] = ffn["gate"] * middle[:, None], ffn["up"] * middle[:, None] * channels[None]
        ffn["down"] = ffn["down"] / channels[:, None]
        norms = {
            name: {"scale": (layer[name]["scale"] + offset) / by - offset}
            for name, by in {"attention_norm": before, "ffn_norm": middle}.items()
        }
        layers[l] = {**layer, "attention": attention, "ffn": ffn, **norms}
    return {**parameters, "layers": layers}
