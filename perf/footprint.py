"""HBM that a step takes on one device, by arithmetic: no devices, no compiler, under a millisecond. Knows no time.

    train_footprint(model, sizes, train=train, hbm=topology.hbm_bytes)   ->  Footprint(total, parts, fits, moment)
    serve_footprint(model, sizes, step="decode", batch=32, length=4096, hbm=…)

A step's peak is at one of a few moments, and the largest of them is the answer: the loss, when all layers' activations
wait and the logits are there; the backward pass of the first layer that has one, when gradients of all layers have
their place besides; the end of it, when the embedding's gradient is made; the update. What a moment holds is counted
array by array; of one layer's inner values the constants below say how many arrays there are at once. They were read
off and fitted to what the TPU compiler makes of these steps: docs/benchmarks/planner_memory.md.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from inference.config import EngineConfig
from inference.steps import TILE, power_of_two
from model.config import ModelConfig
from model.parameters import abstract, summed_dims
from parallel.chips import Chip
from parallel.config import AxisRules, ExecutionConfig
from parallel.mesh import FSDP
from parallel.sharding import Names, axes_of
from parallel.topology import ALIASES, GENERATIONS
from perf.memory import saved_by_layer
from perf.work import BYTES, Job
from training.config import OptimConfig, TrainConfig
from training.losses import part_size
from training.optimizer import SLOWEST


class Constants(NamedTuple):
    """How many arrays of a size there are at once where the compiler decides it; fitted (perf/footprint_fit.py)."""

    gathered: float = 1.0  # of one layer's gathered weights: those of the layer in flight, little of the next
    whole_gradients: float = 2.5  # of its largest matrix: gradients not scattered yet, weights ahead of their use
    wide: float = 2.0  # of a token and F beside these: gate, up, their product and gradients, as one takes a place
    stream: float = 7.2  # of a token and D beside these: the layer's input, norms, what is added, gradients
    rows_wide: float = 3.0  # of a row sent to experts and their F
    rows_stream: float = 4.0  # of such a row and D
    late_wide: float = 4.0  # of a token and F where attention's backward is at work and FFN's gradients still wait
    late_heads: float = 6.0  # of a token and all heads there: queries, attention's result, gradients of both
    late_stream: float = 7.0  # of a token and D there
    together: float = 2.0  # of a token and D gathered over tensor, which splits the sequence between blocks
    head_gradient: float = 0.8  # of the table's whole gradient in float32: whether it waits for the layers' backward
    logits: float = 6.0  # bytes of a logit: float32, and its gradient in the type of products


CONSTANTS = Constants()
MARGIN = 0.06  # of the peak that must be left for a step to be said to fit
DRIVER = 0.06  # of a GPU's memory: context, libraries and what fragments
KINDS = ("weights", "moments", "copies", "gradients", "activations", "gathered", "layer", "logits",
         "exchange", "pipeline", "cache", "workspace")  # fmt: skip


class Footprint(NamedTuple):
    """Bytes of one device at the moment when they are most; the parts add up to the total."""

    total: int
    parts: dict[str, int]  # a key of KINDS, where there are any bytes of it
    fits: bool  # with MARGIN to spare
    moment: str  # forward (of a pipe), loss, backward, embedding, update; serve


class Leaf(NamedTuple):
    """A parameter."""

    names: Names
    shape: tuple[int, ...]
    stack: str  # the first key of its path: layers, dense_layers, embedding, head, norm
    part: str  # the second: attention, ffn, a norm
    is_cast: bool  # multiplied in the compute type


class Split(NamedTuple):
    """Into how many parts a mesh cuts what has a logical name."""

    sizes: Mapping[str, int]  # devices along the axes of MeshConfig
    rules: AxisRules

    def axes(self, name: str | None) -> frozenset[str]:
        """The axes, as a config calls them, that split a name."""
        bound = () if name is None else axes_of(getattr(self.rules, name))
        return frozenset("fsdp" if axis in FSDP else axis for axis in bound)

    def parts(self, *names: str | None, without: frozenset[str] = frozenset()) -> int:
        """Of an array with these dims."""
        axes = frozenset().union(*(self.axes(name) for name in names)) - without
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    def share(self, size: int, *names: str | None) -> int:
        """Of a dim that a device has, rounded up."""
        return -(-size // self.parts(*names))

    def local(self, leaf: Leaf, *, gathered: bool = False) -> tuple[int, ...]:
        """A parameter's shape on one device; `gathered` over the axes that split tokens, but for experts."""
        tokens = self.axes("batch") | self.axes("seq")
        shape = []
        for name, size in zip(leaf.names, leaf.shape, strict=True):
            without = tokens if gathered and name != "experts" else frozenset()
            shape.append(-(-size // self.parts(name, without=without)))
        return tuple(shape)


def tiled(shape: tuple[int, ...], width: int) -> int:
    """Bytes of an array in tiles of 8 x 128 numbers, laid out as wastes the least."""
    if not shape:
        return 512
    whole = math.prod(shape)
    if len(shape) == 1:
        return -(-whole // 128) * 128 * width
    up = lambda size, multiple: -(-size // multiple) * multiple / max(size, 1)  # noqa: E731
    waste = min(
        up(minor, 128) * up(second, 8) for i, minor in enumerate(shape) for j, second in enumerate(shape) if i != j
    )
    return round(whole * waste) * width


@functools.cache
def leaves(model: ModelConfig) -> tuple[Leaf, ...]:
    """Every parameter of a model; the first call for a model takes a while, as its modules are traced."""
    shapes, names = abstract(model).shapes, abstract(model).names
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    pairs = zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(names, is_leaf=is_names), strict=True)
    return tuple(
        Leaf(
            name,
            leaf.shape,
            str(path[0].key),
            str(path[1].key) if len(path) > 1 else "",
            "vocab" in name or summed_dims(name) is not None,
        )
        for (path, leaf), name in pairs
    )


def parameters_of(model: ModelConfig) -> tuple[Leaf, ...]:
    """As `leaves`, traced once for all ways to run the model."""
    plain = {"remat": "none", "remat_save": (), "remat_offload": (), "kernels": "plain", "matmul": "float"}
    return leaves(dataclasses.replace(model, **plain, compute_dtype="float32", scan_layers=True))


# Training -------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A train step on one device: what all moments need."""

    model: ModelConfig
    train: TrainConfig
    execution: ExecutionConfig
    split: Split
    leaves: tuple[Leaf, ...]
    width: int  # bytes of a number that products take
    rows: int  # sequences computed at once: a microbatch of a pipe, else a part of an accumulated batch
    stages: int
    passes: int  # microbatches of a pipe
    constants: Constants

    @property
    def tokens(self) -> int:
        """Computed at once, where they meet."""
        return self.rows * self.split.share(self.train.seq_len, "seq")

    @property
    def apart(self) -> int:
        """Of them on this device between blocks."""
        return self.rows * self.split.share(self.train.seq_len, "residual_seq")

    def numbers(self, *stacks: str, gathered: bool = False) -> int:
        """Parameters on this device."""
        return sum(math.prod(self.split.local(leaf, gathered=gathered)) for leaf in self.leaves if leaf.stack in stacks)


def train_footprint(
    model: ModelConfig,
    sizes: Mapping[str, int],
    *,
    train: TrainConfig,
    hbm: int,
    rules: AxisRules = AxisRules(),  # noqa: B008
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    optim: OptimConfig = OptimConfig(),  # noqa: B008
    constants: Constants = CONSTANTS,
) -> Footprint:
    """Of a train step; `sizes` are devices along the axes of MeshConfig, `hbm` the bytes that a program may use."""
    split = Split(sizes, rules)
    stages = split.parts("layers")
    batch = -(-train.batch_size // train.accumulate // split.parts("batch"))
    passes = (execution.microbatches or stages) if stages > 1 else 1
    step = Step(
        model=model,
        train=train,
        execution=execution,
        split=split,
        leaves=parameters_of(model),
        width=jnp.dtype(model.compute_dtype).itemsize,
        rows=-(-batch // passes),
        stages=stages,
        passes=passes,
        constants=constants,
    )
    kept = _state(step, optim)
    moments = {"loss": _loss(step), "backward": _backward(step), "embedding": _embedding(step), "update": _update(step)}
    if stages > 1 and execution.pipeline == "circular":
        moments["forward"] = _forward(step)
    return _largest(kept, moments, hbm)


def _largest(kept: dict[str, int], moments: dict[str, dict[str, int]], hbm: int) -> Footprint:
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(totals, key=totals.__getitem__)
    parts = {kind: kept.get(kind, 0) + moments[moment].get(kind, 0) for kind in KINDS}
    total = sum(parts.values())
    return Footprint(total, {kind: size for kind, size in parts.items() if size}, total * (1 + MARGIN) <= hbm, moment)


def _state(step: Step, optim: OptimConfig) -> dict[str, int]:
    """What is there from the first operation to the last: parameters, moments, the batch."""
    weights = sum(tiled(step.split.local(leaf), 4) for leaf in step.leaves)
    moments = sum(_moments(step, leaf, optim) for leaf in step.leaves)
    rows = -(-step.train.batch_size // step.split.parts("batch"))
    batch = 5 * tiled((rows, step.split.share(step.train.seq_len, "seq")), 4)
    return {"weights": weights * (2 if optim.ema_decay else 1), "moments": moments, "workspace": batch}


def _moments(step: Step, leaf: Leaf, optim: OptimConfig) -> int:
    """Of one parameter, as the rules of training/optimizer.py keep them."""
    local = step.split.local(leaf)
    first = 2 if optim.moments == "bfloat16" else 4
    second = 2 if optim.moments == "bfloat16" and optim.b2 <= SLOWEST else 4
    if optim.name == "lion" or (optim.name == "muon" and leaf.is_cast and "vocab" not in leaf.names):
        return tiled(local, first)
    if optim.name == "adafactor":
        if len(leaf.shape) < 2 or sorted(leaf.shape)[-2] < 128:
            return tiled(local, 4)
        *_, small, large = sorted(leaf.shape)  # factors are whole on every device
        return 4 * (math.prod(leaf.shape) // small + math.prod(leaf.shape) // large)
    return tiled(local, first) + tiled(local, second)


def _copies(step: Step) -> int:
    """Matrices in the type of products, made once a step."""
    return sum(tiled(step.split.local(leaf), step.width) for leaf in step.leaves if leaf.is_cast and step.width < 4)


def _gradients(step: Step, *stacks: str) -> int:
    """Of whole stacks of layers, before the update."""
    mine = [leaf for leaf in step.leaves if not stacks or leaf.stack in stacks]
    size = lambda leaf: tiled(step.split.local(leaf), step.width if leaf.is_cast else 4)  # noqa: E731
    return sum(map(size, mine))


def _accumulated(step: Step) -> int:
    """Sums of the gradients of a batch in parts, in float32."""
    if step.train.accumulate == 1:
        return 0
    return sum(tiled(step.split.local(leaf), 4) for leaf in step.leaves)


def _layers_here(step: Step) -> int:
    return step.split.share(step.model.num_layers, "layers")


def _saved(model: ModelConfig, width: int) -> list[tuple[Names, int]]:
    """What a layer keeps of each token (perf/memory.py); with `none` all that a backward reads, twice where cast."""
    if model.remat != "none":
        return saved_by_layer(model)
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    F = model.shared_ffn_dim if model.num_experts else model.ffn_dim
    heads, ffn, stream = ("seq", "act_heads"), ("seq", "act_ffn"), ("residual_seq", "act_embed")
    norms = (4 if model.post_norms else 2) * (2 * 4 + width)  # in float32 before and after, and as it goes on
    found: list[tuple[Names, int]] = [(stream, norms * D), (heads, 2 * width * (N + K) * H + 4 * N)]
    found.append((ffn, width * F * (6 if model.gated else 3)))
    return [*found, (heads, 2 * 4 * (N + K) * H)] if model.qk_norm else found


def _activations(step: Step, rows: int) -> int:
    """What layers keep of `rows` sequences for the backward pass."""
    bytes_ = 0
    for (seq, wide), size in _saved(step.model, step.width):
        tokens = rows * step.split.share(step.train.seq_len, seq)
        bytes_ += tokens * step.split.share(size, wide)
    return _layers_here(step) * bytes_


def _kept(step: Step) -> dict[str, int]:
    """Activations of all layers that a device has, and the inputs of its pipe's stages.

    Weights that are gathered outside of a `jax.checkpoint` are kept, too.
    """
    if step.stages == 1:
        whole = _all_gathered(step) if step.model.remat == "none" else 0
        return {"activations": _activations(step, step.rows), "gathered": whole}
    stream = step.apart * step.model.embed_dim * step.width
    execution, stages = step.execution, step.stages
    if execution.pipeline == "1f1b":
        stash = (2 * stages + step.passes + 3) * stream
        return {"activations": _activations(step, step.rows), "pipeline": stash}
    ticks = step.passes * execution.repeats + stages - 1
    if execution.repeats > 1:
        return {"activations": _activations(step, step.rows) // execution.repeats, "pipeline": ticks * stream}
    return {"activations": ticks * _activations(step, step.rows), "pipeline": (step.passes + stages) * stream}


def _all_gathered(step: Step) -> int:
    """The weights of all layers that a device has, whole."""
    return step.width * _layers_here(step) * sum(_sizes(step))


def _forward(step: Step) -> dict[str, int]:
    """The last tick of a pipe: it has activations of its own before they join the others', and all weights whole.

    Gathering them does not depend on the tick, so jax moves it out of the loop.
    """
    parts = {"copies": _copies(step), **_kept(step), "gathered": _all_gathered(step), "workspace": _turned(step)}
    inner = step.tokens * step.split.share(step.model.num_heads, "act_heads") * step.model.head_dim * 8
    return parts | {"activations": parts["activations"] + _activations(step, step.rows), "layer": inner}


def _table(step: Step) -> tuple[int, int]:
    """Numbers of the unembedding that a device has, and of it gathered, its rows whole tiles where it multiplies."""
    leaf = Leaf(("vocab", "embed"), (step.model.vocab_size, step.model.embed_dim), "head", "", True)
    V, D = step.split.local(leaf, gathered=True)
    return math.prod(step.split.local(leaf)), V * -(-D // 128) * 128


def _turned(step: Step) -> int:
    """The embedding in float32 once more, where its rows are whole but no whole tiles: it is laid out anew."""
    V, D = step.model.vocab_size, step.model.embed_dim
    here, columns = step.split.local(Leaf(("vocab", "embed"), (V, D), "embedding", "", True))
    return 4 * here * -(-D // 128) * 128 if columns == D and D % 128 else 0


def _finished_rows(step: Step) -> int:
    """Sequences whose loss a device computes at once: after a pipe its share of all microbatches."""
    if step.stages == 1 or step.execution.pipeline == "1f1b":
        return step.rows
    return -(-step.rows * step.passes // step.stages)


def _loss(step: Step) -> dict[str, int]:
    """All activations wait, logits of a part are there, the table is gathered and its gradient summed."""
    model, train, width, kept = step.model, step.train, step.width, _kept(step)
    rows, length = _finished_rows(step), step.split.share(train.seq_len, "seq")
    mine, whole = _table(step)
    stream = rows * length * model.embed_dim * width
    V = step.split.share(model.vocab_size, "vocab")
    if train.loss == "vocabulary":
        size = part_size(V, train.loss_chunk)
        part = width * size * model.embed_dim
        first, second = (4 * rows * length * size, part), (width * rows * length * size, 2 * part)  # of the two rounds
        logits, gathered = max(first, second, key=sum)
        logits += 4 * rows * length * model.embed_dim + 2 * stream
        sums = width * mine
    else:
        chunk = min(train.loss_chunk, length)
        logits = round(step.constants.logits * rows * chunk * V) + 3 * stream
        gathered, sums = width * (whole if whole > mine else 0), 4 * whole
    return {
        "copies": _copies(step),
        "gradients": sums + _accumulated(step),
        "logits": logits,
        "workspace": _turned(step),
        **kept,
        "gathered": gathered + kept.get("gathered", 0),
    }


def _backward(step: Step) -> dict[str, int]:
    """The layers' gradients have their places, and one layer is at work."""
    if step.stages > 1 and step.execution.pipeline == "1f1b":
        return _tick(step)
    mine, whole = _table(step)
    head = step.width * mine if step.train.loss == "vocabulary" else round(step.constants.head_gradient * 4 * whole)
    gradients = _gradients(step, "layers", "dense_layers") + head + _accumulated(step)
    stream = _finished_rows(step) * step.split.share(step.train.seq_len, "residual_seq") * step.model.embed_dim
    kept = _kept(step)
    kept["pipeline"] = kept.get("pipeline", 0) + (stream * step.width if step.stages > 1 else 0)
    before = {
        "copies": _copies(step),
        "gradients": gradients,
        "layer": stream * step.width,
        "workspace": _turned(step),
        **kept,
    }
    if step.model.num_dense_layers == 1:  # a loop of one turn is none: its gathered weights wait for the backward pass
        before["gathered"] = before.get("gathered", 0) + step.width * sum(_sizes(step, "dense_layers"))
    if step.stages > 1:  # the tick's own activations, taken out of all ticks', and its gradients
        before["activations"] += _activations(step, step.rows)
        before["gradients"] += _gradients(step, "layers")
    if step.tokens > step.apart:
        before["layer"] += round(step.constants.together * step.tokens * step.model.embed_dim * step.width)
    inner = max(_ffn(step), _attention(step), key=lambda parts: sum(parts.values()))
    return {kind: before.get(kind, 0) + inner.get(kind, 0) for kind in before | inner}


def _tick(step: Step) -> dict[str, int]:
    """Of one forward, one backward: sums in float32, and either a stage at work or its gradients being added."""
    sums = 4 * step.numbers("layers", "embedding", "head", "norm")
    inner = max(_ffn(step), _attention(step), key=lambda parts: sum(parts.values()))
    working = inner | {"gradients": _gradients(step, "layers"), "activations": _activations(step, step.rows)}
    adding = {"gradients": 4 * step.numbers("layers")}
    more = max(working, adding, key=lambda parts: sum(parts.values()))
    held = {"copies": _copies(step), "pipeline": _kept(step)["pipeline"], "workspace": _turned(step)}
    return held | more | {"gradients": sums + _accumulated(step) + more["gradients"]}


def _sizes(step: Step, stack: str = "layers", part: str = "") -> list[int]:
    """Numbers of one layer's matrices that are gathered; `part` is attention or ffn."""
    found = []
    for leaf in step.leaves:
        whole = step.split.local(leaf, gathered=True)[1:]
        if leaf.stack == stack and leaf.is_cast and part in leaf.part and whole != step.split.local(leaf)[1:]:
            found.append(math.prod(whole))
    return found


def _ffn(step: Step) -> dict[str, int]:
    """The FFN's backward pass: gathered weights, gradients of them before they are scattered, inner values."""
    constants, model, sizes = step.constants, step.model, _sizes(step)
    F = step.split.share(model.shared_ffn_dim if model.num_experts else model.ffn_dim, "act_ffn")
    numbers = constants.wide * step.tokens * F + constants.stream * step.apart * model.embed_dim
    again = 0 if "gathered" in _kept(step) and _kept(step)["gathered"] else constants.gathered
    gathered = again * sum(sizes) + constants.whole_gradients * max(sizes, default=0)
    return {
        "gathered": round(step.width * gathered),
        "layer": round(step.width * numbers),
        "exchange": _exchange(step),
    }


def _attention(step: Step) -> dict[str, int]:
    """Attention's backward pass, while gradients of the FFN's weights are made late."""
    constants, model, split = step.constants, step.model, step.split
    F = split.share(model.shared_ffn_dim if model.num_experts else model.ffn_dim, "act_ffn")
    heads = split.share(model.num_heads, "act_heads") * -(-model.head_dim // 128) * 128
    numbers = constants.late_wide * step.tokens * F + constants.late_heads * step.tokens * heads
    numbers += constants.late_stream * step.apart * model.embed_dim
    gathered = sum(_sizes(step, part="attention"))
    ring = 0
    if split.parts("seq") > 1:  # gradients of queries, keys and values of the whole ring, in float32
        wide = split.share(model.num_heads, "act_heads") + 2 * split.share(model.num_kv_heads, "act_heads")
        ring = 4 * step.tokens * wide * model.head_dim
    return {"gathered": round(step.width * gathered), "layer": round(step.width * numbers), "exchange": ring}


def _exchange(step: Step) -> int:
    """Rows that stand at their experts, and what these make of them."""
    model, split = step.model, step.split
    if not model.num_experts:
        return 0
    spread = model.expert_capacity if split.parts("experts") > 1 else 1.0
    rows = spread * step.tokens * model.experts_per_token
    F = split.share(model.expert_ffn_dim, "expert_ffn")
    return round(step.width * rows * (step.constants.rows_wide * F + step.constants.rows_stream * model.embed_dim))


def _embedding(step: Step) -> dict[str, int]:
    """All gradients are there, the embedding's being made: rows of all tokens that share its columns, in float32."""
    model, split = step.model, step.split
    table = Leaf(("vocab", "embed"), (model.vocab_size, model.embed_dim), "embedding", "", True)
    rows = step.apart * step.passes * model.embed_dim
    return {
        "gradients": _gradients(step) + _accumulated(step),
        "workspace": 4 * math.prod(split.local(table)) + 4 * rows,
    }


def _update(step: Step) -> dict[str, int]:
    """Gradients meet moments, one parameter after the other, in place."""
    largest = max(tiled(step.split.local(leaf), 4) for leaf in step.leaves)
    return {"gradients": _gradients(step) if step.train.accumulate == 1 else _accumulated(step), "workspace": largest}


# Serving --------------------------------------------------------------------------------------------------------------


def serve_footprint(
    model: ModelConfig,
    sizes: Mapping[str, int],
    *,
    step: str,
    batch: int,
    length: int,
    hbm: int,
    rules: AxisRules = AxisRules(),  # noqa: B008
    weight_bytes: float | None = None,
    cache_bytes: float | None = None,
) -> Footprint:
    """Of an engine's step (prefill, decode) with a cache for `batch` sequences of `length` tokens.

    `weight_bytes` and `cache_bytes` are of one number; None is the type of products.
    """
    split, options = Split(sizes, rules), EngineConfig()
    width = jnp.dtype(model.compute_dtype).itemsize
    own = [leaf._replace(names=leaf.names[1:], shape=leaf.shape[1:]) if leaf.names[0] == "layers" else leaf
           for leaf in parameters_of(model)]  # fmt: skip
    depth = [leaf.shape[0] if leaf.names[0] == "layers" else 1 for leaf in parameters_of(model)]
    size = lambda leaf: tiled(split.local(leaf), 1) * ((weight_bytes or width) if leaf.is_cast else 4)  # noqa: E731
    weights = round(sum(count * size(leaf) for leaf, count in zip(own, depth, strict=True)))
    R, V = power_of_two(batch), model.vocab_size
    slots = tiled((R + 1, V), 7) + tiled((R + 1, -(-V // 32)), 4)
    kv_heads = split.parts("act_heads")
    K = model.num_kv_heads // kv_heads if model.num_kv_heads % kv_heads == 0 else model.num_kv_heads
    blocks = batch * -(-length // options.block_size) + 1
    H = -(-model.head_dim // 128) * 128
    cache = 2 * model.num_layers * blocks * K * options.block_size * H * (cache_bytes or width)
    rows = R if step == "decode" else min(length, TILE * power_of_two(max(1, options.chunk // TILE)))
    chosen = R if step == "decode" else rows // TILE
    table = 4 * split.share(V, "vocab") * -(-model.embed_dim // 128) * 128  # looked up in float32, all of D
    F = split.share(max(model.ffn_dim, model.shared_ffn_dim), "act_ffn")
    layer = rows * (4 * F + 8 * model.embed_dim) * width
    logits = 4 * 4 * chosen * V
    return _largest(
        {"weights": weights, "cache": round(cache), "workspace": slots},
        {"serve": {"layer": layer, "logits": logits}, "embedding": {"gathered": table}},
        hbm,
    )


# Jobs -----------------------------------------------------------------------------------------------------------------


def footprint(job: Job, chip: Chip) -> Footprint:
    """Of one of perf/work.py's jobs, run as this project runs it, on one device of a chip."""
    layout, hbm = job.layout, usable(chip)
    apart = math.gcd(layout.fsdp, layout.expert)  # of the experts' axis, which lies among fsdp and data
    sizes = {
        "data": max(layout.data // (layout.expert // apart), 1),
        "fsdp": layout.fsdp // apart,
        "expert": layout.expert,
        "tensor": layout.tensor,
        "pipe": layout.pipe,
        "context": layout.context,
    }
    dtype = "float32" if job.compute == "fp32" else "bfloat16"
    model = dataclasses.replace(job.model, remat=job.remat, compute_dtype=dtype)
    if job.kind != "train":
        return serve_footprint(
            model,
            sizes,
            step="prefill" if job.kind == "prefill" else "decode",
            batch=-(-job.batch // layout.replicas),
            length=job.length + job.output,
            hbm=hbm,
            weight_bytes=BYTES[job.weights],
            cache_bytes=BYTES[job.cache],
        )
    in_pipe = layout.pipe > 1
    execution = ExecutionConfig(microbatches=job.microbatches if in_pipe else 0, repeats=layout.virtual)
    accumulate = 1 if in_pipe else job.microbatches
    train = TrainConfig(steps=1, batch_size=job.batch, seq_len=job.length, accumulate=accumulate)
    return train_footprint(model, sizes, train=train, execution=execution, hbm=hbm)


def usable(chip: Chip) -> int:
    """Bytes of a device's memory that a program may use: as the TPU compiler says, else all but the driver's part."""
    name = chip.name.removeprefix("TPU ")
    generation = GENERATIONS.get(ALIASES.get(name, name))
    if generation is not None:
        return int(generation.hbm_gib * 2**30)
    return int(chip.hbm_bytes / chip.devices_per_chip * (1 if name.startswith("v") else 1 - DRIVER))
