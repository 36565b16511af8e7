"""What some chips would serve of a model: from the words of `python -m perf simulate` to its figures."""

import dataclasses
import inspect
import math
from typing import Any

from inference.config import EngineConfig
from inference.room import kinds_of, limits_of
from model import families
from model.config import ModelConfig
from parallel.chips import Chip, find
from parallel.records import nearest, require
from perf import saturation, this_machine, workload
from perf.saturation import Policy
from perf.simulate import Deployment, Handover, Simulated, simulate
from perf.step_time import by_prediction
from perf.work import Job, Layout
from perf.workload import Trace, Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """Servers, and what they are asked."""

    chip: str  # name, as parallel/chips.py has it
    chips: int = 1  # of all servers together
    replicas: int = 1  # servers that answer, of equal size
    prefill: int = 0  # servers of that size that compute prompts for them; 0: each computes its own
    work: Workload = Workload(requests=1000, scale=1.0)
    rows: int = 256  # answers that a server goes on with at once
    chunk: int = 2048  # prompt tokens that a step reads at most
    block_size: int = 32  # tokens of a KV block
    memory: float = 0.9  # share of what parameters leave free that the KV cache takes
    weights: str = "bf16"  # numbers that parameters are kept in
    compute: str = "bf16"  # numbers that products take
    cache: str = "bf16"  # numbers of keys and values

    def __post_init__(self):
        for name in ("chips", "replicas", "rows", "chunk", "block_size"):
            require(self, "simulate", name, low=1)
        require(self, "simulate", "prefill", low=0)
        require(self, "simulate", "memory", low=0.01, high=1)
        if self.chips % self.servers:
            raise ValueError(
                f"chips={self.chips} make no {self.servers} servers of equal size; give a multiple of {self.servers}"
            )

    @property
    def servers(self) -> int:
        """Of both kinds."""
        return self.replicas + self.prefill


def shape_of(word: str) -> ModelConfig:
    """The model that a word means: a family, or what infer.py takes."""
    known = [name for name, made in vars(families).items() if inspect.isfunction(made) and not name.startswith("_")]
    if word in known:
        return getattr(families, word)()
    try:
        from inference import location, weights

        return weights.open_model(location.locate(word)).config
    except ValueError as error:
        raise ValueError(f"{error}; or a family of models{nearest(word, known)}") from None


def layout_of(model: ModelConfig, devices: int) -> Layout:
    """A server's devices, that split every layer between them."""
    if model.num_heads % devices:
        raise ValueError(
            f"num_heads={model.num_heads} is not a multiple of the {devices} devices of a server, which share each "
            "layer; give more replicas, or other chips"
        )
    return Layout(tensor=devices)


def run(model: ModelConfig, config: ForecastConfig) -> tuple[dict[str, Any], Simulated]:
    """Simulate; -> figures, and how it went."""
    machine = this_machine.load() if config.chip == "this" else None
    chip = this_machine.chip(machine) if machine else find(config.chip)
    layout = layout_of(model, config.chips // config.servers * chip.devices_per_chip)
    if machine:  # whose engine computes in float32
        config = dataclasses.replace(config, weights="fp32", compute="fp32", cache="fp32")
    job = Job(
        kind="decode",
        model=model,
        layout=layout,
        batch=1,
        length=1,
        weights=config.weights,
        compute=config.compute,
        cache=config.cache,
    )
    trace = workload.trace(dataclasses.replace(config.work, vocab=model.vocab_size))
    options = options_of(model, config, job, chip, trace)
    steps = this_machine.steps(machine, model, options) if machine else by_prediction(job, chip)
    deployment = deployed(model, config, job, chip, options)
    found = simulate(trace, deployment, steps)
    return {**described(config, chip, trace, deployment), **found.figures(), **costs(found, config, chip)}, found


def options_of(model: ModelConfig, config: ForecastConfig, job: Job, chip: Chip, trace: Trace) -> EngineConfig:
    """A server's, with as large a cache as its memory allows."""
    tokens = saturation.cache_tokens(job, chip, Policy(config.memory, config.rows, config.chunk, False))
    size, longest = config.block_size, workload.longest(trace)
    if tokens < longest + size:
        raise ValueError(
            f"the longest request has {longest} tokens but beside the parameters {job.layout.num_devices} devices of "
            f"{chip.name} have room for {max(tokens, 0):.0f}; give a server more chips, or fewer bits"
        )
    if longest > model.max_length:
        raise ValueError(
            f"the longest request has {longest} tokens but the model's context is {model.max_length}; "
            "give a smaller --scale"
        )
    return EngineConfig(
        max_rows=config.rows, cache_tokens=int(tokens), block_size=size, chunk=config.chunk, max_length=longest
    )


def deployed(model: ModelConfig, config: ForecastConfig, job: Job, chip: Chip, options: EngineConfig) -> Deployment:
    """The servers."""
    handover = None
    if config.prefill:
        wire = (chip.network_bandwidth or chip.link_bandwidth) * config.chips // config.servers
        per_token = saturation.token_bytes(job) * job.layout.num_devices
        handover = Handover(replicas=config.prefill, bytes_per_token=per_token, link=wire)
    return Deployment(
        kinds=tuple(kinds_of(model, options)),
        limits=limits_of(model, options),
        replicas=config.replicas,
        handover=handover,
    )


def described(config: ForecastConfig, chip: Chip, trace: Trace, deployment: Deployment) -> dict[str, Any]:
    """What was simulated."""
    return {
        "chip": chip.name,
        "chips": config.chips,
        "replicas": config.replicas,
        **({"prefill_servers": config.prefill} if config.prefill else {}),
        "mix": config.work.mix,
        "requests": len(trace),
        "rate": "all at once" if math.isinf(config.work.rate) else config.work.rate,
        "kv_cache_tokens": (deployment.kinds[0].num_blocks - 1) * config.block_size,
    }


def costs(found: Simulated, config: ForecastConfig, chip: Chip) -> dict[str, float]:
    """By chip and by dollar."""
    speed = found.played.throughput
    price = {"dollars_per_million_tokens": chip.price * config.chips / 3600 / speed * 1e6} if chip.price else {}
    return {"output_tokens_per_second_per_chip": speed / config.chips, **price}
