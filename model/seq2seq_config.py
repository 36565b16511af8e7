"""The shape of an encoder–decoder: one frozen record for the three steps of the lineage. Imports no jax."""

import dataclasses
from typing import Literal

from model.config import ModelConfig
from parallel.records import require

Seq2SeqKind = Literal["fixed", "attention", "transformer"]
CellKind = Literal["gru", "lstm"]
ScoreKind = Literal["additive", "dot", "general", "local"]
GATES: dict[CellKind, int] = {"gru": 3, "lstm": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """Shape of an encoder–decoder. Single letters are the alphabet in docs/notation.md."""

    kind: Seq2SeqKind  # RNNs joined by one fixed vector | RNNs, attention over all encoder states | self-attention
    vocab_size: int = 0  # V, tokens of the target; 0 takes the tokenizer's, rounded up to a multiple of 64
    source_vocab_size: int = 0  # tokens of the source, likewise
    shared: bool = True  # one embedding table for both languages; needs data.shared
    tied: bool = True  # the unembedding is the target's embedding table
    embed_dim: int  # D, width of an embedding, and of the Transformer
    max_length: int  # longest source and longest target in tokens, the one that ends it included
    num_layers: int = 1  # L, layers of the encoder, and of the decoder
    dropout: float = 0.0  # share of a layer's outputs left out in training (arXiv:1207.0580)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls; parameters stay float32
    # fixed and attention
    recurrent_dim: int = 0  # U, width of a recurrent state
    cell: CellKind = "gru"  # gru (arXiv:1406.1078) or lstm (arXiv:1409.3215)
    bidirectional: bool = True  # the source is read both ways, half of U each (arXiv:1409.0473, section 3.2)
    reversed_source: bool = False  # one way alone, from the last token to the first (arXiv:1409.3215, section 3.3)
    score: ScoreKind = "additive"  # additive (arXiv:1409.0473); dot, general, local (arXiv:1508.04025)
    input_feeding: bool = False  # dot, general, local: the last attentional state is read, too (section 3.3)
    window: int = 10  # local: source tokens seen on each side of the predicted place
    # transformer
    num_heads: int = 0  # N, heads of every attention
    head_dim: int = 0  # H, width of one head
    ffn_dim: int = 0  # F, width inside the FFN
    positions: Literal["sinusoidal", "relative"] = "sinusoidal"  # arXiv:1706.03762, section 3.5 | T5's biases
    num_distances: int = 32  # relative: buckets of distances (arXiv:1910.10683, section 2.1)
    max_distance: int = 128  # relative: from here on all distances share a bucket

    def __post_init__(self):
        require(self, "model", "dropout", low=0, high=0.9)
        needed = "num_heads head_dim ffn_dim" if self.kind == "transformer" else "recurrent_dim"
        require(self, "model", f"embed_dim max_length num_layers window num_distances {needed}", low=1)
        _check_recurrent(self)
        if self.shared and self.source_vocab_size not in (0, self.vocab_size):
            raise ValueError(
                f"model.source_vocab_size={self.source_vocab_size} differs from model.vocab_size={self.vocab_size}; "
                "model.shared=true is one table for both languages: leave it 0, or take model.shared=false"
            )

    @property
    def is_recurrent(self) -> bool:
        """Whether its layers are recurrent."""
        return self.kind != "transformer"

    @property
    def attends_in_scan(self) -> bool:
        """Whether a step of the recurrence needs the context: then attention cannot wait till all states are there."""
        return self.kind == "attention" and (self.score == "additive" or self.input_feeding)

    @property
    def layer(self) -> ModelConfig:
        """What a layer of a decoder-only model of these sizes would be: its norms and FFN are ours, too."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            num_heads=max(self.num_heads, 1),
            num_kv_heads=max(self.num_heads, 1),
            head_dim=max(self.head_dim, 1),
            ffn_dim=max(self.ffn_dim, 1),
            max_length=self.max_length,
            positions="learned",  # ours are not a layer's business
            rope_theta=10_000.0,
            norm="layer",
            norm_eps=1e-5,
            gated=False,
            activation="relu",
            ffn_bias=True,
            compute_dtype=self.compute_dtype,
        )


def _check_recurrent(config: Seq2SeqConfig) -> None:
    """Directions and scores go together."""
    if not config.is_recurrent:
        return
    if config.bidirectional and config.reversed_source:
        raise ValueError(
            "model.bidirectional=true reads the source both ways, so model.reversed_source=true says nothing; "
            "take one of them"
        )
    if config.bidirectional and config.recurrent_dim % 2:
        raise ValueError(
            f"model.recurrent_dim={config.recurrent_dim} is odd; model.bidirectional=true gives each way half of it"
        )
    if config.input_feeding and (config.kind == "fixed" or config.score == "additive"):
        raise ValueError(
            f"model.input_feeding=true does not go with model.kind={config.kind}, score={config.score}, whose context "
            "is read at every step already; take model.score=general"
        )
