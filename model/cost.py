"""Counts of a decoder: parameters, FLOPs, bytes. Pure arithmetic on the config; knows no chip and imports no jax.

Conventions, one for the whole house:
- Only matmuls count, two FLOPs a multiply-add. Embedding look-ups, norms, softmax and rotations are left out.
- A query's attention counts the keys that it may see, its own included: a causal sequence of T tokens costs
  T (T + 1) / 2 pairs, half of the full square, whatever a kernel computes beyond that; a window layer at most `window`
  keys a query.
- Training is three times the forward (arXiv:2001.08361, section 2.1). What is computed again is not counted, so that
  these are the model's FLOPs of MFU (arXiv:2204.02311, appendix B); `recomputed_flops` are what the hardware does
  besides: what the remat policy asks for, logits in the backward kernel of attention, hidden values of experts.
- A token goes through A of E experts, the shared ones and the router; only these count in FLOPs.
- Bytes of a decode step: every parameter that the step multiplies by is read once, however large the batch, of experts
  as many as its tokens can choose, at most A a sequence; every visible key and value is read once a sequence, and one
  of each is written. Activations are left out.
"""

from collections import Counter

from model.config import KEPT, ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """All parameters, a tied table counted once."""
    D, V = config.embed_dim, config.vocab_size
    positions = config.max_length * D if config.positions == "learned" else 0
    head = 0 if config.tied else V * D
    return V * D + positions + head + _layers(config, config.num_experts) + _norm_parameters(config, D)


def expert_parameters(config: ModelConfig) -> int:
    """Of the routed experts of all layers; the router and shared experts are not among them."""
    sparse = config.num_layers - _num_dense(config)
    return 3 * config.embed_dim * config.expert_ffn_dim * config.num_experts * sparse


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that every token multiplies by: all matrices, and the unembedding, which may be the tied table."""
    return _matrices(config) + config.vocab_size * config.embed_dim


def _layers(config: ModelConfig, experts: int) -> int:
    """Parameters of all layers, each with so many experts."""
    D, L, num_dense = config.embed_dim, config.num_layers, _num_dense(config)
    norms = (4 if config.post_norms else 2) * _norm_parameters(config, D)
    dense = _ffn_matrices(config) + config.ffn_bias * (config.ffn_dim + D)
    router_bias = config.num_experts * (config.router == "sigmoid")
    sparse = _experts_matrices(config, experts) + router_bias
    return L * (_attention_parameters(config) + norms) + num_dense * dense + (L - num_dense) * sparse


def _matrices(config: ModelConfig) -> int:
    """What a token multiplies by in all layers."""
    L, num_dense = config.num_layers, _num_dense(config)
    sparse = _experts_matrices(config, config.experts_per_token)
    return L * _attention_matrices(config) + num_dense * _ffn_matrices(config) + (L - num_dense) * sparse


def _num_dense(config: ModelConfig) -> int:
    return config.num_dense_layers if config.num_experts else config.num_layers


def _ffn_matrices(config: ModelConfig) -> int:
    return (3 if config.gated else 2) * config.embed_dim * config.ffn_dim


def _experts_matrices(config: ModelConfig, experts: int) -> int:
    """Router, `experts` of the routed and all shared experts."""
    D, F = config.embed_dim, experts * config.expert_ffn_dim + config.shared_ffn_dim
    return config.num_experts * D + 3 * D * F


def _attention_matrices(config: ModelConfig) -> int:
    D, N, K, H, R = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.kv_rank
    if not R:
        return D * H * (N + 2 * K) + N * H * D
    W, turning = config.value_dim or H, config.rope_dim
    queries = (config.q_rank or D) * N * H + D * config.q_rank
    return queries + D * (R + turning) + R * N * (H - turning + W) + N * W * D


def _attention_parameters(config: ModelConfig) -> int:
    """Matrices, biases and norms."""
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    biases = config.qkv_bias * H * (N + 2 * K) + config.out_bias * D
    qk_norms = 2 * _norm_parameters(config, H) if config.qk_norm else 0
    latent_norms = _norm_parameters(config, config.kv_rank) + _norm_parameters(config, config.q_rank)
    return _attention_matrices(config) + biases + qk_norms + latent_norms


def _norm_parameters(config: ModelConfig, dim: int) -> int:
    return 2 * dim if config.norm == "layer" else dim


def visible_keys(config: ModelConfig, new: int, past: int = 0) -> int:
    """Query-key pairs of `new` tokens after `past` ones, summed over layers.

    visible_keys(two global layers, new=3)  ->  2 * (1 + 2 + 3)
    """
    by_kind = {"global": _pairs(new, past), "window": _pairs(new, past, config.window)}
    return sum(by_kind[kind] for kind in config.layer_kinds)


def _pairs(new: int, past: int, window: int | None = None) -> int:
    """Sum over the new queries of min(position + 1, window)."""
    last = past + new
    if window is None or last <= window:
        return (last * (last + 1) - past * (past + 1)) // 2
    growing = max(window - past, 0)  # queries whose window is not full yet
    return _pairs(growing, past) + (new - growing) * window


def forward_flops(config: ModelConfig, new: int, past: int = 0, *, logits: int) -> int:
    """FLOPs of `new` tokens of one sequence after `past` ones; `logits` of them go through the unembedding."""
    matrices = 2 * _matrices(config) * new
    widths = config.head_dim + (config.value_dim or config.head_dim)
    attention = 2 * config.num_heads * widths * visible_keys(config, new, past)
    return matrices + attention + 2 * config.vocab_size * config.embed_dim * logits


def train_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs a token of a training step on sequences of `seq_len` tokens, forward and backward."""
    return 3 * forward_flops(config, seq_len, logits=seq_len) / seq_len


def layer_products(config: ModelConfig, keys: float | int, *, dense: bool) -> dict[str, float]:
    """FLOPs of each product of one layer's forward, a token, whose query sees `keys` keys on average."""
    D, E, A = config.embed_dim, config.num_experts, config.experts_per_token
    products = {name: 2.0 * size for name, size in _projections(config).items()}
    products["scores"] = 2 * keys * config.num_heads * config.head_dim
    products["mix"] = 2 * keys * config.num_heads * (config.value_dim or config.head_dim)
    halves = ("gate", "up", "down") if config.gated else ("up", "down")
    if dense:
        return products | {f"ffn_{half}": 2.0 * D * config.ffn_dim for half in halves}
    products |= {"router": 2.0 * D * E, **{f"expert_{half}": 2.0 * D * A * config.expert_ffn_dim for half in halves}}
    shared = {f"ffn_{half}": 2.0 * D * config.shared_ffn_dim for half in halves} if config.shared_ffn_dim else {}
    return products | shared


def _projections(config: ModelConfig) -> dict[str, int]:
    """Sizes of attention's matrices."""
    D, N, K, H, R = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.kv_rank
    W, turning = config.value_dim or H, config.rope_dim
    if not R:
        return {"query": D * N * H, "key": D * K * H, "value": D * K * H, "attention_out": N * H * D}
    down = {"query_down": D * config.q_rank} if config.q_rank else {}
    return down | {
        "query": (config.q_rank or D) * N * H, "key_value_down": D * R, "key_rope": D * turning,
        "key": R * N * (H - turning), "value": R * N * W, "attention_out": N * W * D,
    }  # fmt: skip


def recomputed_products(config: ModelConfig, *, dense: bool) -> Counter[str]:
    """How often backward runs each product of a layer's forward again, under `config.remat` and its kernels.

    A product runs again where backward needs its result, or what only its result leads to, and neither is kept.
    """
    flash, again = config.kernel == "pallas", Counter[str]()
    again["scores"] += flash  # the backward kernel has the log-sum-exp, and makes logits anew
    if not dense:
        again.update(("expert_gate", "expert_up"))  # model/experts.py keeps their input alone
    if config.remat == "none":
        return again
    kept = {*KEPT[config.remat], *config.remat_save, *config.remat_offload}
    if not (flash and {"attention_out", "attention_lse"} <= kept):
        again.update(("scores", "mix"))  # plain attention keeps its weights, which have no name
    if not dense and config.post_norms:
        again.update(("expert_gate", "expert_up", "expert_down"))
    if config.remat == "dots":  # everything that follows is a product without batch dims
        return again
    lost = {"query", "key", "value", "ffn_gate", "ffn_up"} - kept
    if config.qk_norm:
        lost |= {"query", "key"}  # the norm stands between the product and the name
    if config.kv_rank:
        lost |= {"query_down", "key_value_down"} | ({"key_rope"} if "key" in lost else set())
    if "middle" not in kept or config.post_norms:
        lost.add("attention_out")
    if config.post_norms:
        lost.add("ffn_down")
    again.update(lost & layer_products(config, 0, dense=dense).keys() | (set() if dense else {"router"}))
    return again


def recomputed_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs a token of a training step besides `train_flops`: all that is computed more than once."""
    total = 0.0
    for layer, kind in enumerate(config.layer_kinds):
        dense = not config.num_experts or layer < config.num_dense_layers
        keys = _pairs(seq_len, 0, config.window if kind == "window" else None) / seq_len
        products = layer_products(config, keys, dense=dense)
        total += sum(products[name] * times for name, times in recomputed_products(config, dense=dense).items())
    return total


def prefill_flops(config: ModelConfig, length: int) -> int:
    """FLOPs of reading one prompt; the last token alone goes through the unembedding."""
    return forward_flops(config, length, logits=1)


def decode_flops(config: ModelConfig, past: int) -> int:
    """FLOPs of one more token after `past` ones."""
    return forward_flops(config, 1, past, logits=1)


def decode_bytes(config: ModelConfig, past: int, *, batch: int, weight_bytes: int, cache_bytes: int) -> int:
    """Bytes moved by one decode step of `batch` sequences after `past` tokens each; sizes are of one number."""
    D, is_learned = config.embed_dim, config.positions == "learned"
    by_row = (0 if config.tied else config.vocab_size) + (config.max_length if is_learned else 0)  # never read whole
    rows = batch * (2 if is_learned else 1)
    unread = _layers(config, config.num_experts) - _layers(
        config, min(config.num_experts, batch * config.experts_per_token)
    )
    parameters = num_parameters(config) - unread + (rows - by_row) * D
    return weight_bytes * parameters + cache_bytes * batch * _cache_numbers(config, past)


def _cache_numbers(config: ModelConfig, past: int) -> int:
    """Keys and values read (the new ones included) and written, over all layers."""
    return 2 * config.num_kv_heads * config.head_dim * (visible_keys(config, 1, past) + config.num_layers)


def cache_bytes_per_token(config: ModelConfig, *, cache_bytes: int) -> int:
    """Bytes of the keys and values of one token, over all layers."""
    return 2 * config.num_kv_heads * config.head_dim * config.num_layers * cache_bytes


def cache_bytes(
    config: ModelConfig, length: int, *, number_bytes: float | int, rolling: bool, latent: bool
) -> float | int:
    """Bytes of a sequence's keys and values. Our memories hold all tokens of all layers, and full heads of MLA.

    Other stacks may be `rolling`, so that a window layer holds its window alone, and hold the `latent` of MLA and what
    turns with the position, which all heads share.
    """
    numbers = 2 * config.num_kv_heads * config.head_dim
    if latent and config.kv_rank:
        numbers = config.kv_rank + config.rope_dim
    window = min(length, config.window or length) if rolling else length
    tokens = sum(window if kind == "window" else length for kind in config.layer_kinds)
    return number_bytes * numbers * tokens


def kept_bytes(config: ModelConfig, *, dense: bool, number_bytes: int) -> int:
    """Bytes that one layer keeps for its backward pass, a token, where `config.remat` keeps by name.

    The layer's input, and what is named; the log-sum-exp is float32 and attention's kernel alone has it. ValueError for
    `dots` and `none`, which keep whatever XLA finds that it needs.
    """
    if config.remat in ("dots", "none"):
        raise ValueError(
            f"remat={config.remat} keeps results that have no name; minimal, attention and full are counted"
        )
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    F = config.ffn_dim if dense else config.shared_ffn_dim
    widths = {
        "query": N * H, "key": K * H, "value": K * H, "attention_out": N * H, "middle": config.embed_dim,
        "ffn_gate": F * config.gated, "ffn_up": F,
    }  # fmt: skip
    kept = {*KEPT[config.remat], *config.remat_save} - set(config.remat_offload)
    lse = 4 * N if config.kernel == "pallas" and "attention_lse" in kept else 0
    return number_bytes * (config.embed_dim + sum(width for name, width in widths.items() if name in kept)) + lse
