"""Published measurements as jobs: what was run, on what, and how long it took. Knows no prediction.

A row that cannot be a job says why, with its number. Columns are those of measurements.csv; a row's metric is turned
into seconds of the job by the FLOPs its source counts.
"""

import csv
import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from model import cost
from model.config import ModelConfig
from parallel import chips
from perf.work import BYTES, Job, Layout

COLUMNS = (
    "id", "kind", "source", "chip", "num_chips", "model", "params_B", "layers", "d_model", "n_heads", "n_kv_heads",
    "d_ff", "vocab", "seq_len", "output_len", "global_batch", "microbatch", "dtype_weights", "dtype_act",
    "parallelism", "remat", "metric", "value", "also_reported", "arch", "notes",
)  # fmt: skip
NEEDED = ("kind", "source", "chip", "metric", "value")

NUMBERS = {
    "fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "int8": "int8", "fp8": "fp8", "fp8-cs": "fp8", "fp8-mx": "fp8",
    "mxfp8": "fp8", "nvfp4": "fp4", "fp4": "fp4",
}  # fmt: skip

# What a source's name says of its software; the first that is found counts.
SOURCES = (
    ("llm-foundry", "fsdp"),
    ("TinyLlama", "fsdp"),
    ("NeuSight", "eager"),
    ("FasterTransformer:docs/gpt_guide.md (Megatron)", "megatron-inference"),
    ("FasterTransformer", "fastertransformer"),
    ("fastertransformer", "fastertransformer"),
    ("TensorRT-LLM", "tensorrt"),
    ("vLLM", "vllm"),
    ("jax-llm-examples", "jax-llm"),
    ("2104.04473", "megatron-2021"),
    ("2201.11990", "megatron-2021"),
    ("Megatron", "megatron"),
    ("NeMo", "megatron"),
    ("maxtext", "maxtext"),
    ("tpu-recipes", "maxtext"),
    ("jax-ml", "maxtext"),
)
REMAT = {"full": "full", "none": "none", "": "none", "minimal": "minimal", "minimal_with_context": "minimal"}
REMAT |= {"custom": "attention", "partial": "attention", "qkv_proj_offloaded": "attention"}


# jax-llm-examples prints a prefill time that does not change with the context beside it, and does not say of how many
# tokens it is: of 1,024 the quickest rows would be past the chips' peak.
PROMPT = 512

USABLE, CACHE_SHARE, MOST_ROWS = 0.95, 0.9, 2048  # of memory; of what weights leave; sequences at once (TensorRT-LLM)


class Measurement(NamedTuple):
    """One row: a job on a chip, and what was measured."""

    row: dict[str, str]
    number: int  # of the line in its file
    chip: str
    num_chips: int
    metric: str
    value: float
    job: Job | None
    reason: str  # why there is no job

    @property
    def source(self) -> str:
        """Where it was published."""
        return self.row["source"]

    def seconds(self, value: float) -> float:
        """Of the job, where the metric has that value."""
        assert self.job is not None
        return _seconds(self, self.job, value)


class UnmodelledError(Exception):
    """A row that cannot be a job; says why."""


def read(path: pathlib.Path) -> list[Measurement]:
    """All rows of a file; ValueError for a missing column, or a number that is none, with the line and the column."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]}; the columns are {', '.join(COLUMNS)}")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path} has no rows; give a file of measurements, a line each")
    return [_measurement(path, number, row) for number, row in enumerate(rows, start=2)]


def _measurement(path: pathlib.Path, number: int, row: dict[str, Any]) -> Measurement:
    row = {name: (row.get(name) or "").strip() for name in COLUMNS}
    for name in NEEDED:
        if not row[name]:
            raise ValueError(f"{path}, line {number}: column {name} is empty; every row needs {', '.join(NEEDED)}")
    where = f"{path}, line {number}"
    value = _number(where, row, "value")
    num_chips = int(_number(where, row, "num_chips") or 0)
    try:
        job, reason = _job(where, row, num_chips), ""
    except UnmodelledError as why:
        job, reason = None, str(why)
    found = Measurement(row, number, row["chip"], num_chips, row["metric"], value, job, reason)
    if job is not None and row["metric"] not in METRICS:
        found = found._replace(job=None, reason=f"the metric {row['metric']} says no time of a step")
    return found


def _number(where: str, row: dict[str, str], name: str) -> float:
    text = row[name]
    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}: column {name} is {text!r}, which is no number") from None
    if not value >= 0 or value == float("inf"):
        raise ValueError(f"{where}: column {name} is {text}, which must be a finite number of at least 0")
    return value


# Jobs ----------------------------------------------------------------------------------------------------------------


def _job(where: str, row: dict[str, str], num_chips: int) -> Job:
    for name in ("layers", "d_model", "seq_len"):
        if not row[name]:
            known = KNOWN.get(row["model"])
            if known is None or name == "seq_len":
                raise UnmodelledError(f"{name} is not given")
    kind = row["kind"]
    if kind not in ("train", "prefill", "decode", "generate"):
        raise UnmodelledError(f"kind {kind} is none of train, prefill, decode, generate")
    if not num_chips:
        raise UnmodelledError("num_chips is not given")
    chip = _meant(chips.find, row["chip"])
    stack = _stack(row)
    layout = _layout(row, num_chips)
    weights, compute = _formats(row)
    if row["remat"] not in REMAT:
        raise UnmodelledError(f"remat {row['remat']} is not known")
    length, output = (int(_number(where, row, name)) for name in ("seq_len", "output_len"))
    if length < 1 or (kind == "generate" and output < 1):
        raise UnmodelledError(f"seq_len={length} and output_len={output} must be at least 1")
    if not _number(where, row, "value"):
        raise UnmodelledError("value=0 is no measurement")
    job = Job(
        kind=kind,  # type: ignore[arg-type]
        model=_model(where, row),
        layout=layout,
        batch=int(_number(where, row, "global_batch")) or 1,
        length=min(length, PROMPT) if stack == "jax-llm" and kind == "prefill" else length,
        output=output if kind == "generate" else 0,
        microbatch=int(_number(where, row, "microbatch")),
        weights=weights,
        compute=compute,
        cache="fp8" if compute in ("fp8", "fp4") and kind != "train" else "fp32" if compute == "fp32" else "bf16",
        remat=REMAT[row["remat"]],  # type: ignore[arg-type]
        is_causal=not re.search("encoder|t5", row["arch"]),
        trains_all="LoRA" not in row["notes"],
        stack=stack,
    )
    if row["global_batch"]:
        return job
    if kind != "generate":
        raise UnmodelledError("global_batch is not given")
    return dataclasses.replace(job, batch=saturating(job, chip))


def _meant(make: Callable[..., Any], *words: Any, **more: Any) -> Any:
    """What words make; where that is nothing, it is why the row is no job, and no error of the file."""
    try:
        return make(*words, **more)
    except ValueError as error:
        raise UnmodelledError(str(error)) from None


def saturating(job: Job, chip: chips.Chip) -> int:
    """Sequences that the memory has room for at once, half through their answers, where more wait than fit."""
    devices = job.layout.num_devices / chip.devices_per_chip
    weights = cost.num_parameters(job.model) * BYTES[job.weights]
    token = cost.cache_bytes_per_token(job.model, cache_bytes=1) * BYTES[job.cache]
    room = CACHE_SHARE * (devices * chip.hbm_bytes * USABLE - weights)
    return max(1, min(MOST_ROWS * job.layout.replicas, int(room / (token * (job.length + job.output / 2)))))


def _stack(row: dict[str, str]) -> str:
    source = row["source"]
    for part, stack in SOURCES:
        if part in source:
            if stack == "eager" and "fusion" in source:
                return "compiled"
            if stack == "megatron-2021" and "ZeRO-3" in row["notes"]:
                return "zero3"
            return stack
    is_tpu = row["chip"].startswith("TPU")
    if row["kind"] == "train":
        return "maxtext" if is_tpu else "megatron"
    return "vllm" if is_tpu else "tensorrt"


def _formats(row: dict[str, str]) -> tuple[str, str]:
    weights, compute = row["dtype_weights"] or "bf16", row["dtype_act"] or "bf16"
    for text in (weights, compute):
        if text not in NUMBERS:
            raise UnmodelledError(f"the number format {text} is not known")
    return NUMBERS[weights], NUMBERS[compute]


def _layout(row: dict[str, str], chips: int) -> Layout:
    """Degrees as printed; what they leave open is taken as data, or as fsdp where that is how the source splits."""
    text = row["parallelism"]
    devices = chips * 2 if "devices" in text else chips
    degrees = {name: int(size) for name, size in re.findall(r"(\w+)\s*=\s*(\d+)", text)}
    fsdp = degrees.get("fsdp", 1) * degrees.get("fsdp_transpose", 1)
    sizes = {
        "tensor": degrees.get("tp", 1), "pipe": degrees.get("pp", 1), "context": degrees.get("cp", 1), "fsdp": fsdp,
    }  # fmt: skip
    if 0 in degrees.values():
        raise UnmodelledError(f"parallelism {text} has a degree of 0; degrees are at least 1")
    used = sizes["tensor"] * sizes["pipe"] * sizes["context"] * fsdp
    data = degrees.get("dp", 0)
    if not data or data * used != devices:
        if devices % used:
            raise UnmodelledError(f"parallelism {text} makes groups of {used}, which do not divide {devices} devices")
        data = devices // used
    slices = re.match(r"(\d+)x v\w+-\d+ slices", row["notes"])
    expert = degrees.get("ep", 1)
    if not degrees and row["kind"] == "train" and data > 1:
        data, sizes["fsdp"] = 1, data
    return Layout(
        data=data, expert=expert, virtual=degrees.get("vpp", 1), slices=int(slices[1]) if slices else 1,
        shards_gradients_only="SHARD_GRAD_OP" in row["notes"], **sizes,
    )  # fmt: skip


def _model(where: str, row: dict[str, str]) -> ModelConfig:
    """The decoder that the row describes; what it leaves out is as the field has it."""
    if not row["layers"] or not row["d_model"]:
        return KNOWN[row["model"]]
    arch = row["arch"]
    get = lambda name: int(_number(where, row, name))  # noqa: E731
    D, N = get("d_model"), get("n_heads")
    if not N:
        raise UnmodelledError("n_heads is not given")
    width = re.search(r"hd(\d+)", arch)
    H = int(width[1]) if width else 64 if arch.startswith("t5") else D // N
    vocab = get("vocab")
    if not vocab:
        raise UnmodelledError("vocab is not given")
    gated = bool(re.search("swiglu|geglu|moe|mla", arch)) and not arch.startswith("t5")
    sizes: dict[str, Any] = {}
    experts = re.search(r"moe(\d+)(?:top(\d+))?", arch)
    if experts:
        wide = re.search(r"moe_ff(\d+)", arch)
        shared, dense = re.search(r"shared(\d+)", arch), re.search(r"dense(\d+)", arch)
        F = int(wide[1]) if wide else get("d_ff")
        sizes = {
            "num_experts": int(experts[1]), "experts_per_token": int(experts[2] or 1), "expert_ffn_dim": F,
            "shared_ffn_dim": F * int(shared[1]) if shared else 0, "num_dense_layers": int(dense[1]) if dense else 0,
        }  # fmt: skip
    if "mla" in arch:
        latent = {"kv_rank": 512, "q_rank": 1536 if D >= 5120 else 0, "rope_dim": 64, "value_dim": 128}
        sizes |= {**latent, "head_dim": 192}
    window = {"window": 1024, "layers": ("window",) * 5 + ("global",)} if "local/global" in arch else {}
    layers = get("layers") * (2 if arch.startswith("t5") else 1)  # as many in the encoder as in the decoder
    return _meant(
        ModelConfig, vocab_size=vocab, embed_dim=D, num_layers=layers, num_heads=N, num_kv_heads=get("n_kv_heads") or N,
        ffn_dim=get("d_ff") or 4 * D, max_length=get("seq_len"), rope_theta=1e4, norm_eps=1e-5,
        gated=gated or bool(experts), positions="rope" if gated else "learned", norm="rms" if gated else "layer",
        tied=not gated, **{"head_dim": H, **window, **sizes},
    )  # fmt: skip


def _llama(layers: int, embed: int, heads: int, kv_heads: int, ffn: int, vocab: int, **more: Any) -> ModelConfig:
    sizes = {"head_dim": embed // heads, "max_length": 8192, "rope_theta": 1e4, "norm_eps": 1e-5, "tied": False, **more}
    return ModelConfig(
        vocab_size=vocab, embed_dim=embed, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, ffn_dim=ffn,
        **sizes,
    )  # fmt: skip


# Shapes that rows leave out, from the models' own config.json: huggingface.co/tiiuae/falcon-180B,
# huggingface.co/moonshotai/Kimi-K2-Base.
KNOWN = {
    "Falcon 180B": _llama(80, 14848, 232, 8, 59392, 65024, gated=False, norm="layer"),
    "Kimi_K2": _llama(
        61, 7168, 64, 64, 18432, 163840, head_dim=192, kv_rank=512, q_rank=1536, rope_dim=64, value_dim=128,
        num_experts=384, experts_per_token=8, expert_ffn_dim=2048, shared_ffn_dim=2048, num_dense_layers=1,
    ),
}  # fmt: skip


# Metrics -------------------------------------------------------------------------------------------------------------


def _seconds(found: Measurement, job: Job, value: float) -> float:
    return METRICS[found.metric](found, job, value)


def _by_tokens(found: Measurement, job: Job, value: float) -> float:
    return job.tokens / (value * found.num_chips)


def _by_flops(found: Measurement, job: Job, value: float) -> float:
    return counted_flops(found.row, job) / (value * 1e12 * found.num_chips)


def counted_flops(row: dict[str, str], job: Job) -> float:
    """FLOPs of a training step as the row's source counts them."""
    model, tokens = job.model, job.tokens
    D, L, T, V = model.embed_dim, model.num_layers, job.length, model.vocab_size
    if "2104.04473" in row["source"]:  # equation 3 there, recomputation included
        return 96.0 * tokens * L * D**2 * (1 + T / (6 * D) + V / (16 * L * D))
    causal = cost.train_flops(model, T) * tokens
    if "maxtext" in row["source"] or "NeMo" in row["source"]:  # a full square of attention
        pairs = cost.visible_keys(model, T) / T
        square = L * T
        return causal + 3 * 2 * 2 * model.num_heads * model.head_dim * (square - pairs) * tokens
    return causal


METRICS = {
    "tokens_per_s_per_chip": _by_tokens,
    "output_tokens_per_s_per_chip": _by_tokens,
    "step_time_s": lambda found, job, value: value,
    "latency_ms_total": lambda found, job, value: value / 1e3,
    "latency_ms_per_token": lambda found, job, value: value / 1e3,
    "tflops_per_chip": _by_flops,
}


def reported(found: Measurement, seconds: float) -> float:
    """The metric's value where the job takes that long: `seconds` is its own inverse for rates."""
    assert found.job is not None
    if found.metric.startswith(("step_time", "latency")):
        return seconds / found.seconds(1.0)
    return found.seconds(1.0) / seconds
