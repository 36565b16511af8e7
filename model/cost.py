"""Counts of a decoder: parameters, FLOPs, bytes. Pure arithmetic on the config; knows no chip and imports no jax.

Conventions, one for the whole house:
- Only matmuls count, two FLOPs a multiply-add. Embedding look-ups, norms, softmax and rotations are left out.
- A query's attention counts the keys that it may see, its own included: a causal sequence of T tokens costs
  T (T + 1) / 2 pairs, half of the full square, whatever a kernel computes beyond that; a window layer at most `window`
  keys a query.
- Training is three times the forward (arXiv:2001.08361, section 2.1). What remat computes again is not counted, so
  that these are the model's FLOPs of MFU (arXiv:2204.02311, appendix B), not the hardware's.
- Bytes of a decode step: every parameter that the step multiplies by is read once, however large the batch; every
  visible key and value is read once a sequence, and one of each is written. Activations are left out.
"""

from model.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """All parameters, a tied table counted once."""
    D, V = config.embed_dim, config.vocab_size
    positions = config.max_length * D if config.positions == "learned" else 0
    head = 0 if config.tied else V * D
    return V * D + positions + head + config.num_layers * _layer_parameters(config) + _norm_parameters(config, D)


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that every token multiplies by: all matrices, and the unembedding, which may be the tied table."""
    return config.num_layers * _layer_matrices(config) + config.vocab_size * config.embed_dim


def _layer_matrices(config: ModelConfig) -> int:
    D, N, K, H, F = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_dim
    return D * H * (N + 2 * K) + N * H * D + (3 if config.gated else 2) * D * F


def _layer_parameters(config: ModelConfig) -> int:
    D, N, K, H, F = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_dim
    biases = config.qkv_bias * H * (N + 2 * K) + config.out_bias * D + config.ffn_bias * (F + D)
    norms = (4 if config.post_norms else 2) * _norm_parameters(config, D)
    qk_norms = 2 * _norm_parameters(config, H) if config.qk_norm else 0
    return _layer_matrices(config) + biases + norms + qk_norms


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
    matrices = 2 * config.num_layers * _layer_matrices(config) * new
    attention = 4 * config.num_heads * config.head_dim * visible_keys(config, new, past)
    return matrices + attention + 2 * config.vocab_size * config.embed_dim * logits


def train_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs a token of a training step on sequences of `seq_len` tokens, forward and backward."""
    return 3 * forward_flops(config, seq_len, logits=seq_len) / seq_len


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
    parameters = num_parameters(config) + (rows - by_row) * D
    return weight_bytes * parameters + cache_bytes * batch * _cache_numbers(config, past)


def _cache_numbers(config: ModelConfig, past: int) -> int:
    """Keys and values read (the new ones included) and written, over all layers."""
    return 2 * config.num_kv_heads * config.head_dim * (visible_keys(config, 1, past) + config.num_layers)


def cache_bytes_per_token(config: ModelConfig, *, cache_bytes: int) -> int:
    """Bytes of the keys and values of one token, over all layers."""
    return 2 * config.num_kv_heads * config.head_dim * config.num_layers * cache_bytes
