"""The encoder–decoder: embeddings, one of three pairs of encoder and decoder, unembedding. Knows no loss and no search.

    fixed        one vector c = h_S stands for the source          p(y_t | y_<t, c)        arXiv:1406.1078
    attention    c_t = Σ_s α_ts h_s, sought anew for each token    p(y_t | y_<t, c_t)      arXiv:1409.0473
    transformer  no recurrence: every layer attends                                        arXiv:1706.03762

Training reads known targets at once (`forward`). Decoding has two phases, as the decoder-only model's: `encode` is the
prefill, and each `step` goes on from a state whose every array begins with B, so that beams can be copied and dropped.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from model import rnn, transformer
from model.decoder import output_logits
from model.dropout import Seeds, dropout
from model.layers import Key, look_up, matrix
from model.looks import Looks
from model.seq2seq_config import Seq2SeqConfig
from parallel.sharding import Held


class Seq2Seq(nnx.Module):
    """Holds parameters and static shape only."""

    def __init__(self, config: Seq2SeqConfig, key: Key):
        self.config = config
        source, target, encoder, decoder, head = jax.random.split(key, 5)
        V, D, names = config.vocab_size, config.embed_dim, ("vocab", "embed")
        kind: Any = rnn if config.is_recurrent else transformer
        self.target = matrix(target, (V, D), names, fan_in=D)
        self.source = nnx.data(None)
        if not config.shared:
            self.source = matrix(source, (config.source_vocab_size, D), names, fan_in=D)
        self.encoder, self.decoder = kind.Encoder(config, encoder), kind.Decoder(config, decoder)
        self.head = nnx.data(None) if config.tied else matrix(head, (V, D), names, fan_in=D)

    def forward(
        self, source: Int[Array, "B S"], mask: Float[Array, "B S"], tokens: Int[Array, "B T"], seeds: Seeds | None
    ) -> Float[Array, "B T D"]:
        """Hidden states of known targets, each token knowing those before it; with dropout where rows have seeds."""
        x, y = self._embedded(self.source, source, seeds, 0), self._embedded(self.target, tokens, seeds, 100)
        return self.decoder(self.encoder(x, mask, seeds), y, seeds)

    def looks(self, source: Int[Array, "B S"], mask: Float[Array, "B S"], tokens: Int[Array, "B T"]) -> Looks:
        """What each token of known pairs looks at."""
        read, own = self.encoder.looked(self._embedded(self.source, source, None, 0), mask, None)
        _, looks = self.decoder.looked(read, self._embedded(self.target, tokens, None, 100), None)
        return looks._replace(encoder=own)

    def encode(self, source: Int[Array, "B S"], mask: Float[Array, "B S"]) -> Any:
        """The prefill: what the decoder's steps need of the sources; every array begins with B."""
        return self.decoder.encoded(self.encoder(self._embedded(self.source, source, None, 0), mask, None))

    def start(self, encoded: Any, length: int) -> Any:
        """The state before the first token, with room for `length` tokens; every array begins with B."""
        return self.decoder.start(encoded, length)

    def step(
        self, encoded: Any, state: Any, tokens: Int[Array, "B"]
    ) -> tuple[Float[Array, "B D"], Any, Float[Array, "B *heads S"]]:
        """One token further -> its hidden state, the state after it, and the weights over the source.

        Weights are [B, S] of an RNN (zeros where it has one fixed context), [B, L, N, S] of a Transformer.
        """
        return self.decoder.step(encoded, state, self._embedded(self.target, tokens[:, None], None, 0)[:, 0])

    def _embedded(self, table: nnx.Param | None, tokens: Int[Array, "B T"], seeds: Seeds | None, site: int):
        table = self.target if table is None else table
        x = look_up(table[...], tokens).astype(self.config.compute_dtype) * self.config.embed_dim**0.5
        return dropout(x, self.config.dropout, seeds, site)

    @property
    def unembedding(self) -> Float[Array, "V D"] | Held:
        """The output table, which is the target's embedding where the two are tied."""
        return self.target[...] if self.head is None else self.head[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in float32."""
        return output_logits(hidden, self.unembedding, softcap=None)
