"""What a device computes of a batch: its share of the loss, and how its experts were used. Knows no optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data.packing import Batch
from data.pair_batches import PairBatch
from model.config import ModelConfig
from model.decoder import Decoder
from model.dropout import Seeds
from model.moe import Aux
from model.seq2seq import Seq2Seq
from parallel.sharding import num_copies, whole
from training.config import TrainConfig
from training.losses import Loss, chunked_token_loss, smoothing, vocabulary_loss

Scale = float | Float[Array, ""]  # one over the number of tokens for a mean, 1 for a sum


def _by_tokens(hidden, table, targets, mask, chunk, softcap, z_loss) -> Loss:
    table, chunk = whole(table, ("vocab", "embed")), min(chunk, hidden.shape[1])
    return chunked_token_loss(hidden, table, targets, mask, chunk, softcap, z_loss)


LOSSES: dict[str, Any] = {"tokens": _by_tokens, "vocabulary": vocabulary_loss}


class Outcome(NamedTuple):
    """A device's share of what a batch gives: sums that add up over devices."""

    total: Float[Array, ""]  # what is differentiated
    nll: Float[Array, ""]  # negative log-likelihood, in nats; carries no gradient
    load: Float[Array, "L E"] | None  # tokens that chose each expert, by layer

    def plus(self, aux: Aux | None, config: ModelConfig, scale: Scale) -> "Outcome":
        """And what the layers' experts tell of themselves, [..., l, ...]."""
        if aux is None:
            return self
        load = aux.load.reshape(-1, config.num_experts)
        return self._replace(total=self.total + expert_losses(aux, config, scale), load=load)


def batch_outcome(
    decoder: Decoder, hidden: Float[Array, "B T D"], batch: Batch, how: TrainConfig, *, scale: Scale
) -> Outcome:
    """Cross-entropy of hidden states, `scale` times its sum over tokens."""
    return _outcome(hidden, decoder.unembedding, batch, how, softcap=decoder.config.final_softcap, scale=scale)


def pair_outcome(model: Seq2Seq, batch: PairBatch, seeds: Seeds | None, how: TrainConfig, *, scale: Scale) -> Outcome:
    """Cross-entropy of the targets of pairs, likewise."""
    source, mask, tokens = (jnp.asarray(x) for x in (batch.source, batch.source_mask, batch.tokens))
    hidden = model.forward(source, mask, tokens, seeds)
    return _outcome(hidden, model.unembedding, batch, how, softcap=None, scale=scale)


def _outcome(hidden, table, batch: Batch | PairBatch, how: TrainConfig, *, softcap: float | None, scale: Scale):
    with jax.named_scope("loss"):
        share, targets = jnp.asarray(batch.mask) * scale / num_copies(), jnp.asarray(batch.targets)
        loss: Loss = LOSSES[how.loss](hidden, table, targets, share, how.loss_chunk, softcap, how.z_loss)
        total = loss.total
        if how.label_smoothing:
            total += how.label_smoothing * smoothing(hidden, whole(table, ("vocab", "embed")), targets, share)
    return Outcome(total, loss.nll, None)


def expert_losses(aux: Aux | None, config: ModelConfig, scale: Scale) -> Float[Array, ""]:
    """What unevenly used experts and large router logits cost: `scale` times a sum over tokens, a mean over layers."""
    if aux is None:
        return jnp.float32(0)
    weighted = config.balance_loss * jnp.sum(aux.balance) + config.router_z_loss * jnp.sum(aux.router_z)
    return weighted * scale / (config.num_layers - config.num_dense_layers)
