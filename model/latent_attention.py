"""Multi-head latent attention: keys and values of all heads out of one narrow latent a token. Knows no cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.layers import RESIDUAL, TOGETHER, Key, Norm, Rope, matrix
from model.memory import Memory, Queries, Rule
from parallel.sharding import einsum, relaid


class LatentAttention(nnx.Module):
    """arXiv:2405.04434, eqs. 9 to 19: down to a latent of width R, a norm, up to N heads.

    The last dims of a head turn with the position; in keys all heads share them. They have matrices of their own.
    """

    def __init__(self, config: ModelConfig, key: Key):
        q_down, q, q_rope, kv_down, k, k_rope, v, o = jax.random.split(key, 8)
        D, N, H, R = config.embed_dim, config.num_heads, config.head_dim, config.kv_rank
        turning, scale = config.rope_dim, config.init_scale
        self.value_dim = config.value_dim or H
        self.softcap = config.attention_softcap
        self.query_scale = H**-0.5 if config.query_scale is None else config.query_scale
        self.query_scale *= config.rope_scaling.logit_factor
        self.q_down, self.q_norm = nnx.data(None), nnx.data(None)
        source, names = D, ("embed", "heads", "head")
        if config.q_rank:
            source, names = config.q_rank, ("rank", "heads", "head")
            self.q_down = matrix(q_down, (D, source), ("embed", "rank"), fan_in=D, scale=scale)
            self.q_norm = Norm(config, source)
        self.q = matrix(q, (source, N, H - turning), names, fan_in=source, scale=scale)
        self.q_rope = matrix(q_rope, (source, N, turning), names, fan_in=source, scale=scale)
        self.kv_down = matrix(kv_down, (D, R), ("embed", "rank"), fan_in=D, scale=scale)
        self.kv_norm = Norm(config, R)
        names = ("rank", "heads", "head")
        self.k = matrix(k, (R, N, H - turning), names, fan_in=R, scale=scale)
        self.v = matrix(v, (R, N, self.value_dim), names, fan_in=R, scale=scale)
        self.k_rope = matrix(k_rope, (D, turning), ("embed", "head"), fan_in=D, scale=scale)
        depth_scale, fan_in = scale * (2 * config.num_layers) ** -0.5, N * self.value_dim
        self.o = matrix(o, (N, self.value_dim, D), ("heads", "head", "embed"), fan_in=fan_in, scale=depth_scale)

    def __call__(
        self, x: Float[Array, "B t D"], rope: Rope, window, queries: Queries, memory: Memory
    ) -> tuple[Float[Array, "B t D"], Memory]:
        """x and what comes out are laid out as RESIDUAL."""
        x = relaid(x, RESIDUAL, TOGETHER)
        q, (k, v) = self._queries(x, rope), self._keys_values(x, rope)
        out, memory = memory.attend(q, k, v, queries, Rule(self.query_scale, self.softcap, window))
        out = out[..., : self.value_dim]
        return einsum("BTNH,NHD->BTD", out, self.o[...], sums="act_heads", out=RESIDUAL), memory

    def _queries(self, x: Float[Array, "B T D"], rope: Rope) -> Float[Array, "B T N H"]:
        names = ("batch", "seq", "act_heads", None)
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(einsum("BTD,DR->BTR", x, self.q_down[...], out=("batch", "seq", None)))
        q = einsum("BTR,RNH->BTNH", x, self.q[...], out=names)
        turned = rope.turn(einsum("BTR,RNH->BTNH", x, self.q_rope[...], out=names))
        return jnp.concatenate([q, turned], axis=-1)

    def _keys_values(self, x: Float[Array, "B T D"], rope: Rope) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Both [B, T, N, H], values with zeros behind them: memories and kernels know one width of a head."""
        names, shared = ("batch", "seq", "act_heads", None), ("batch", "seq", None)
        latent = self.kv_norm(einsum("BTD,DR->BTR", x, self.kv_down[...], out=shared))
        k = einsum("BTR,RNH->BTNH", latent, self.k[...], out=names)
        v = einsum("BTR,RNH->BTNH", latent, self.v[...], out=names)
        turned = rope.turn(einsum("BTD,DH->BTH", x, self.k_rope[...], out=shared)[:, :, None])
        *_, N, _ = k.shape
        k = jnp.concatenate([k, jnp.broadcast_to(turned, (*turned.shape[:2], N, turned.shape[-1]))], axis=-1)
        return k, jnp.pad(v, [(0, 0)] * 3 + [(0, k.shape[-1] - self.value_dim)])
