"""Output tokens a second of a server that never lacks requests, in closed form: what perf/simulate.py finds slowly.

All prompts are of one length and all answers of another. Requests are let in as soon as the cache has room, so answers
end as evenly as prompts are read, and every step is alike: `rows` answers go on while as many prompt tokens are read as
those that end make room for. Knows no scheduler.
"""

import math
from typing import NamedTuple

from model import cost
from model.config import ModelConfig
from parallel.chips import Chip
from perf.operations import cached_numbers
from perf.step_time import StepTime, by_prediction
from perf.work import BYTES, Job


class Policy(NamedTuple):
    """How a server lets requests in."""

    memory: float  # share of what parameters leave free that the cache takes
    most_rows: int  # answers at once
    most_tokens: int  # of a step, answers and prompts together
    reserves: bool  # a request is let in only where there is room for all of its answer


# TensorRT-LLM: docs/source/performance/perf-overview.md (0.95), tensorrt_llm/bench/build/tuning.py (4,096 answers,
# 32,768 tokens), performance-tuning-guide/useful-runtime-flags.md (GUARANTEED_NO_EVICT is the default).
# vLLM: docs.vllm.ai, engine arguments (gpu_memory_utilization 0.9, 256 sequences, 8,192 tokens).
POLICIES = {
    "tensorrt": Policy(0.95, 4096, 32768, True),
    "vllm": Policy(0.9, 256, 8192, False),
}
USUAL = Policy(0.9, 256, 8192, False)

# Requests that TensorRT-LLM's tables asked for, by tokens of prompt and answer: perf-overview.md, "Preparing a Dataset"
REQUESTS = {
    (128, 128): 30000, (128, 2048): 3000, (128, 4096): 1500, (500, 2000): 3000, (1000, 1000): 3000, (1000, 2000): 1500,
    (2048, 128): 3000, (2048, 2048): 1500, (5000, 500): 1500, (20000, 2000): 1000,
}  # fmt: skip


class Saturated(NamedTuple):
    """What a server does when it never lacks requests."""

    tokens_per_second: float  # of answers
    rows: int | float  # answers at once
    prompt_tokens: int | float  # read in a step, on average
    step_seconds: float
    limit: str  # of the answers at once: "cache", "rows", "tokens of a step", "requests"


def published(job: Job, chip: Chip) -> Saturated:
    """A published measurement of a server that never lacks requests: of as many as its source says, if it does."""
    requests = REQUESTS.get((job.length, job.output), math.inf) if job.stack == "tensorrt" else math.inf
    return saturated(job, chip, by_prediction(job, chip), requests=requests)


def saturated(job: Job, chip: Chip, steps: StepTime, *, requests: int | float = math.inf) -> Saturated:
    """Serving requests of job.length and job.output tokens, on the job's layout; its batch does not matter.

    Of a finite number of requests, the last wave finds fewer rows than there could be.
    """
    policy = POLICIES.get(job.stack, USUAL)
    prompt, answer = job.length, max(job.output, 1)
    rows, limit = most_rows(job, chip, policy)
    if rows < 1:
        raise ValueError(
            f"a request of {prompt} + {answer} tokens needs more than the {cache_tokens(job, chip, policy):,.0f} that "
            f"{job.layout.num_devices} × {chip.name} have room for beside the parameters; take more chips"
        )
    if requests < rows:
        rows, limit = requests, "requests"
    ratio = prompt / answer  # prompt tokens that a step reads for each answer it goes on with
    if rows * (1 + ratio) > policy.most_tokens:
        rows, limit = policy.most_tokens / (1 + ratio), "tokens of a step"
    context = prompt + answer / 2
    attention = rows / answer * steps.prompt_attention(0, prompt)
    seconds = steps.seconds(rows, context, rows * ratio) + attention
    waves = requests / rows
    if waves == math.inf:
        return Saturated(rows / seconds, rows, rows * ratio, seconds, limit)
    last = (waves % 1.0) * rows
    idle = steps.seconds(last, context) - last / rows * steps.seconds(rows, context) if last else 0.0
    total = answer * (waves * seconds + idle)
    return Saturated(requests * answer / total, rows, rows * ratio, seconds, limit)


def most_rows(job: Job, chip: Chip, policy: Policy) -> tuple[int | float, str]:
    """Answers at once that there is room for, and what limits them."""
    held = job.length + (job.output if policy.reserves else job.output / 2)
    rows = cache_tokens(job, chip, policy) / held
    return (rows, "cache") if rows < policy.most_rows else (policy.most_rows, "rows")


def cache_tokens(job: Job, chip: Chip, policy: Policy) -> float:
    """Tokens whose keys and values all devices of a server hold beside its parameters."""
    free = memory_of(chip) - parameter_bytes(job)
    return max(free, 0.0) * policy.memory / token_bytes(job)


def memory_of(chip: Chip) -> float:
    """Bytes of one device."""
    return chip.hbm_bytes / chip.devices_per_chip


def parameter_bytes(job: Job) -> float:
    """Of one device: layers as the job keeps them, embeddings in at least 16 bits."""
    model, layout = job.model, job.layout
    tables = (1 if model.tied else 2) * model.vocab_size * model.embed_dim
    layers = cost.num_parameters(model) - tables
    width = max(BYTES[job.weights], 2.0)
    return (layers * BYTES[job.weights] / layout.pipe + tables * width) / layout.tensor


def token_bytes(job: Job) -> float:
    """Of one device: keys and values of one token, in all its layers. A head is not split."""
    model, layout = job.model, job.layout
    return numbers_of_token(model, layout.tensor) * BYTES[job.cache] / layout.pipe


def numbers_of_token(model: ModelConfig, tensor: int) -> float:
    """Of one token over all layers, on one of `tensor` devices."""
    return float(model.num_layers * cached_numbers(model, max(model.num_kv_heads / tensor, 1)))
