"""Attention maps: how much every head takes of every key for every query. Knows no pictures and no words.

Any model can be asked, because a memory is a type with one method: `Recorded` answers as `Packed` does and keeps what
it computed on the way.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from evals.reading import read
from inference.steps import Program, whole_rows
from inference.weights import Model
from model.memory import Queries, Rule
from model.parameters import Parameters, decoder
from ops import reference
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from parallel.sharding import use


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """What the heads of one layer look at: rows are queries, and what a row takes of all keys sums to 1."""

    title: str  # such as "layer 3"
    weights: Float[np.ndarray, "N T S"]
    queries: tuple[str, ...]  # T labels
    keys: tuple[str, ...]  # S labels

    def __post_init__(self):
        _, T, S = self.weights.shape
        if (T, S) != (len(self.queries), len(self.keys)):
            raise ValueError(
                f"{self.title}: weights are for {T} queries and {S} keys but {len(self.queries)} and "
                f"{len(self.keys)} have labels; give one label each"
            )

    @property
    def is_of_itself(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.queries == self.keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded:
    """A memory whose keys are the batch itself, as Packed's; after attention it holds the weights."""

    weights: Float[Array, "... B N T S"] | None = None

    def attend(self, q, k, v, queries: Queries, rule: Rule):
        """Causal attention inside each document of a row, in the slow and plain way."""
        at, of, (scale, softcap, window) = queries.positions, queries.segments, rule
        mask = reference.visible(at, at, of, of, window=window)
        weights = reference.attention_weights(q, k, mask, scale=scale, softcap=softcap)
        return reference.weighted(weights, v), Recorded(weights)


def decoder_maps(model: Model, text: str) -> list[AttentionMap]:
    """A map for each layer of a decoder that reads the text; its weights are loaded for that."""
    tokens, labels = read(model.tokenizer, text)[:2]
    if len(tokens) > model.config.max_length:
        raise ValueError(
            f"the text is {len(tokens)} tokens long but the model's context is {model.config.max_length}; shorten it"
        )
    mesh, rules = make_mesh(MeshConfig(data=1), jax.devices()[:1]), AxisRules()
    program = Program(model.config, mesh, rules, model.tokenizer.vocab_size)
    asked = jnp.asarray([tokens], jnp.int32)
    _, layers = recorded(model.load(mesh, rules), asked, program=program)
    return [
        AttentionMap(title=f"layer {at}", weights=weights, queries=labels, keys=labels)
        for at, weights in enumerate(np.asarray(layers))
    ]


@functools.partial(jax.jit, static_argnames="program")
def recorded(
    parameters: Parameters, tokens: Int[Array, "1 T"], *, program: Program
) -> tuple[Float[Array, "1 T D"], Float[Array, "L N T S"]]:
    """-> the hidden states of a text, and every layer's weights. The program's layers are apart."""
    with use(program.mesh, program.rules):
        hidden, layers = decoder(program.config, parameters)(tokens, whole_rows(tokens), Recorded())
        return hidden, rearrange([layer.weights for layer in layers], "L 1 N T S -> L N T S")


def mean_of_heads(maps: Sequence[AttentionMap], title: str) -> AttentionMap:
    """One map with one head: the mean over all heads of maps that have the same labels."""
    first, *others = maps
    if any((other.queries, other.keys) != (first.queries, first.keys) for other in others):
        raise ValueError(f"{title}: the maps have different labels; take the mean of maps of one text only")
    every = np.concatenate([map.weights for map in maps])
    return dataclasses.replace(first, title=title, weights=np.mean(every, axis=0, keepdims=True))


def without_first(map: AttentionMap) -> AttentionMap:
    """What queries take of all keys but the first, where heads with nothing to look for rest (arXiv:2309.17453).

    Of tokens that look at themselves the first query goes, too: it has nothing else to see.
    """
    start = 1 if map.is_of_itself else 0
    weights = map.weights[:, start:, 1:]
    total = np.sum(weights, axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return AttentionMap(title=map.title, weights=weights, queries=map.queries[start:], keys=map.keys[1:])


def first_share(map: AttentionMap) -> Float[np.ndarray, "N"]:
    """How much of each head's weight goes to the first key: the mean over queries that see more than it."""
    return np.mean(map.weights[:, 1:, 0], axis=-1)
