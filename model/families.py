"""Published models as values of ModelConfig: one function a model, named as its makers name it. Knows no weights.

Every number is from the model's own config.json; tests/model/test_families.py holds the parameter counts against the
published ones. A variation is a `dataclasses.replace`: a longer context, bfloat16 compute, fewer layers.
"""

import dataclasses
from collections.abc import Callable

from model.config import ModelConfig, RopeScaling


def llama2_7b() -> ModelConfig:
    """Llama 2, arXiv:2307.09288."""
    return ModelConfig(
        vocab_size=32_000,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        ffn_dim=11_008,
        max_length=4096,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tied=False,
    )


def _llama3(
    embed_dim: int, num_layers: int, num_heads: int, ffn_dim: int, *, head_dim: int = 128, stretch: float = 1.0
) -> ModelConfig:
    """Llama 3 and 3.1, arXiv:2407.21783; `stretch` is how much longer than 8192 tokens the rotary positions reach."""
    scaling = RopeScaling() if stretch == 1.0 else RopeScaling(kind="llama3", factor=stretch, original_length=8192)
    return ModelConfig(
        vocab_size=128_256,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        max_length=8192 if stretch == 1.0 else 131_072,
        rope_theta=500_000.0,
        rope_scaling=scaling,
        norm_eps=1e-5,
        tied=head_dim == 64,  # the small models share their tables
    )


def llama3_8b() -> ModelConfig:
    """Llama 3 8B."""
    return _llama3(4096, 32, 32, 14_336)


def llama3_70b() -> ModelConfig:
    """Llama 3 70B."""
    return _llama3(8192, 80, 64, 28_672)


def llama3_1_8b() -> ModelConfig:
    """Llama 3.1 8B: Llama 3 8B with 131,072 tokens of context."""
    return _llama3(4096, 32, 32, 14_336, stretch=8.0)


def llama3_1_70b() -> ModelConfig:
    """Llama 3.1 70B."""
    return _llama3(8192, 80, 64, 28_672, stretch=8.0)


def llama3_1_405b() -> ModelConfig:
    """Llama 3.1 405B."""
    return _llama3(16_384, 126, 128, 53_248, stretch=8.0)


def llama3_2_1b() -> ModelConfig:
    """Llama 3.2 1B."""
    return _llama3(2048, 16, 32, 8192, head_dim=64, stretch=32.0)


def _smollm2(
    embed_dim: int, num_layers: int, num_heads: int, num_kv_heads: int, *, ffn_dim: int, rope_theta: float
) -> ModelConfig:
    """SmolLM2, arXiv:2502.02737."""
    return ModelConfig(
        vocab_size=49_152,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        ffn_dim=ffn_dim,
        max_length=8192,
        rope_theta=rope_theta,
        norm_eps=1e-5,
    )


def smollm2_135m() -> ModelConfig:
    """SmolLM2 135M."""
    return _smollm2(576, 30, 9, 3, ffn_dim=1536, rope_theta=100_000.0)


def smollm2_360m() -> ModelConfig:
    """SmolLM2 360M."""
    return _smollm2(960, 32, 15, 5, ffn_dim=2560, rope_theta=100_000.0)


def smollm2_1_7b() -> ModelConfig:
    """SmolLM2 1.7B."""
    return _smollm2(2048, 24, 32, 32, ffn_dim=8192, rope_theta=130_000.0)


def mistral_7b() -> ModelConfig:
    """Mistral 7B v0.1, arXiv:2310.06825: every layer sees 4096 tokens back."""
    return ModelConfig(
        vocab_size=32_000,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=14_336,
        max_length=32_768,
        layers=("window",),
        window=4096,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tied=False,
    )


def qwen2_0_5b() -> ModelConfig:
    """Qwen2 0.5B, arXiv:2407.10671: biases on q, k and v."""
    return ModelConfig(
        vocab_size=151_936,
        embed_dim=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        ffn_dim=4864,
        max_length=131_072,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qkv_bias=True,
    )


def qwen2_7b() -> ModelConfig:
    """Qwen2 7B."""
    return ModelConfig(
        vocab_size=152_064,
        embed_dim=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        ffn_dim=18_944,
        max_length=131_072,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qkv_bias=True,
        tied=False,
    )


def qwen2_5_0_5b() -> ModelConfig:
    """Qwen2.5 0.5B, arXiv:2412.15115."""
    return ModelConfig(
        vocab_size=151_936,
        embed_dim=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        ffn_dim=4864,
        max_length=32_768,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qkv_bias=True,
    )


def qwen2_5_7b() -> ModelConfig:
    """Qwen2.5 7B: Qwen2 7B's shape."""
    return qwen2_7b()


def _qwen3(embed_dim: int, num_layers: int, num_heads: int, ffn_dim: int, *, tied: bool) -> ModelConfig:
    """Qwen3, arXiv:2505.09388: queries and keys are normalised instead of biased."""
    return ModelConfig(
        vocab_size=151_936,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=ffn_dim,
        max_length=40_960,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        tied=tied,
    )


def qwen3_0_6b() -> ModelConfig:
    """Qwen3 0.6B."""
    return _qwen3(1024, 28, 16, 3072, tied=True)


def qwen3_8b() -> ModelConfig:
    """Qwen3 8B."""
    return _qwen3(4096, 36, 32, 12_288, tied=False)


def _mixtral(embed_dim: int, num_layers: int, num_heads: int, ffn_dim: int, *, max_length: int) -> ModelConfig:
    """Mixtral, arXiv:2401.04088: each token goes through two of eight experts."""
    return ModelConfig(
        vocab_size=32_000,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=ffn_dim,
        max_length=max_length,
        rope_theta=1_000_000.0,
        norm_eps=1e-5,
        tied=False,
        num_experts=8,
        experts_per_token=2,
        expert_ffn_dim=ffn_dim,
        router="softmax_after",
    )


def mixtral_8x7b() -> ModelConfig:
    """Mixtral 8x7B v0.1."""
    return _mixtral(4096, 32, 32, 14_336, max_length=32_768)


def mixtral_8x22b() -> ModelConfig:
    """Mixtral 8x22B v0.1."""
    return _mixtral(6144, 56, 48, 16_384, max_length=65_536)


def _qwen3_moe(embed_dim: int, num_layers: int, num_heads: int, ffn_dim: int, expert_ffn_dim: int) -> ModelConfig:
    """Qwen3's mixtures, arXiv:2505.09388: eight of 128 narrow experts. No layer has the dense FFN of `ffn_dim`."""
    return dataclasses.replace(
        _qwen3(embed_dim, num_layers, num_heads, ffn_dim, tied=False),
        num_kv_heads=4,
        num_experts=128,
        experts_per_token=8,
        expert_ffn_dim=expert_ffn_dim,
    )


def qwen3_30b_a3b() -> ModelConfig:
    """Qwen3 30B-A3B."""
    return _qwen3_moe(2048, 48, 32, 6144, 768)


def qwen3_235b_a22b() -> ModelConfig:
    """Qwen3 235B-A22B."""
    return _qwen3_moe(4096, 94, 64, 12_288, 1536)


def _deepseek(embed_dim: int, num_layers: int, num_heads: int, ffn_dim: int, *, mscale: float, **rest) -> ModelConfig:
    """DeepSeek V2 and V3: latent attention, fine-grained experts beside shared ones, the first layers dense."""
    scaling = {"factor": 40.0, "original_length": 4096, "attention_factor": 1.0, "logit_mscale": mscale}
    return ModelConfig(
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=192,
        ffn_dim=ffn_dim,
        max_length=163_840,
        rope_theta=10_000.0,
        rope_scaling=RopeScaling(kind="yarn", **scaling),
        norm_eps=1e-6,
        tied=False,
        kv_rank=512,
        rope_dim=64,
        value_dim=128,
        **rest,
    )


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite, arXiv:2405.04434, appendix B: queries without a latent."""
    return _deepseek(
        2048,
        27,
        16,
        10_944,
        mscale=0.707,
        vocab_size=102_400,
        num_experts=64,
        experts_per_token=6,
        expert_ffn_dim=1408,
        shared_ffn_dim=2 * 1408,
        num_dense_layers=1,
        router_normalize=False,
    )


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3, arXiv:2412.19437, without the module that predicts a second token."""
    return _deepseek(
        7168,
        61,
        128,
        18_432,
        mscale=1.0,
        vocab_size=129_280,
        q_rank=1536,
        num_experts=256,
        experts_per_token=8,
        expert_ffn_dim=2048,
        shared_ffn_dim=2048,
        num_dense_layers=3,
        router="sigmoid",
        router_scale=2.5,
        router_groups=8,
        router_top_groups=4,
    )


def _gemma(embed_dim: int, num_layers: int, num_heads: int, num_kv_heads: int, *, ffn_dim: int, **rest) -> ModelConfig:
    """What all Gemmas share: GeGLU, heads of 256, scaled embeddings, norm scales stored less 1."""
    shared = {"vocab_size": 256_000, "max_length": 8192, "rope_theta": 10_000.0}
    return ModelConfig(
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=256,
        ffn_dim=ffn_dim,
        norm_eps=1e-6,
        norm_zero_centered=True,
        activation="gelu_tanh",
        embed_scale=True,
        **(shared | rest),
    )


def gemma_2b() -> ModelConfig:
    """Gemma 2B, arXiv:2403.08295."""
    return _gemma(2048, 18, 8, 1, ffn_dim=16_384)


def gemma_7b() -> ModelConfig:
    """Gemma 7B."""
    return _gemma(3072, 28, 16, 16, ffn_dim=24_576)


GEMMA2 = {
    "layers": ("window", "global"),
    "window": 4096,
    "post_norms": True,
    "attention_softcap": 50.0,
    "final_softcap": 30.0,
}


def gemma2_2b() -> ModelConfig:
    """Gemma 2 2B, arXiv:2408.00118: local and global layers in turn, logits capped, norms around each sublayer."""
    return _gemma(2304, 26, 8, 4, ffn_dim=9216, **GEMMA2)


def gemma2_9b() -> ModelConfig:
    """Gemma 2 9B."""
    return _gemma(3584, 42, 16, 8, ffn_dim=14_336, **GEMMA2)


GEMMA3 = {
    "vocab_size": 262_144,
    "max_length": 32_768,
    "layers": ("window",) * 5 + ("global",),
    "window": 512,
    "rope_theta": 1_000_000.0,
    "rope_local_theta": 10_000.0,
    "post_norms": True,
    "qk_norm": True,
}


def gemma3_270m() -> ModelConfig:
    """Gemma 3 270M."""
    return _gemma(640, 18, 4, 1, ffn_dim=2048, **GEMMA3)


def gemma3_1b() -> ModelConfig:
    """Gemma 3 1B, arXiv:2503.19786: five local layers for each global one, with a rotary base each."""
    return _gemma(1152, 26, 4, 1, ffn_dim=6912, **GEMMA3)


def gemma3_4b() -> ModelConfig:
    """Gemma 3 4B without its image tower; global positions are stretched eightfold."""
    longer = {"vocab_size": 262_208, "max_length": 131_072, "window": 1024}
    stretched = {"rope_scaling": RopeScaling(kind="linear", factor=8.0)}
    return _gemma(2560, 34, 8, 4, ffn_dim=10_240, **(GEMMA3 | longer | stretched))


def _gpt2(embed_dim: int, num_layers: int, num_heads: int) -> ModelConfig:
    """GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases everywhere."""
    return ModelConfig(
        vocab_size=50_257,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        ffn_dim=4 * embed_dim,
        max_length=1024,
        positions="learned",
        rope_theta=10_000.0,  # unused
        norm="layer",
        norm_eps=1e-5,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        gated=False,
        activation="gelu_tanh",
    )


def gpt2() -> ModelConfig:
    """GPT-2 124M."""
    return _gpt2(768, 12, 12)


def gpt2_medium() -> ModelConfig:
    """GPT-2 355M."""
    return _gpt2(1024, 24, 16)


def gpt2_large() -> ModelConfig:
    """GPT-2 774M."""
    return _gpt2(1280, 36, 20)


def gpt2_xl() -> ModelConfig:
    """GPT-2 1.5B."""
    return _gpt2(1600, 48, 25)


PUBLISHED: dict[str, Callable[[], ModelConfig]] = {
    make.__name__: make
    for make in (
        llama2_7b, llama3_8b, llama3_70b, llama3_1_8b, llama3_1_70b, llama3_1_405b, llama3_2_1b,
        smollm2_135m, smollm2_360m, smollm2_1_7b, mistral_7b,
        qwen2_0_5b, qwen2_7b, qwen2_5_0_5b, qwen2_5_7b, qwen3_0_6b, qwen3_8b,
        mixtral_8x7b, mixtral_8x22b, qwen3_30b_a3b, qwen3_235b_a22b, deepseek_v2_lite, deepseek_v3,
        gemma_2b, gemma_7b, gemma2_2b, gemma2_9b, gemma3_270m, gemma3_1b, gemma3_4b,
        gpt2, gpt2_medium, gpt2_large, gpt2_xl,
    )
}  # fmt: skip
