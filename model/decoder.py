"""The decoder-only transformer: tokens to hidden states to logits, over any memory. Knows no loss and no sampling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from model.attention import Attention
from model.config import ModelConfig
from model.latent_attention import LatentAttention
from model.layers import RESIDUAL, TOGETHER, Embedding, FeedForward, Key, Norm, Rope, matrix, names_of, rope
from model.memory import Queries
from model.moe import Aux, MoE
from model.remat import rematerialized
from parallel.sharding import Held, einsum, everywhere, relaid, whole

FOREVER = 2**30  # a window that hides nothing


class Surroundings(NamedTuple):
    """What differs between layers of two kinds: how positions turn and how far back a query sees."""

    rope: Rope | None
    window: Int[Array, ""] | int | None


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x)); Gemma normalises what is added, too.

    The third of what it returns is what its experts tell of themselves, None where it has none.
    """

    def __init__(self, config: ModelConfig, key: Key, *, dense: bool):
        attention, ffn = jax.random.split(key)
        self.attention_norm, self.ffn_norm = Norm(config, config.embed_dim), Norm(config, config.embed_dim)
        self.attention = LatentAttention(config, attention) if config.kv_rank else Attention(config, attention)
        self.ffn = FeedForward(config, ffn) if dense else MoE(config, ffn)
        self.attention_post_norm = Norm(config, config.embed_dim) if config.post_norms else nnx.data(None)
        self.ffn_post_norm = Norm(config, config.embed_dim) if config.post_norms else nnx.data(None)

    def __call__(self, x: Float[Array, "B t D"], around: Surroundings, queries: Queries, memory):
        with jax.named_scope("attention"):
            y, memory = self.attention(self.attention_norm(x), around.rope, around.window, queries, memory)
            x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
            x = checkpoint_name(x, "middle")
        with jax.named_scope("ffn"):
            y, aux = self.ffn_norm(x), None
            if isinstance(self.ffn, MoE):
                y, aux = self.ffn(y, queries.segments > 0)
            else:
                y = self.ffn(y)
            return x + (y if self.ffn_post_norm is None else self.ffn_post_norm(y)), memory, aux


def stacked(make: Callable[[Key], nnx.Module], keys: Key) -> Any:
    """One module whose every parameter has a leading L: layer l is made from keys[l]."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(keys[0])))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(key)))(keys))


def _list(make: Callable[[Key], nnx.Module], keys: Key) -> Any:
    """The same modules one by one."""
    return nnx.List([make(key) for key in keys])


class Decoder(nnx.Module):
    """Embedding, L blocks, final norm, unembedding. Holds parameters and static shape only.

    Where the first layers have a dense FFN and the others experts, they are two stacks, one after the other.
    """

    def __init__(self, config: ModelConfig, key: Key):
        self.config = config
        embedding, head, layers = jax.random.split(key, 3)
        keys = jax.random.split(layers, config.num_layers)
        self.embedding = Embedding(config, embedding)
        first, make = config.num_dense_layers, stacked if config.scan_layers else _list
        self.dense_layers = make(lambda key: Block(config, key, dense=True), keys[:first]) if first else nnx.data(None)
        self.layers = make(lambda key: Block(config, key, dense=not config.num_experts), keys[first:])
        self.norm = Norm(config, config.embed_dim)
        shape, names = (config.vocab_size, config.embed_dim), ("vocab", "embed")
        self.head = nnx.data(None) if config.tied else matrix(head, shape, names, fan_in=config.embed_dim)

    def __call__(self, tokens: Int[Array, "B T"], queries: Queries, memory) -> tuple[Float[Array, "B T D"], Any]:
        """-> hidden states after the final norm, and the memory with these tokens in it."""
        x, memory, _ = self.forward(tokens, queries, memory)
        return x, memory

    def forward(
        self, tokens: Int[Array, "B T"], queries: Queries, memory
    ) -> tuple[Float[Array, "B T D"], Any, Aux | None]:
        """The same and, stacked over the layers that have experts, what these tell of themselves."""
        x = self.embed(tokens, queries)
        stacks = [stack for stack in (self.dense_layers, self.layers) if stack is not None]
        run = _scanned if self.config.scan_layers else _unrolled
        x, memory, aux = run(self.config, stacks, x, queries, memory)
        return self.finish(x), memory, aux

    def embed(self, tokens: Int[Array, "B T"], queries: Queries) -> Float[Array, "B t D"]:
        """What the first layer gets, laid out as RESIDUAL."""
        with jax.named_scope("embedding"):
            return self.embedding(tokens, queries.positions)

    def finish(self, x: Float[Array, "B t D"]) -> Float[Array, "B T D"]:
        """The last layer's result after the final norm."""
        return relaid(self.norm(x), RESIDUAL, TOGETHER)

    @property
    def unembedding(self) -> Float[Array, "V D"] | Held:
        """The output table, which is the embedding's where the two are tied."""
        return self.embedding.tokens[...] if self.head is None else self.head[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in float32."""
        with jax.named_scope("head"):
            return output_logits(hidden, self.unembedding, softcap=self.config.final_softcap)


def output_logits(
    hidden: Float[Array, "B T D"], unembedding: Float[Array, "V D"] | Held, *, softcap: float | None
) -> Float[Array, "B T V"]:
    """Float32 logits of hidden states, capped to ±softcap by tanh where one is given."""
    logits = einsum("BTD,VD->BTV", hidden, unembedding, out=("batch", "seq", "act_vocab")).astype(jnp.float32)
    return capped(logits, softcap)


def capped(logits: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """Output logits bent into ±softcap by tanh, where one is given (Gemma 2, arXiv:2408.00118, section 2)."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def gathered(module: nnx.Module) -> Any:
    """The module with its parameters gathered over the axes that split tokens; the scatter of gradients is its twin."""
    if not everywhere():
        return module
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
        turn = rope(queries.positions, config.rotary_dim, config.rope_theta, config.rope_scaling)
        local = turn
        if config.rope_local_theta is not None:
            plain = type(config.rope_scaling)()
            local = rope(queries.positions, config.rotary_dim, config.rope_local_theta, plain)
    both = {"global": Surroundings(turn, None), "window": Surroundings(local, config.window)}
    return {kind: both[kind] for kind in sorted(set(config.layer_kinds))}


def _unrolled(config: ModelConfig, stacks, x, queries: Queries, memory):
    """L copies of the layer: slower to compile, no slicing of stacked weights."""
    around = _surroundings(config, queries)
    block = rematerialized(lambda block, *rest: gathered(block)(*rest), config)
    layers = [layer for stack in stacks for layer in stack]
    after, told = [], []
    memories = memory if isinstance(memory, tuple) else (memory,) * config.num_layers
    for layer, kind, mine in zip(layers, config.layer_kinds, memories, strict=True):
        x, mine, aux = block(layer, x, around[kind], queries, mine)
        after.append(mine)
        told += [] if aux is None else [aux]
    return x, tuple(after), jax.tree.map(lambda *leaves: jnp.stack(leaves), *told) if told else None


def _scanned(config: ModelConfig, stacks, x, queries: Queries, memory):
    """One compiled layer for each stack, looped."""
    kinds, first = window_layers(config), config.num_dense_layers
    if not first:
        return looped(config, stacks[0], kinds, x, queries, memory)
    after, aux = [], None
    for stack, part in zip(stacks, (slice(0, first), slice(first, None)), strict=True):
        mine = jax.tree.map(lambda leaf, part=part: leaf[part], memory)
        x, mine, aux = looped(config, stack, kinds[part], x, queries, mine)
        after.append(mine)
    return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *after), aux


def window_layers(config: ModelConfig) -> Bool[Array, "L"]:
    """Which layers see a window only."""
    return jnp.asarray([kind == "window" for kind in config.layer_kinds])


def looped(config: ModelConfig, layers, is_window: Bool[Array, "L"], x, queries: Queries, memory):
    """One compiled layer over a stack of them. Where layers differ in kind, each turn selects by `is_window`."""
    graphdef, state = nnx.split(layers)
    around = _surroundings(config, queries)

    def body(x, turn):
        state, mine, is_window = turn
        block = gathered(nnx.merge(graphdef, state))
        if len(around) == 1:
            (mine_around,) = around.values()
        else:
            mine_around = _choose(is_window, around["window"], around["global"])
        x, mine, aux = block(x, mine_around, queries, mine)
        return x, (mine, aux)

    x, (memory, aux) = jax.lax.scan(rematerialized(body, config), x, (state, memory, is_window))
    return x, memory, aux


def _choose(is_window, window: Surroundings, everything: Surroundings) -> Surroundings:
    """Surroundings of a layer whose kind is known only when the loop runs."""
    everything = everything._replace(window=FOREVER)
    return jax.tree.map(lambda a, b: jnp.where(is_window, a, b), window, everything)
