"""The decoder-only transformer: tokens to hidden states to logits, over any memory. Knows no loss and no sampling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from model.attention import Attention
from model.config import ModelConfig
from model.layers import RESIDUAL, TOGETHER, Embedding, FeedForward, Key, Norm, Rope, matrix, names_of, rope
from model.memory import Queries
from ops.slabs import Slabs
from model.remat import rematerialized
from parallel.sharding import einsum, relaid, whole

FOREVER = 2**30  # a window that hides nothing



class Surroundings(NamedTuple):
    """What differs between layers of two kinds: how positions turn and how far back a query sees."""

    rope: Rope | None
    window: Int[Array, ""] | int | None


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x)); Gemma normalises what is added, too."""

    def __init__(self, config: ModelConfig, key: Key):
        attention, ffn = jax.random.split(key)
        self.attention_norm, self.ffn_norm = Norm(config, config.embed_dim), Norm(config, config.embed_dim)
        self.attention, self.ffn = Attention(config, attention), FeedForward(config, ffn)
        self.attention_post_norm = Norm(config, config.embed_dim) if config.post_norms else nnx.data(None)
        self.ffn_post_norm = Norm(config, config.embed_dim) if config.post_norms else nnx.data(None)

    def __call__(self, x: Float[Array, "B t D"], around: Surroundings, queries: Queries, memory):
        with jax.named_scope("attention"):
            y, memory = self.attention(self.attention_norm(x), around.rope, around.window, queries, memory)
            x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
            x = checkpoint_name(x, "middle")
        with jax.named_scope("ffn"):
            y = self.ffn(self.ffn_norm(x))
            return x + (y if self.ffn_post_norm is None else self.ffn_post_norm(y)), memory


def _stack(make: Callable[[Key], nnx.Module], keys: Key) -> Any:
    """One module whose every parameter has a leading L: layer l is made from keys[l]."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(keys[0])))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(key)))(keys))


class Decoder(nnx.Module):
    """Embedding, L blocks, final norm, unembedding. Holds parameters and static shape only."""

    def __init__(self, config: ModelConfig, key: Key):
        self.config = config
        embedding, head, layers = jax.random.split(key, 3)
        keys = jax.random.split(layers, config.num_layers)
        self.embedding = Embedding(config, embedding)
        if config.scan_layers:
            self.layers = _stack(lambda key: Block(config, key), keys)
        else:
            self.layers = nnx.List([Block(config, key) for key in keys])
        self.norm = Norm(config, config.embed_dim)
        shape, names = (config.vocab_size, config.embed_dim), ("vocab", "embed")
        self.head = nnx.data(None) if config.tied else matrix(head, shape, names, fan_in=config.embed_dim)

    def __call__(self, tokens: Int[Array, "B T"], queries: Queries, memory) -> tuple[Float[Array, "B T D"], Any]:
        """-> hidden states after the final norm, and the memory with these tokens in it."""
        with jax.named_scope("embedding"):
            x = gathered(self.embedding)(tokens, queries.positions)
        run = _scanned if self.config.scan_layers else _unrolled
        x, memory = run(self.config, self.layers, x, queries, memory)
        return relaid(self.norm(x), RESIDUAL, TOGETHER), memory

    @property
    def unembedding(self) -> Float[Array, "V D"] | Slabs:
        """The output table, which is the embedding's where the two are tied."""
        return self.embedding.tokens[...] if self.head is None else self.head[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in float32."""
        with jax.named_scope("head"):
            return output_logits(hidden, self.unembedding, softcap=self.config.final_softcap)


def output_logits(
    hidden: Float[Array, "B T D"], unembedding: Float[Array, "V D"] | Slabs, *, softcap: float | None
) -> Float[Array, "B T V"]:
    """Float32 logits of hidden states, capped to ±softcap by tanh where one is given."""
    logits = einsum("BTD,VD->BTV", hidden, unembedding, out=("batch", "seq", "act_vocab")).astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def gathered(module: nnx.Module) -> Any:
    """The module with its parameters gathered over the axes that split tokens; the scatter of gradients is its twin."""
    graphdef, state = nnx.split(module)
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return nnx.merge(
        graphdef, jax.tree.map(lambda leaf: leaf.replace(whole(leaf[...], names_of(leaf))), state, is_leaf=is_variable)
    )


def _surroundings(config: ModelConfig, queries: Queries) -> dict[str, Surroundings]:
    """For each kind of layer the config has."""
    if config.positions == "learned":
        turn = local = None
    else:
        turn = rope(queries.positions, config.head_dim, config.rope_theta, config.rope_scaling)
        local = turn
        if config.rope_local_theta is not None:
            plain = type(config.rope_scaling)()
            local = rope(queries.positions, config.head_dim, config.rope_local_theta, plain)
    both = {"global": Surroundings(turn, None), "window": Surroundings(local, config.window)}
    return {kind: both[kind] for kind in sorted(set(config.layer_kinds))}


def _unrolled(config: ModelConfig, layers, x, queries: Queries, memory):
    """L copies of the layer: slower to compile, no slicing of stacked weights."""
    around = _surroundings(config, queries)
    block = rematerialized(lambda block, *rest: gathered(block)(*rest), config)
    after = []
    memories = memory if isinstance(memory, tuple) else (memory,) * config.num_layers
    for layer, kind, mine in zip(layers, config.layer_kinds, memories, strict=True):
        x, mine = block(layer, x, around[kind], queries, mine)
        after.append(mine)
    return x, tuple(after)


def _scanned(config: ModelConfig, layers, x, queries: Queries, memory):
    """One compiled layer, looped. Where layers differ in kind, the kind is data that each turn selects by."""
    around = _surroundings(config, queries)
    graphdef, state = nnx.split(layers)
    is_window = jnp.asarray([kind == "window" for kind in config.layer_kinds])

    def body(x, turn):
        state, mine, is_window = turn
        block = gathered(nnx.merge(graphdef, state))
        if len(around) == 1:
            (mine_around,) = around.values()
        else:
            mine_around = _choose(is_window, around["window"], around["global"])
        return block(x, mine_around, queries, mine)

    return jax.lax.scan(rematerialized(body, config), x, (state, memory, is_window), length=config.num_layers)


def _choose(is_window, window: Surroundings, everything: Surroundings) -> Surroundings:
    """Surroundings of a layer whose kind is known only when the loop runs."""
    everything = everything._replace(window=FOREVER)
    return jax.tree.map(lambda a, b: jnp.where(is_window, a, b), window, everything)
