"""What a device holds at the peak of a step, by kind: arithmetic, generous where it guesses. Compiles nothing.

Weights, moments and caches are counted; what a layer holds while it is computed, gathered weights and copies are not
known before a compiler has placed them, and are taken as if none of it shared room.
"""

from model import cost
from model.config import KEPT, ModelConfig
from perf.candidates import Candidate
from perf.work import BYTES
from training.config import OptimConfig, TrainConfig

MOMENTS = {"adamw": 2.0, "lion": 1.0, "muon": 1.0, "adafactor": 0.1}  # numbers a parameter


def train(
    model: ModelConfig, candidate: Candidate, *, length: int, optim: OptimConfig, loss: TrainConfig
) -> dict[str, int]:
    """Of a train step."""
    mesh, compute = candidate.mesh, 4 if candidate.precision.compute == "fp32" else 2
    dense, experts = _parameters(model)
    numbers = dense / (mesh.fsdp * mesh.expert * mesh.context * mesh.tensor * mesh.pipe)
    numbers += experts / (mesh.fsdp * mesh.expert * mesh.context * mesh.tensor * mesh.pipe)
    tokens = candidate.microbatch * length / mesh.context  # computed at once
    inside = _inside(model)
    layer = (dense + experts / mesh.expert) / model.num_layers / mesh.tensor
    in_flight = max(candidate.microbatches, 1) * candidate.repeats if mesh.pipe > 1 else 1
    kept = tokens * _kept(model, candidate.remat) * compute / mesh.tensor * model.num_layers / mesh.pipe * in_flight
    chunk = min(loss.loss_chunk, length) * candidate.microbatch if loss.loss == "tokens" else tokens
    entries = model.vocab_size / mesh.tensor if loss.loss == "tokens" else min(loss.loss_chunk, model.vocab_size)
    moment = 2 if optim.moments == "bfloat16" else 4
    return _whole(
        weights=4 * numbers * (1 + (optim.ema_decay > 0)),
        moments=moment * MOMENTS[optim.name] * numbers,
        gradients=(compute if candidate.accumulate == 1 else 4) * numbers,
        activations=kept,
        logits=2 * 4 * chunk * entries,
        layer=2 * compute * layer + 2 * tokens * inside * compute / mesh.tensor,
    )


def serve(model: ModelConfig, candidate: Candidate, *, length: int, tokens: int) -> dict[str, int]:
    """Of a step that reads `tokens` tokens of each sequence, with a cache of `length` for all of them."""
    mesh, precision = candidate.mesh, candidate.precision
    dense, experts = _parameters(model)
    table = model.vocab_size * model.embed_dim * (1 if model.tied else 2)
    wide, narrow = BYTES[precision.compute], BYTES[precision.weights]
    rows = candidate.batch / candidate.replicas
    here = ((dense - table) * narrow + table * max(narrow, 1.0) + experts * narrow / mesh.expert) / mesh.tensor
    heads = min(mesh.tensor, model.num_kv_heads)
    cache = cost.cache_bytes_per_token(model, cache_bytes=1) * BYTES[precision.cache] * rows * length / heads
    scales = 4 / model.head_dim if precision.cache == "int8" else 0
    return _whole(
        weights=here,
        cache=cache * (1 + scales),
        activations=rows * tokens * _inside(model) * wide / mesh.tensor,
        logits=2 * 4 * rows * model.vocab_size / mesh.tensor,
        layer=wide * (dense + experts / mesh.expert) / model.num_layers / mesh.tensor * (narrow < wide),
    )


def _whole(**kinds: int | float) -> dict[str, int]:
    return {kind: round(value) for kind, value in kinds.items()}


def _parameters(model: ModelConfig) -> tuple[int, int]:
    """Of everything but experts, and of experts."""
    experts = cost.expert_parameters(model)
    return cost.num_parameters(model) - experts, experts


def _inside(model: ModelConfig) -> int:
    """Numbers of a token inside one layer, all of them at once."""
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    A = model.experts_per_token
    F = model.shared_ffn_dim + A * model.expert_ffn_dim if model.num_experts else model.ffn_dim
    return 4 * D + 2 * N * H + 2 * K * H + (2 + model.gated) * F + 2 * A * D


def _kept(model: ModelConfig, remat: str) -> float:
    """Numbers of a token that a layer keeps for its backward pass."""
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    F = model.shared_ffn_dim if model.num_experts else model.ffn_dim
    routed = model.experts_per_token * (model.expert_ffn_dim * 2 + model.embed_dim) if model.num_experts else 0
    widths = {
        "query": N * H, "key": K * H, "value": K * H, "attention_out": N * H, "attention_lse": 2 * N, "middle": D,
        "ffn_gate": F * model.gated, "ffn_up": F,
    }  # fmt: skip
    if remat == "none":
        return float(D + sum(widths.values()) + 5 * D + F + 1.5 * routed)
    if remat == "dots":
        return float(D + sum(widths.values()) + D + routed)
    kept = {*KEPT[remat], *model.remat_save} - {*model.remat_offload}  # type: ignore[index]
    return float(D + sum(width for name, width in widths.items() if name in kept))
