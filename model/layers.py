"""Parameters and the layers without memory: norms, embeddings, rotary positions, the FFN. Knows no attention."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig, RopeScaling
from ops.quantized_matmul import quantized_einsum
from parallel.sharding import Held, Names, added, einsum, manual_axes, part_index, place, relaid, token_axes, whole

Key = jax.Array
TOGETHER = ("batch", "seq", "act_embed")  # activations where tokens meet
RESIDUAL = ("batch", "residual_seq", "act_embed")  # between blocks, where every token is on its own


def matrix(key: Key, shape: tuple[int, ...], names: Names, *, fan_in: int, scale: float = 1.0) -> nnx.Param:
    """Normal initial values of standard deviation scale / sqrt(fan_in)."""
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * (scale * fan_in**-0.5), names=names)


def constant(value: float, shape: tuple[int, ...], names: Names) -> nnx.Param:
    """Initial values all equal: biases and norm scales."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), names=names)


def names_of(variable: nnx.Variable) -> Names:
    """Logical names of a parameter's dims, with "layers" in front where it is stacked."""
    names: Names = variable.get_metadata()["names"]
    return ("layers",) * (len(variable.shape) - len(names)) + names


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467, eq. 4) or LayerNorm (arXiv:1607.06450), computed in float32."""

    def __init__(self, config: ModelConfig, dim: int, name: str | None = "act_embed"):
        self.is_layer, self.eps, self.offset = config.norm == "layer", config.norm_eps, float(config.norm_zero_centered)
        self.scale = constant(1.0 - self.offset, (dim,), (None,))
        self.bias = constant(0.0, (dim,), (None,)) if self.is_layer else nnx.data(None)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * _row(self.scale[...] + self.offset, y)
        if self.bias is not None:
            y = y + _row(self.bias[...], y)
        return y.astype(x.dtype)


def _row(w: Float[Array, "..."], x: Float[Array, "... D"]) -> Float[Array, "..."]:
    """`w` with leading dims of size 1, to meet `x` without implicit rank promotion."""
    return w.astype(x.dtype).reshape((1,) * (x.ndim - w.ndim) + w.shape)


def add_bias(x: Float[Array, "..."], bias: nnx.Param | None) -> Float[Array, "..."]:
    """x + bias over the last dims, or x where there is no bias."""
    return x if bias is None else x + _row(bias[...], x)


class Rope(NamedTuple):
    """Cosines and sines of rotary angles (arXiv:2104.09864, eq. 34), half-split pairs: dim h turns with h + H/2."""

    cos: Float[Array, "B T 1 H/2"]
    sin: Float[Array, "B T 1 H/2"]

    def turn(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Rotate each pair of `x` by its position's angle."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rope(positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling) -> Rope:
    """Angles at `positions`: theta**(-2h/H) turns a token, stretched by `scaling`."""
    frequencies, magnitude = rope_frequencies(head_dim, theta, scaling)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None, None]
    return Rope(jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[list[float], float]:
    """Radians a token for each of the H/2 pairs, and the factor on cos and sin.

    linear: Chen et al. arXiv:2306.15595; llama3: Llama 3.1's release; yarn: arXiv:2309.00071, sections 3.2 and 3.4.
    """
    plain = [theta ** (-2 * h / head_dim) for h in range(head_dim // 2)]
    if scaling.kind == "linear":
        return [f / scaling.factor for f in plain], 1.0
    if scaling.kind == "llama3":
        return [_llama3(f, scaling) for f in plain], 1.0
    if scaling.kind == "yarn":
        magnitude = scaling.attention_factor
        magnitude = 0.1 * math.log(scaling.factor) + 1.0 if magnitude is None else magnitude
        return _yarn(plain, head_dim, theta, scaling), magnitude
    return plain, 1.0


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def _yarn(plain: list[float], head_dim: int, theta: float, scaling: RopeScaling) -> list[float]:
    def pair(turns: float) -> float:
        """The pair that makes this many turns over the trained length."""
        return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = max(min(math.ceil(pair(scaling.beta_slow)), head_dim - 1), low + 0.001)
    stretched = [min(max((h - low) / (high - low), 0.0), 1.0) for h in range(len(plain))]
    return [f * (1 - s) + f / scaling.factor * s for f, s in zip(plain, stretched, strict=True)]


def look_up(table: Float[Array, "V d"] | Held, tokens: Int[Array, "B T"]) -> Float[Array, "B t D"]:
    """Rows of an embedding table, laid out as RESIDUAL.

    Where D is split over devices with tokens of their own, each looks up its columns for the tokens of all, and an
    all-to-all brings the rows together: less to send than the table, as long as there are fewer tokens than rows.
    """
    if isinstance(table, Held):
        return table.take(tokens)
    axes = token_axes("embed")
    for axis in reversed(axes):
        tokens = jax.lax.all_gather(tokens, axis, axis=0, tiled=True)
    mine, is_mine = my_rows(tokens, table)
    wide = place(table, ("vocab", None)).astype(jnp.float32)  # so that gradients of a row are added up in float32
    rows = jnp.take(wide, mine, axis=0).astype(table.dtype)  # automatic: all-gather over fsdp before the look-up
    if manual_axes("vocab"):
        rows = jnp.where(is_mine[..., None], rows, 0)
    if axes:
        rows = jax.lax.all_to_all(rows, axes, split_axis=0, concat_axis=2, tiled=True)
    return added(rows, "vocab", RESIDUAL)


def my_rows(ids: Int[Array, "..."], table: Float[Array, "V D"]) -> tuple[Int[Array, "..."], Bool[Array, "..."]]:
    """Ids as rows of this device's part of a table whose V may be split, and whether they are in it."""
    V, _ = table.shape
    mine = ids - part_index(manual_axes("vocab")) * V
    is_mine = (mine >= 0) & (mine < V)
    return jnp.where(is_mine, mine, 0), is_mine


class Embedding(nnx.Module):
    """Token table [V, D], also the unembedding where the two are tied; learned positions [S, D] for GPT-2."""

    def __init__(self, config: ModelConfig, key: Key):
        token_key, position_key = jax.random.split(key)
        V, D = config.vocab_size, config.embed_dim
        self.scale = D**0.5 if config.embed_scale else 1.0
        self.dtype = jnp.dtype(config.compute_dtype)
        self.tokens = matrix(token_key, (V, D), ("vocab", "embed"), fan_in=D)
        self.positions = nnx.data(None)
        if config.positions == "learned":
            self.positions = matrix(position_key, (config.max_length, D), (None, "embed"), fan_in=D)

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B t D"]:
        x = look_up(self.tokens[...], tokens).astype(self.dtype)
        x = x * jnp.asarray(self.scale, self.dtype)
        if self.positions is not None:
            positions = relaid(positions, TOGETHER[:2], RESIDUAL[:2])
            table = whole(self.positions[...], (None, "embed"))
            x = x + jnp.take(table, positions, axis=0, mode="clip").astype(self.dtype)
        return place(x, RESIDUAL)


def _relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": _relu_squared,
}


@functools.cache
def product_of(config: ModelConfig) -> Callable:
    """The product of a layer's matrices, of einsum's signature."""
    if config.matmul == "float":
        return jnp.einsum
    return functools.partial(quantized_einsum, kind=config.matmul, kernel=config.kernel)


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)), the gated FFN of arXiv:2002.05202; without a gate, down(act(up(x)))."""

    def __init__(self, config: ModelConfig, key: Key):
        up, gate, down = jax.random.split(key, 3)
        D, F = config.embed_dim, config.ffn_dim
        self.act, names = config.activation, ("embed", "ffn")
        self.product = product_of(config)
        self.up = matrix(up, (D, F), names, fan_in=D, scale=config.init_scale)
        self.gate = matrix(gate, (D, F), names, fan_in=D, scale=config.init_scale) if config.gated else nnx.data(None)
        depth_scale = config.init_scale * (2 * config.num_layers) ** -0.5
        self.down = matrix(down, (F, D), ("ffn", "embed"), fan_in=F, scale=depth_scale)
        self.up_bias = constant(0.0, (F,), ("ffn",)) if config.ffn_bias else nnx.data(None)
        self.down_bias = constant(0.0, (D,), (None,)) if config.ffn_bias else nnx.data(None)

    def __call__(self, x: Float[Array, "B t D"]) -> Float[Array, "B t D"]:
        """x and what comes out are laid out as RESIDUAL."""
        x, names = relaid(x, RESIDUAL, TOGETHER), ("batch", "seq", "act_ffn")
        h = add_bias(einsum("BTD,DF->BTF", x, self.up[...], out=names, product=self.product), self.up_bias)
        if self.gate is None:
            h = ACTIVATIONS[self.act](checkpoint_name(h, "ffn_up"))
        else:
            gate = checkpoint_name(
                einsum("BTD,DF->BTF", x, self.gate[...], out=names, product=self.product), "ffn_gate"
            )
            h = ACTIVATIONS[self.act](gate) * checkpoint_name(h, "ffn_up")
        y = einsum("BTF,FD->BTD", h, self.down[...], sums="act_ffn", out=RESIDUAL, product=self.product)
        return add_bias(y, self.down_bias)
