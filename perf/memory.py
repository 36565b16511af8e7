"""What a step's bytes on one device are: weights, moments, gradients, activations, logits, cache. Compiles nothing.

Weights, moments and the cache are counted array by array from shapes and shardings; activations and logits from the
config. What the compiler needs beyond them (gathered weights, one layer's inner values, copies) is `other`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from model import config as model_config
from model.config import ModelConfig
from parallel.config import AxisRules
from parallel.sharding import Names, sharding
from training.config import TrainConfig
from training.losses import part_size
from training.state import TrainState

KINDS = ("weights", "moments", "cache", "activations", "gradients", "logits")
KEPT = ("weights", "moments", "cache")  # there from the first operation to the last


def device_bytes(shapes: Any, shardings: Any) -> int:
    """Bytes on one device of a tree of arrays."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(leaf_bytes(leaf, where) for leaf, where in leaves)


def leaf_bytes(leaf: Any, where: Any) -> int:
    """Bytes on one device of one array."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
        return leaf.size * leaf.dtype.itemsize
    return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def parts(name: str, mesh: Mesh, rules: AxisRules) -> int:
    """In how many parts the devices cut what has this logical name."""
    (part,) = sharding((name,), (mesh.size,), mesh, rules).shard_shape((mesh.size,))
    return mesh.size // part


def share(names: Names, sizes: tuple[int, ...], mesh: Mesh, rules: AxisRules) -> int:
    """Numbers of an activation that one device holds; a part that does not come out whole is rounded up."""
    divided = (-(-size // (parts(name, mesh, rules) if name else 1)) for name, size in zip(names, sizes, strict=True))
    return math.prod(divided)


def training(
    model: ModelConfig, train: TrainConfig, mesh: Mesh, rules: AxisRules, state: TrainState, where: TrainState
) -> dict[str, int]:
    """Bytes by kind of a train step."""
    weights = device_bytes(state.parameters, where.parameters)
    rows = -(-train.batch_size // train.accumulate)
    width = jnp.dtype(model.compute_dtype).itemsize if train.accumulate == 1 else 4  # sums of parts are float32
    saved = sum(
        share(("batch", *names), (rows, train.seq_len, size), mesh, rules) for names, size in saved_by_layer(model)
    )
    return {
        "weights": weights + device_bytes(state.ema, where.ema),
        "moments": device_bytes(state.optimizer, where.optimizer),
        "gradients": weights * width // 4,
        "activations": share(("layers",), (model.num_layers,), mesh, rules) * saved,
        "logits": 4 * logits_at_once(model, train, rows, mesh, rules),
        "cache": 0,
    }


def logits_at_once(model: ModelConfig, train: TrainConfig, rows: int, mesh: Mesh, rules: AxisRules) -> int:
    """Logits that one device holds at a time: of some tokens and all of V, or of all tokens and a part of V."""
    if train.loss == "vocabulary":
        part = part_size(share(("vocab",), (model.vocab_size,), mesh, rules), train.loss_chunk)
        return share(("batch", "seq"), (rows, train.seq_len), mesh, rules) * part
    chunk = min(train.loss_chunk, train.seq_len)
    return share(("batch", None, "act_vocab"), (rows, chunk, model.vocab_size), mesh, rules)


def saved_by_layer(model: ModelConfig) -> list[tuple[Names, int]]:
    """What a layer keeps of each token for its backward pass (model/remat.py): logical names and bytes.

    Attention's square of T x T, which `none` keeps on a platform without a kernel, is left to `other`.
    """
    width = jnp.dtype(model.compute_dtype).itemsize
    D, N, K, H, HV = (
        model.embed_dim,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        model.value_dim or model.head_dim,
    )
    F = model.shared_ffn_dim if model.num_experts else model.ffn_dim
    inner = F + model.experts_per_token * model.expert_ffn_dim  # of a token, in all the FFNs that it goes through
    heads, ffn, stream = ("seq", "act_heads"), ("seq", "act_ffn"), ("residual_seq", "act_embed")
    sizes: dict[str, tuple[Names, int]] = {
        "query": (heads, width * N * H),
        "key": (heads, width * K * H),
        "value": (heads, width * K * HV),
        "attention_out": (heads, width * N * HV),
        "attention_lse": (heads, 4 * N),
        "middle": (stream, width * D),
        "ffn_gate": (ffn, width * F * model.gated),
        "ffn_up": (ffn, width * F),
    }
    products = [
        (ffn, width * inner * (1 + model.gated)),
        (stream, width * D),
    ]  # the last one's is the next layer's input
    begin = (stream, width * D)
    if model.remat == "none":
        return [begin, *sizes.values(), *products, (stream, 4 * width * D)]
    if model.remat == "dots":
        return [begin, *(sizes[name] for name in list(sizes)[:5]), *products]
    kept = {*model_config.KEPT[model.remat], *model.remat_save} - {*model.remat_offload}
    return [begin, *(sizes[name] for name in sizes if name in kept)]


def serving(
    model: ModelConfig, mesh: Mesh, rules: AxisRules, *, weights: int, cache: int, rows: int, tokens: int
) -> dict[str, int]:
    """Bytes by kind of a prefill or decode step that reads `tokens` tokens of each of `rows` rows."""
    D, N, K, H, F = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim, model.ffn_dim
    width = jnp.dtype(model.compute_dtype).itemsize
    one = [("act_embed", 2 * D), ("act_heads", max(N + 2 * K, 2 * N) * H), ("act_ffn", 2 * F)]  # the widest counts
    layer = max(share(("batch", None, name), (rows, tokens, size), mesh, rules) for name, size in one)
    return {
        "weights": weights,
        "moments": 0,
        "gradients": 0,
        "activations": width * layer,
        "logits": 4 * share(("batch", "act_vocab"), (rows, model.vocab_size), mesh, rules),
        "cache": cache,
    }


def breakdown(peak: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """The peak by kind, so that the kinds and `other` make up the peak.

    The peak is one moment: where all kinds together are more than it, some did not live then, and are cut short in
    the order of KINDS.
    """
    left, found = peak, {}
    for kind in KINDS:
        found[kind] = min(sizes[kind], left)
        left -= found[kind]
    return {**found, "other": left}
