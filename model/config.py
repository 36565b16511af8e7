"""The shape of a decoder: one frozen record that every family is a value of. Knows no arrays and imports no jax."""

import dataclasses
from typing import Literal

LayerKind = Literal["global", "window"]
Activation = Literal[
    "query", "key", "value", "attention_out", "attention_lse", "middle", "ffn_gate", "ffn_up"
]  # what a layer may keep, in the order in which it is made


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
    activation: Literal["silu", "gelu_tanh", "gelu", "relu_squared"] = "silu"  # the FFN's nonlinearity
    query_scale: float | None = None  # multiplies q·k; None means 1/sqrt(H)
    attention_softcap: float | None = None  # attention logits become cap * tanh(logits / cap)
    final_softcap: float | None = None  # so do the output logits
    embed_scale: bool = False  # embeddings are multiplied by sqrt(D) (Gemma)
    num_experts: int = 0  # E, experts of an FFN; 0 is a dense FFN
    experts_per_token: int = 0  # A, experts that a token goes through
    expert_ffn_dim: int = 0  # F of one expert
    shared_ffn_dim: int = 0  # width of the experts that every token goes through
    num_dense_layers: int = 0  # first layers, whose FFN is dense
    router: Literal["softmax", "softmax_after", "sigmoid"] = "softmax"  # scores: over all, over the chosen, each alone
    router_normalize: bool = True  # the chosen experts' weights sum to 1
    router_scale: float = 1.0  # multiplies them
    router_groups: int = 1  # groups of experts
    router_top_groups: int = 1  # groups that a token's experts may come from
    balance_loss: float = 0.0  # factor of the loss that spreads tokens over experts
    router_z_loss: float = 0.0  # factor of the loss that keeps router logits small
    router_bias_rate: float = 0.0  # of moving each expert's bias towards even load, a step
    expert_capacity: float = 1.25  # rows of an exchange round / rows if spread evenly; more rounds run, none is dropped
    tied: bool = True  # the unembedding is the embedding table
    init_scale: float = 1.0  # multiplies the fan-in standard deviation of every initial matrix
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls; parameters stay float32
    remat: Literal["none", "dots", "minimal", "attention", "full"] = "none"  # what a layer keeps for backward: all … its input
    remat_save: tuple[Activation, ...] = ()  # activations kept besides
    remat_offload: tuple[Activation, ...] = ()  # activations kept in host memory
    scan_layers: bool = True  # one compiled layer looped L times (fast compile) rather than L copies

    def __post_init__(self):
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
