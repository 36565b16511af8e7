"""config.json to ModelConfig and back, in the fields of transformers 4 and 5."""

import dataclasses
import json
import subprocess
import sys

import pytest

from model import families
from model.config import RopeScaling
from model.huggingface_config import from_json, to_json
from tests.model.cases import FIELDS, LLAMA
from tests.model.test_parity import GOLDEN

# config.json as the hub has it, less what does not shape the model.
HUB = {
    "llama3_1_8b": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "smollm2_135m": {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "mistral_7b": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2_5_0_5b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma_2b": {
        "model_type": "gemma",
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "gemma2_2b": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma3_4b": {  # its text_config, which leaves out what transformers takes anyway
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2",
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "v_head_dim": 128,
        "vocab_size": 102400,
    },
    "deepseek_v3": {  # less quantization_config
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "gpt2_medium": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 1024,
        "n_head": 16,
        "n_layer": 24,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
}


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_config_is_the_familys_value(name):
    assert from_json(HUB[name]) == families.PUBLISHED[name]()


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_every_family_survives_the_way_out_and_back(name):
    config = families.PUBLISHED[name]()
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("case", FIELDS)
def test_old_and_new_fields_mean_the_same(case):
    written_by_transformers_5 = json.loads((GOLDEN / f"{case}.json").read_text())["config"]
    assert "rope_parameters" in written_by_transformers_5 or case == "gpt2"
    assert from_json(written_by_transformers_5) == from_json(FIELDS[case])


def test_yarn_with_every_field():
    scaling = RopeScaling(
        kind="yarn", factor=4.0, original_length=16, beta_fast=8.0, beta_slow=2.0, attention_factor=1.25
    )
    config = dataclasses.replace(from_json(LLAMA), rope_scaling=scaling)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "bert"}, r"model_type 'bert' is not supported; llama, mistral, .*gpt2 are"),
        ({"model_type": "gemma3"}, r"its text model alone is gemma3_text"),
        (LLAMA | {"mlp_bias": True}, r"mlp_bias=True is not supported; False is"),
        (LLAMA | {"hidden_act": "tanh"}, r"activation 'tanh' is not supported; silu"),
        (LLAMA | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported; 1.0 is"),
        (LLAMA | {"quantization_config": {"bits": 4}}, r"quantization_config={'bits': 4} is not supported"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "longrope"}},
            r"rope_type 'longrope' is not supported; default, linear",
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, r"lacks factor, which model_type llama needs"),
        ({"model_type": "llama", "vocab_size": 5}, r"lacks num_attention_heads"),
        (FIELDS["deepseek_v3"] | {"rope_interleave": False}, r"rope_interleave=False is not supported; True is"),
        (FIELDS["deepseek_v3"] | {"rms_norm_eps": 1e-5}, r"rms_norm_eps=1e-05 is not supported; 1e-06 is"),
        (FIELDS["deepseek_v2"] | {"topk_method": "group_limited_greedy"}, r"'?group_limited_greedy'? is not supported"),
        (FIELDS["qwen3_moe"] | {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported; the first"),
        (FIELDS["qwen3_moe"] | {"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported; 1 is"),
        (FIELDS["qwen2_window"] | {"layer_types": ["linear_attention"] * 3}, r"layer type 'linear_attention'"),
        (FIELDS["qwen2_window"] | {"layer_types": ["full_attention"]}, r"1 entries for num_hidden_layers=3"),
    ],
)
def test_what_is_not_supported_is_named(fields, match):
    with pytest.raises(ValueError, match=match):
        from_json(fields)


def test_a_model_that_no_architecture_is_like_is_refused():
    odd = dataclasses.replace(from_json(LLAMA), gated=False, activation="relu_squared")
    with pytest.raises(ValueError, match=r"model_type llama is nearest but has gated=True, not False"):
        to_json(odd)
    mixed = dataclasses.replace(from_json(FIELDS["mistral"]), layers=("window", "global"))
    with pytest.raises(
        ValueError, match=r"model_type mistral is nearest but has layers=\('window', 'window', 'window'\)"
    ):
        to_json(mixed)
    capped = dataclasses.replace(from_json(LLAMA), final_softcap=30.0)
    with pytest.raises(ValueError, match=r"final_softcap=None, not 30.0"):
        to_json(capped)
    shared = dataclasses.replace(from_json(FIELDS["deepseek_v3"]), shared_ffn_dim=13)
    with pytest.raises(ValueError, match=r"model_type deepseek_v3 is nearest but has shared_ffn_dim=12, not 13"):
        to_json(shared)


def test_errors_come_before_jax():
    code = "import sys, model.huggingface_config; assert not {'jax', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
