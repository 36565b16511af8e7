"""Counts of an encoder–decoder: parameters and FLOPs, by the conventions of model/cost.py. Imports no jax."""

from model.seq2seq_config import GATES, Seq2SeqConfig


def source_flops(config: Seq2SeqConfig, length: int | float) -> float | int:
    """FLOPs of the encoder a source token, in a source of so many; what the decoder prepares of it included."""
    D, U, L = config.embed_dim, config.recurrent_dim, config.num_layers
    if not config.is_recurrent:
        own = L * (_heads(config) + 4 * config.num_heads * config.head_dim * length + 4 * D * config.ffn_dim)
        return own + L * _heads(config) / 2  # keys and values of cross-attention
    ways, J = 2 if config.bidirectional else 1, GATES[config.cell]
    width = U // ways
    layers = sum(ways * 2 * J * width * ((D if l == 0 else U) + width) for l in range(L))
    keys = 2 * U * U if config.kind == "attention" and config.score != "dot" else 0
    return layers + keys


def target_flops(config: Seq2SeqConfig, length: int | float, source: int | float) -> float | int:
    """FLOPs of the decoder a target token, in a target of so many, of a source of so many; the unembedding included."""
    looks = 0.0
    if not config.is_recurrent:
        looks = 4 * config.num_layers * config.num_heads * config.head_dim * ((length + 1) / 2 + source)
    elif config.kind == "attention":
        looks = 4 * source * config.recurrent_dim
    return 2 * step_weights(config) + looks


def step_weights(config: Seq2SeqConfig) -> int:
    """Parameters that a decoder's step multiplies by: what it reads of them, however large the batch."""
    D, U, L, V = config.embed_dim, config.recurrent_dim, config.num_layers, config.vocab_size
    if not config.is_recurrent:
        return L * (3 * _heads(config) // 4 + 2 * D * config.ffn_dim) + V * D  # self-attention, and half of the cross
    J, reads = GATES[config.cell], config.kind == "fixed" or config.score == "additive"
    layers = sum(J * U * ((D if l == 0 else U) + U) for l in range(L))
    context = 0 if config.kind == "fixed" else J * U * U if reads else J * U * D * config.input_feeding
    query = U * U * (config.kind == "attention" and config.score in ("additive", "local"))
    return layers + context + query + D * (2 * U + D * reads) + V * D


def _heads(config: Seq2SeqConfig) -> int:
    """FLOPs of the four matrices of one multi-head attention."""
    return 2 * 4 * config.embed_dim * config.num_heads * config.head_dim


def train_flops(config: Seq2SeqConfig, source: int | float, target: int | float) -> float | int:
    """FLOPs of training a target token, forward and backward, on pairs of these mean lengths."""
    return 3 * (source_flops(config, source) * source / target + target_flops(config, target, source))


def step_state(config: Seq2SeqConfig, length: int | float, source: int | float) -> float | int:
    """Numbers that a decoder's step reads of what one sequence carries: states, or keys and values."""
    if not config.is_recurrent:
        return 2 * config.num_layers * config.num_heads * config.head_dim * (length + source)
    own = config.num_layers * config.recurrent_dim * (2 if config.cell == "lstm" else 1)
    if config.kind == "fixed":
        return own + config.recurrent_dim
    return own + (1 if config.score == "dot" else 2) * source * config.recurrent_dim


def step_intensity(
    config: Seq2SeqConfig, length: int, source: int, *, batch: int, number_bytes: int = 4
) -> float | int:
    """FLOPs a byte of a decoder's step of `batch` sequences, `length` tokens after each one's beginning."""
    numbers = step_weights(config) + batch * step_state(config, length, source)
    return batch * target_flops(config, 2 * length, source) / (number_bytes * numbers)
