"""Tiny models of each family: fields of a config.json, a prompt, and weights drawn by name. Knows no jax and no torch.

The same numbers arise here, in make_golden.py under PyTorch, and in the tests under JAX, so no weights are committed.
"""

import zlib

import numpy as np

BATCH, LENGTH, VOCAB = 2, 20, 48  # the prompt is longer than every window below
SENTENCE = "The capital of France is Paris. 17 + 25 = 42.\n\ndef double(x):\n    return 2 * x"  # SmolLM2's prompt

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
LLAMA = TINY | {"model_type": "llama"}
DEEPSEEK = {name: value for name, value in TINY.items() if name != "head_dim"} | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
}
GEMMA = TINY | {"tie_word_embeddings": True}

# In the fields of transformers 4 (rope_theta, rope_scaling); golden/*.json has what transformers 5 made of them.
FIELDS = {
    "llama": LLAMA,
    "llama_linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama_llama3": LLAMA
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama_yarn": LLAMA
    | {
        "head_dim": 16,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "llama_bias": LLAMA | {"attention_bias": True},
    "smollm2": LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": TINY | {"model_type": "mistral", "sliding_window": 7},
    "qwen2": TINY | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 7},
    "qwen2_window": TINY
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
    },
    "qwen3": TINY | {"model_type": "qwen3", "head_dim": 16},
    "gemma": GEMMA | {"model_type": "gemma", "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": GEMMA
    | {
        "model_type": "gemma2",
        "sliding_window": 7,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": GEMMA
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "mixtral": TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": TINY
    | {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "deepseek_v2": DEEPSEEK
    | {"model_type": "deepseek_v2", "q_lora_rank": None, "n_shared_experts": 2, "num_experts_per_tok": 2},
    "deepseek_v3": DEEPSEEK
    | {
        "model_type": "deepseek_v3",
        "q_lora_rank": 12,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 3,
        "n_positions": 32,
        "layer_norm_epsilon": 1e-5,
    },
}


def prompt() -> np.ndarray:
    """Tokens [B, T]."""
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def draw(name: str, shape: tuple[int, ...], model_type: str) -> np.ndarray:
    """The float32 tensor of that name: large enough that every term of the model moves the logits."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 2:
        return values * np.float32(1.5 * 24**-0.5)
    centre = 0.0 if name.endswith("bias") or model_type.startswith("gemma") else 1.0
    return np.float32(centre) + np.float32(0.3) * values
