"""Tiny encoder–decoders of every kind, and a batch of pairs of different lengths."""

import jax
import numpy as np
from flax import nnx

from data.pair_batches import PairBatch
from model import parameters
from model.seq2seq_config import Seq2SeqConfig

V, S, T = 64, 8, 8
SIZES = {"vocab_size": V, "source_vocab_size": V, "embed_dim": 16, "max_length": 16}
KINDS = {
    "fixed": {"kind": "fixed", "recurrent_dim": 16},
    "fixed-lstm-reversed": {
        **{"kind": "fixed", "recurrent_dim": 16, "cell": "lstm", "num_layers": 2},
        **{"bidirectional": False, "reversed_source": True},
    },
    "additive": {"kind": "attention", "recurrent_dim": 16},
    "additive-lstm": {"kind": "attention", "recurrent_dim": 16, "cell": "lstm", "num_layers": 2},
    "dot": {"kind": "attention", "recurrent_dim": 16, "score": "dot"},
    "general-fed": {"kind": "attention", "recurrent_dim": 16, "score": "general", "input_feeding": True},
    "local": {"kind": "attention", "recurrent_dim": 16, "score": "local", "window": 2},
    "local-fed": {"kind": "attention", "recurrent_dim": 16, "score": "local", "window": 2, "input_feeding": True},
    "transformer": {"kind": "transformer", "num_layers": 2, "num_heads": 4, "head_dim": 4, "ffn_dim": 32},
    "relative": {
        **{"kind": "transformer", "num_layers": 2, "num_heads": 4, "head_dim": 4, "ffn_dim": 32},
        **{"positions": "relative", "num_distances": 8, "max_distance": 16},
    },
}


def config_of(kind: str, **changes) -> Seq2SeqConfig:
    """A tiny model of that kind."""
    return Seq2SeqConfig(**{**SIZES, **KINDS[kind], **changes})


def weights_of(config: Seq2SeqConfig, seed: int = 0) -> dict:
    """Its initial parameters."""
    model = parameters.MODULES[Seq2SeqConfig](config, jax.random.key(seed))
    return nnx.to_pure_dict(nnx.state(model))


def pairs(num: int, seed: int = 0, *, width: int = S) -> PairBatch:
    """`num` pairs of random lengths."""
    rng = np.random.default_rng(seed)
    sources, targets = rng.integers(2, width + 1, (2, num))
    at = np.arange(width)[None]
    source_mask, mask = ((at < lengths[:, None]).astype(np.float32) for lengths in (sources, targets))
    source, tokens, after = rng.integers(2, V, (3, num, width)).astype(np.int32)
    whole = mask.astype(np.int32)
    return PairBatch(source * source_mask.astype(np.int32), source_mask, tokens * whole, after * whole, mask)
