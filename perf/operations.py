"""A job as what one device does in a step: matmuls, attention, passes over vectors, collectives. Knows no time.

Sizes are those of one device after all splits; the busiest device is meant where they differ. Backward is written from
forward: a product Y = X W has dX = dY Wᵀ and dW = Xᵀ dY, attention's backward computes five products for the
forward's two and reads what forward read and made.
"""

import dataclasses
from typing import Literal, NamedTuple

from model import cost
from model.config import ModelConfig
from perf.constants import STACKS
from perf.work import BYTES, Job

Size = int | float  # a count, or an average of counts
OpKind = Literal["matmul", "attention", "vector", "collective"]

# What a run computes again: passes over a layer besides forward and backward, of its matmuls and of the rest.
REMAT = {"none": (0.0, 0.0), "minimal": (0.0, 1.0), "dots": (0.0, 1.0), "attention": (0.8, 1.0), "full": (1.0, 1.0)}

ACTIVATION = 2.0  # bytes of a number between operations, where matmuls take 16 bits or less
SCORES = 5.0  # passes over attention's scores where they are written to memory: products, mask, softmax, products


class Operation(NamedTuple):
    """One kind of work and how often a step does it. Collectives move bytes among `group` devices, `stride` apart."""

    name: str
    kind: OpKind
    number: str = "bf16"  # format that the products take
    flops: float = 0.0  # each time
    bytes: float = 0.0  # of memory read and written, each time
    rows: float = 1.0  # M of the product [M, K] x [K, N]
    columns: float = 1.0  # N
    inner: float = 1.0  # K
    wire: float = 0.0  # bytes that a device sends, each time
    group: int = 1
    stride: int = 1
    axis: str = ""  # that the collective goes over
    count: float = 1.0  # times a step
    in_pipe: bool = True  # once a microbatch, rather than once a step


def operations(job: Job) -> list[Operation]:
    """All that one device does in the job. A request (`generate`) is its prompt and then its tokens one by one."""
    return {"train": _train, "prefill": _prefill, "decode": _decode, "generate": _generate}[job.kind](job)


# Parts ---------------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Tokens that a device computes at once."""

    tokens: float  # of activations
    sequences: float
    pairs: float  # of a query and a key that it sees, for one head of one sequence, on this device
    past: float  # keys in the cache of a sequence


def _matmul(job: Job, name: str, rows: Size, inner: Size, columns: Size, count: Size = 1.0) -> Operation:
    """[M, K] x [K, N], with the weight kept as the job keeps weights."""
    number = job.compute
    activation = _activation(job)
    weight = min(BYTES[job.weights], BYTES[number]) if job.kind != "train" else BYTES[number]
    moved = activation * rows * (inner + columns) + weight * inner * columns
    return Operation(
        name, "matmul", number, 2 * rows * inner * columns, moved, rows=rows, columns=columns, inner=inner, count=count
    )


def _activation(job: Job) -> Size:
    return 4.0 if job.compute == "fp32" else ACTIVATION


def _vector(job: Job, name: str, numbers: Size, count: Size = 1.0) -> Operation:
    return Operation(name, "vector", bytes=_activation(job) * numbers, count=count)


def _layer_matmuls(job: Job, tokens: Size, sparse: bool) -> list[Operation]:
    """Products of one layer's forward."""
    model, t = job.model, job.layout.tensor
    D, N, K, H = model.embed_dim, model.num_heads, max(model.num_kv_heads / t, 1) * t, model.head_dim
    if model.kv_rank:
        found = _latent_matmuls(job, tokens)
    else:
        found = [
            _matmul(job, "query, key, value", tokens, D, (N + 2 * K) * H / t),
            _matmul(job, "attention out", tokens, N * H / t, D),
        ]
    ffn = 2 if model.gated else 1
    if not sparse:
        found += [
            _matmul(job, "ffn up", tokens, D, ffn * model.ffn_dim / t),
            _matmul(job, "ffn down", tokens, model.ffn_dim / t, D),
        ]
        return found
    return found + _expert_matmuls(job, tokens)


def _latent_matmuls(job: Job, tokens: Size) -> list[Operation]:
    """Multi-head latent attention: narrow products whole on every device, wide ones split by heads."""
    model, t = job.model, job.layout.tensor
    D, N, H, R, Q = model.embed_dim, model.num_heads, model.head_dim, model.kv_rank, model.q_rank
    W, turning = model.value_dim or H, model.rope_dim
    query = [_matmul(job, "query in", tokens, D, Q)] if Q else []
    return [
        *query,
        _matmul(job, "query", tokens, Q or D, N * H / t),
        _matmul(job, "latent", tokens, D, R + turning),
        _matmul(job, "key, value", tokens, R, N * (H - turning + W) / t),
        _matmul(job, "attention out", tokens, N * W / t, D),
    ]


def _expert_matmuls(job: Job, tokens: Size) -> list[Operation]:
    """Router, routed and shared experts: each device has E/e experts, and gets as many rows as it sends."""
    model, t, e = job.model, job.layout.tensor, job.layout.expert
    D, E, A, F = model.embed_dim, model.num_experts, model.experts_per_token, model.expert_ffn_dim
    split = max(t / e, 1) if e > 1 else t  # experts lie whole on devices that are there for them
    here = max(min(E / e, tokens * A * e / split if tokens < E else E / e), 1)  # that any token goes to
    rows = tokens * A / here / (t if e > 1 else 1)
    found = [
        _matmul(job, "router", tokens, D, E),
        _matmul(job, "experts up", rows, D, 2 * F / split, count=here),
        _matmul(job, "experts down", rows, F / split, D, count=here),
    ]
    if model.shared_ffn_dim:
        found += [
            _matmul(job, "shared expert up", tokens, D, 2 * model.shared_ffn_dim / t),
            _matmul(job, "shared expert down", tokens, model.shared_ffn_dim / t, D),
        ]
    return found


def _attention(job: Job, block: _Block, is_fused: bool) -> list[Operation]:
    """Scores and their products with the values, for all heads of one layer's forward."""
    model, t = job.model, job.layout.tensor
    N, K, H, W = model.num_heads / t, max(model.num_kv_heads / t, 1), model.head_dim, model.value_dim or model.head_dim
    number = "fp32" if job.compute == "fp32" else "bf16"
    flops = 2 * N * (H + W) * block.pairs * block.sequences
    moved = _activation(job) * block.tokens * (N * (H + W) + K * (H + W))
    moved += BYTES[job.cache] * block.sequences * block.past * cached_numbers(model, K)
    found = [Operation("attention", "attention", number, flops, moved, rows=block.tokens, inner=H, columns=block.past)]
    if not is_fused:
        found.append(_vector(job, "scores", SCORES * N * block.pairs * block.sequences))
    return found


def cached_numbers(model: ModelConfig, kv_heads: Size) -> Size:
    """Keys and values of one token, in one layer that has so many heads of them."""
    return model.kv_rank + model.rope_dim if model.kv_rank else 2 * kv_heads * model.head_dim


def _layer_vectors(job: Job, tokens: Size, sparse: bool) -> list[Operation]:
    """Norms, residuals, rotations, the nonlinearity; of experts also sorting rows to them and back."""
    model, t = job.model, job.layout.tensor
    D, N, K, H = model.embed_dim, model.num_heads / t, model.num_kv_heads / t, model.head_dim
    norms = (4 if model.post_norms else 2) * 2 * D
    residuals = 2 * 3 * D
    rotations = 2 * (N + K) * H if model.positions == "rope" else 0
    wide = (3 if model.gated else 2) / t
    if sparse:
        A, F = model.experts_per_token, model.expert_ffn_dim
        inside = wide * (A * F + model.shared_ffn_dim) + 4 * A * D
    else:
        inside = wide * model.ffn_dim
    return [
        _vector(job, "norms, residuals", (norms + residuals + rotations) * tokens),
        _vector(job, "ffn middle", inside * tokens),
    ]


def _casts(job: Job, matmuls: list[Operation]) -> list[Operation]:
    """Reading what a product takes and writing it in eight bits or four."""
    if job.compute not in ("fp8", "int8", "fp4") or job.kind != "train":
        return []
    numbers = sum(op.rows * op.inner * op.count for op in matmuls)
    return [Operation("casts", "vector", bytes=(2.0 + BYTES[job.compute]) * numbers)]


def _times(ops: list[Operation], count: Size) -> list[Operation]:
    return [op._replace(count=op.count * count) for op in ops]


def _backward(job: Job, ops: list[Operation]) -> list[Operation]:
    """What the gradients of forward's operations take."""
    found = []
    for op in ops:
        if op.kind == "matmul":
            inputs = op._replace(name=f"{op.name}, dX", inner=op.columns, columns=op.inner)
            weights = op._replace(name=f"{op.name}, dW", rows=op.inner, inner=op.rows)
            found += [inputs, weights] if job.trains_all else [inputs]
        elif op.kind == "attention":
            found.append(op._replace(name="attention, backward", flops=2.5 * op.flops, bytes=2.0 * op.bytes))
        else:
            found.append(
                op._replace(name=f"{op.name}, backward", bytes=2.0 * op.bytes if op.name != "casts" else op.bytes)
            )
    return found


# Collectives ---------------------------------------------------------------------------------------------------------


def _collective(name: str, axis: str, sent: Size, group: int, stride: int, count: Size = 1.0) -> Operation:
    """A device of `group` sends that many bytes."""
    return Operation(name, "collective", wire=sent, group=group, stride=stride, axis=axis, count=count)


def _tensor_collectives(job: Job, tokens: Size, passes: Size, sparse: bool) -> list[Operation]:
    """Two sums of activations a layer and pass, as reduce-scatter and all-gather where the sequence is split too."""
    t = job.layout.tensor
    if t == 1:
        return []
    sums = 2.0 if not (sparse and job.layout.expert > 1) else 1.0
    sent = 2 * (t - 1) / t * tokens * job.model.embed_dim * _activation(job)
    return [_collective("sums over tensor", "tensor", sent, t, 1, sums * passes)]


def _expert_collectives(job: Job, tokens: Size, passes: Size) -> list[Operation]:
    """Tokens to the devices of their experts, and back."""
    model, e = job.model, job.layout.expert
    if e == 1:
        return []
    rows = tokens / job.layout.tensor * min(model.experts_per_token, e)  # one copy a device that has one of its experts
    sent = (e - 1) / e * rows * model.embed_dim * _activation(job)
    return [_collective("tokens to experts", "expert", sent, e, 1, 2 * passes)]


def _context_collectives(job: Job, tokens: Size, passes: Size) -> list[Operation]:
    """Keys and values of the whole row, to every device that has a part of it."""
    model, layout = job.model, job.layout
    c = layout.context
    if c == 1:
        return []
    kv_heads = max(model.num_kv_heads / layout.tensor, 1)
    sent = (c - 1) * tokens * 2 * kv_heads * model.head_dim * _activation(job)
    return [_collective("keys, values around", "context", sent, c, layout.tensor, passes)]


# Steps ---------------------------------------------------------------------------------------------------------------


def _kinds(model: ModelConfig) -> list[tuple[bool, Size]]:
    """Layers with a dense FFN, and with experts: whether sparse, how many."""
    if not model.num_experts:
        return [(False, model.num_layers)]
    dense = model.num_dense_layers
    return [(False, dense), (True, model.num_layers - dense)] if dense else [(True, model.num_layers)]


def _pairs(job: Job, new: int, past: int) -> Size:
    """Queries and keys of a sequence, of one layer on average, on one device of `context`."""
    model = job.model
    causal = cost.visible_keys(model, new, past) / model.num_layers
    return (causal if job.is_causal else float(new) * (new + past)) / job.layout.context


def _train(job: Job) -> list[Operation]:
    model, layout, stack = job.model, job.layout, STACKS[job.stack]
    M, p = job.microbatches, layout.pipe
    tokens = job.at_once * job.length / layout.context
    pairs = _pairs(job, job.length, 0) if stack.fused_attention else job.length**2 / layout.context
    block = _Block(tokens, job.at_once, pairs, 0)
    found = []
    for sparse, layers in _kinds(model):
        times = M * layers / p
        matmuls = _layer_matmuls(job, tokens, sparse)
        others = [*_attention(job, block, stack.fused_attention), *_layer_vectors(job, tokens, sparse)]
        others += _casts(job, matmuls)
        found += _times([*matmuls, *others], times) + _times(_backward(job, [*matmuls, *others]), times)
        again, vectors_again = REMAT[job.remat]
        if again:
            found += _named(_times(matmuls, times * again), "again")
        if vectors_again:
            found += _named(_times(others, times * vectors_again), "again")
        passes = (2 + (again > 0)) * times
        found += _tensor_collectives(job, tokens, passes, sparse) + _context_collectives(job, tokens, passes)
        if sparse:
            found += _expert_collectives(job, tokens, passes)
    found += _times(_ends(job, tokens, tokens), M / p)
    return found + _gradients(job)


def _named(ops: list[Operation], what: str) -> list[Operation]:
    return [op._replace(name=f"{op.name}, {what}") for op in ops]


def _ends(job: Job, tokens: Size, scored: Size) -> list[Operation]:
    """Embedding, unembedding and, in training, the loss."""
    model, t = job.model, job.layout.tensor
    D, V = model.embed_dim, model.vocab_size
    head = _matmul(job, "unembedding", scored, D, V / t)
    number = "fp32" if job.compute == "fp32" else "bf16"
    head = head._replace(
        number=number, bytes=head.bytes if job.kind != "train" else 2.0 * (scored * (D + V / t) + D * V / t)
    )
    embedding = _vector(job, "embedding", 2 * tokens * D)
    if job.kind != "train":
        return [embedding, head]
    loss = Operation("loss", "vector", bytes=4.0 * 4 * scored * V / t)
    return [embedding, head, loss, *_backward(job, [head])]


def _local_parameters(job: Job) -> tuple[Size, Size]:
    """Parameters of one stage and tensor part, whole over fsdp: of everything but experts, and of its own experts."""
    model, layout = job.model, job.layout
    total, experts = cost.num_parameters(model), cost.expert_parameters(model)
    parts = layout.tensor * layout.pipe
    return (total - experts) / parts, experts / layout.pipe / max(layout.expert, layout.tensor)


def _gradients(job: Job) -> list[Operation]:
    """Gathering weights, summing gradients over replicas, and the optimizer's step."""
    layout = job.layout
    dense, experts = _local_parameters(job)
    inner, M = layout.tensor * layout.context, job.microbatches
    f, d, e = layout.fsdp, layout.data * layout.context, layout.expert
    reduced = 4.0 if job.weights == "fp32" or job.compute == "fp32" else 2.0
    gathered = 4.0 if job.compute == "fp32" else 2.0
    found = []
    if f > 1:
        part = (f - 1) / f * dense + (max(f // e, 1) - 1) / max(f // e, 1) * experts
        gathers = 1 if layout.shards_gradients_only else 2 * M
        found.append(_collective("weights over fsdp", "fsdp", part * gathered, f, inner, gathers))
        found.append(
            _collective(
                "gradients over fsdp", "fsdp", part * reduced, f, inner, 1 if layout.shards_gradients_only else M
            )
        )
    if d > 1:
        shares = 2 * (d - 1) / d * dense / f
        other = max(d // e, 1) if f == 1 else d
        shares += 2 * (other - 1) / other * experts / max(f // e, 1)
        sum_ = _collective("gradients over data", "data", shares * reduced * job.trains_all, d, inner * f)
        found.append(sum_._replace(in_pipe=False, axis="slices" if layout.slices > 1 else "data"))
    kept = (dense + experts) / (f if f > 1 else 1)
    state = (
        30.0 * kept / (d if STACKS[job.stack].splits_optimizer else 1)
    )  # gradient, weight and two moments, read and written
    found.append(Operation("optimizer", "vector", bytes=state if job.trains_all else 0.0, in_pipe=False))
    if M > 1 and job.trains_all:
        found.append(Operation("gradients added", "vector", bytes=8.0 * kept, count=M - 1))
    return found


def _forward(job: Job, block: _Block, scored: Size) -> list[Operation]:
    """One pass without gradients, through all stages."""
    fused = STACKS[job.stack].fused_attention
    found = []
    for sparse, layers in _kinds(job.model):
        ops = [*_layer_matmuls(job, block.tokens, sparse), *_attention(job, block, fused)]
        ops += _layer_vectors(job, block.tokens, sparse)
        ops += _tensor_collectives(job, block.tokens, 1, sparse) + _context_collectives(job, block.tokens, 1)
        if sparse:
            ops += _expert_collectives(job, block.tokens, 1)
        found += _times(ops, layers)
    found += _ends(job, block.tokens, scored)
    return found


def _prefill(job: Job) -> list[Operation]:
    stack = STACKS[job.stack]
    tokens = job.sequences * job.length / job.layout.context
    pairs = _pairs(job, job.length, 0) if stack.fused_attention else job.length**2 / job.layout.context
    scored = job.sequences if stack.last_logits_only else tokens
    return _forward(job, _Block(tokens, job.sequences, pairs, 0), scored)


def _decode(job: Job) -> list[Operation]:
    past = cost.visible_keys(job.model, 1, job.length) / job.model.num_layers
    block = _Block(job.sequences, job.sequences, past, past)
    return _forward(job, block, job.sequences)


def _generate(job: Job) -> list[Operation]:
    prompt = dataclasses.replace(job, kind="prefill", output=0)
    middle = dataclasses.replace(job, kind="decode", length=job.length + job.output // 2, output=0)
    steps = max(job.output - 1, 1)
    prompts = [op._replace(name=f"prompt: {op.name}") for op in _prefill(prompt)]
    return prompts + [op._replace(name=f"token: {op.name}", count=op.count * steps) for op in _decode(middle)]
