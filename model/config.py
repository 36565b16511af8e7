"""The shape of a decoder: one frozen record that every family is a value of. Knows no arrays and imports no jax."""

import dataclasses
import math
from typing import Literal

LayerKind = Literal["global", "window"]
Activation = Literal[
    "query", "key", "value", "attention_out", "attention_lse", "middle", "ffn_gate", "ffn_up"
]  # what a layer may keep, in the order in which it is made
RematKind = Literal["none", "dots", "minimal", "attention", "full"]  # model/remat.py
ATTENTION: tuple[Activation, ...] = ("attention_out", "attention_lse")
KEPT: dict[RematKind, tuple[Activation, ...]] = {  # by name; `dots` keeps products besides, `none` everything
    "full": (),
    "attention": ATTENTION,
    "minimal": ("query", "key", "value", *ATTENTION, "ffn_gate", "ffn_up"),
    "dots": ATTENTION,
}
KernelKind = Literal["auto", "plain", "pallas"]
RouterKind = Literal["softmax", "softmax_after", "sigmoid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained length. `none` leaves them alone."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"  # which published rule
    factor: float = 1.0  # new length / trained length
    original_length: int = 8192  # tokens seen before stretching (llama3, yarn)
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original_length / this are fully stretched
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original_length / this are left alone
    beta_fast: float = 32.0  # yarn: turns over the trained length above which a frequency is left alone
    beta_slow: float = 1.0  # yarn: turns below which it is fully stretched
    attention_factor: float | None = None  # yarn: scale of cos and sin; None means 0.1 ln(factor) + 1
    logit_mscale: float = 0.0  # yarn: m > 0 multiplies q·k by (0.1 m ln(factor) + 1) squared (MLA)

    @property
    def logit_factor(self) -> float:
        """What attention logits are multiplied by."""
        return (0.1 * self.logit_mscale * math.log(max(self.factor, 1.0)) + 1.0) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder. Single letters are the alphabet in docs/notation.md."""

    vocab_size: int = 0  # V, tokens; 0 takes the tokenizer's, rounded up to a multiple of 64
    embed_dim: int  # D, model width
    num_layers: int  # L, layers
    num_heads: int  # N, query heads
    num_kv_heads: int  # K, key-value heads, each shared by N/K query heads
    head_dim: int  # H, width of one head
    ffn_dim: int  # F, width inside the FFN
    max_length: int  # longest sequence in tokens
    layers: tuple[LayerKind, ...] = ("global",)  # kind of each layer, tiled over L
    window: int | None = None  # tokens that a window layer sees, its own included
    positions: Literal["rope", "learned"] = "rope"  # how a token knows where it stands
    rope_theta: float  # rotary base of global layers; no default: it is a property of the checkpoint
    rope_local_theta: float | None = None  # rotary base of window layers; None means rope_theta, scaled alike
    rope_scaling: RopeScaling = RopeScaling()  # of global layers
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm (with bias)
    norm_eps: float  # added to the variance
    norm_zero_centered: bool = False  # the scale is 1 + weight (Gemma)
    post_norms: bool = False  # also normalise what attention and FFN return (Gemma 2, 3)
    qk_norm: bool = False  # RMSNorm on each query and key head (Qwen 3, Gemma 3)
    qkv_bias: bool = False  # biases on the query, key and value projections
    out_bias: bool = False  # bias on attention's output projection
    ffn_bias: bool = False  # biases in the FFN
    gated: bool = True  # FFN is down(act(gate) * up) rather than down(act(up))
    activation: Literal["silu", "gelu_tanh", "gelu", "relu", "relu_squared"] = "silu"  # the FFN's nonlinearity
    query_scale: float | None = None  # multiplies q·k; None means 1/sqrt(H)
    attention_softcap: float | None = None  # attention logits become cap * tanh(logits / cap)
    final_softcap: float | None = None  # so do the output logits
    embed_scale: bool = False  # embeddings are multiplied by sqrt(D) (Gemma)
    tied: bool = True  # the unembedding is the embedding table
    init_scale: float = 1.0  # multiplies the fan-in standard deviation of every initial matrix
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls; parameters stay float32
    remat: RematKind = "none"  # what a layer keeps for its backward pass, from all to its input alone
    remat_save: tuple[Activation, ...] = ()  # activations kept besides
    remat_offload: tuple[Activation, ...] = ()  # activations kept in host memory
    matmul: Literal["float", "int8", "fp8"] = "float"  # of attention and FFN in training, gradients alike
    kernels: KernelKind = "auto"  # own kernels for TPUs, or plain XLA; auto goes by the platform
    scan_layers: bool = True  # one compiled layer looped L times (fast compile) rather than L copies
    num_experts: int = 0  # E, experts of a layer's FFN; 0 is one dense FFN
    experts_per_token: int = 0  # A, experts that each token goes through
    expert_ffn_dim: int = 0  # F of one expert
    shared_ffn_dim: int = 0  # F of the experts that every token goes through, taken together; 0 is none
    num_dense_layers: int = 0  # first layers whose FFN is dense (DeepSeek)
    router: RouterKind = "softmax"  # weights: softmax over all, then top A | top A, then softmax | sigmoid with a bias
    router_normalize: bool = True  # the weights of a token's experts sum to 1
    router_scale: float = 1.0  # multiplies the weights of the routed experts
    router_groups: int = 1  # groups that the experts stand in
    router_top_groups: int = 1  # groups that a token's experts may come from
    balance_loss: float = 0.0  # weight of the loss that spreads tokens over experts (arXiv:2101.03961, eq. 4)
    router_z_loss: float = 0.0  # weight of the squared log-sum-exp of router logits (arXiv:2202.08906, eq. 5)
    router_bias_rate: float = 0.0  # step of the sigmoid router's balancing bias (arXiv:2408.15664)
    expert_capacity: float = 1.25  # rows of an exchange round / rows if spread evenly; more rounds run, none is dropped
    kv_rank: int = 0  # R, latent that keys and values share (MLA, arXiv:2405.04434); 0 is plain attention
    q_rank: int = 0  # R, latent of the queries; 0 takes them from D
    rope_dim: int = 0  # MLA: dims of H, the last ones, that turn with the position; all heads share them in keys
    value_dim: int = 0  # MLA: width of a value head; 0 means H

    def __post_init__(self):
        _check_latents(self)
        _check_experts(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "each KV head serves N/K query heads"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs, so make it even")
        if "window" in self.layers and self.window is None:
            raise ValueError('layers contain "window" but window is not set; give the number of tokens it sees')
        if "window" not in self.layers and self.window is not None:
            raise ValueError(f'window={self.window} is set but layers={self.layers} has no "window" layer')
        for name in ("embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each of the L layers."""
        return tuple(self.layers[i % len(self.layers)] for i in range(self.num_layers))

    @property
    def kernel(self) -> Literal["plain", "pallas"]:
        """Which kernels: `auto` that no platform has decided is plain."""
        return "pallas" if self.kernels == "pallas" else "plain"

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that turn with the position."""
        return self.rope_dim or self.head_dim


def _check_latents(config: ModelConfig) -> None:
    """Multi-head latent attention has its own sizes, and plain attention none of them."""
    if not config.kv_rank:
        for name in ("q_rank", "rope_dim", "value_dim"):
            if getattr(config, name):
                raise ValueError(f"{name}={getattr(config, name)} is set but kv_rank=0 is plain attention; set kv_rank")
        if config.rope_scaling.logit_mscale:
            raise ValueError(
                f"rope_scaling.logit_mscale={config.rope_scaling.logit_mscale} is set but kv_rank=0 is plain "
                "attention; set query_scale"
            )
        return
    for name in ("kv_rank", "q_rank", "rope_dim", "value_dim"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 0")
    if config.rope_dim % 2 or not 0 < config.rope_dim < config.head_dim:
        raise ValueError(
            f"rope_dim={config.rope_dim} must be even, above 0 and below head_dim={config.head_dim}; "
            "it is the rotary part of a head, the rest knows no position"
        )
    if config.value_dim > config.head_dim:
        raise ValueError(
            f"value_dim={config.value_dim} is more than head_dim={config.head_dim}; "
            "values are stored in the width of keys"
        )
    if config.num_kv_heads != config.num_heads:
        raise ValueError(
            f"num_kv_heads={config.num_kv_heads} differs from num_heads={config.num_heads}; "
            "with kv_rank every head has its own keys: make them equal"
        )
    for name, needed in {"positions": "rope", "qk_norm": False, "qkv_bias": False, "out_bias": False}.items():
        if getattr(config, name) != needed:
            raise ValueError(f"{name}={getattr(config, name)} does not go with kv_rank={config.kv_rank}; {needed} does")


def _check_experts(config: ModelConfig) -> None:
    """Enough experts of some width for every token, in groups that come out even."""
    E, A, groups, top_groups = (
        config.num_experts, config.experts_per_token, config.router_groups, config.router_top_groups
    )  # fmt: skip
    if not E:
        for name in ("experts_per_token", "expert_ffn_dim", "shared_ffn_dim", "num_dense_layers"):
            if getattr(config, name):
                raise ValueError(f"{name}={getattr(config, name)} is set but num_experts=0 is dense; set num_experts")
        return
    if not 1 <= A <= E:
        raise ValueError(f"experts_per_token={A} must be between 1 and num_experts={E}")
    if config.expert_ffn_dim < 1:
        raise ValueError(f"expert_ffn_dim={config.expert_ffn_dim} must be at least 1; num_experts={E} need a width")
    if not 0 <= config.num_dense_layers < config.num_layers:
        raise ValueError(
            f"num_dense_layers={config.num_dense_layers} leaves no layer of num_layers={config.num_layers} for "
            f"num_experts={E}; lower it, or set num_experts=0"
        )
    if groups < 1 or E % groups:
        raise ValueError(f"num_experts={E} is not a multiple of router_groups={groups}; groups are equal")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"router_top_groups={top_groups} must be between 1 and router_groups={groups}")
    if A > E // groups * top_groups:
        raise ValueError(
            f"experts_per_token={A} is more than the {E // groups * top_groups} experts of "
            f"router_top_groups={top_groups}; raise router_top_groups"
        )
    if config.router_bias_rate and config.router != "sigmoid":
        raise ValueError(
            f'router_bias_rate={config.router_bias_rate} is set but router="{config.router}" has no bias; '
            'set router="sigmoid" or balance_loss'
        )
    if not config.gated or config.ffn_bias:
        raise ValueError(
            f"gated={config.gated}, ffn_bias={config.ffn_bias} do not go with num_experts={E}; "
            "experts are gated and have no biases"
        )


def with_kernels(config: ModelConfig, platform: str) -> ModelConfig:
    """The config with its kernels chosen for a platform; ValueError for own kernels where they don't run."""
    if config.kernels == "pallas" and platform != "tpu":
        raise ValueError(f"model.kernels=pallas are for TPUs, but the devices here are {platform}s; give auto or plain")
    kernels = ("pallas" if platform == "tpu" else "plain") if config.kernels == "auto" else config.kernels
    return dataclasses.replace(config, kernels=kernels)
