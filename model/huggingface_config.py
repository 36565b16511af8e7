"""A Hugging Face config.json as a ModelConfig, and back. Knows no weights and imports no jax."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from model.config import LayerKind, ModelConfig, RopeScaling

# What transformers takes where a config.json is silent.
LLAMA = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
GEMMA = LLAMA | {
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
}
GEMMA2 = GEMMA | {
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
DEEPSEEK = LLAMA | {
    "first_k_dense_replace": 0,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "q_lora_rank": 1536,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 4096, "max_position_embeddings": 131_072},
    "qwen2": LLAMA | {"max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": LLAMA
    | {"max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "mixtral": LLAMA
    | {
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": LLAMA
    | {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "mlp_only_layers": (),
    },
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK
    | {
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    "gpt2": {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
    },
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu_squared",
}
# Fields that change the computation in a way our decoder does not express, with the value that leaves it alone.
NEUTRAL = {
    "partial_rotary_factor": 1.0,
    "mlp_bias": False,
    "use_bidirectional_attention": False,
    "quantization_config": None,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
LATENT = {"attention_bias": False, "rope_interleave": True, "moe_layer_freq": 1, "rms_norm_eps": 1e-6}
NEUTRAL_IN = {
    "qwen3_moe": {"use_sliding_window": False, "decoder_sparse_step": 1},
    "deepseek_v2": LATENT | {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v3": LATENT | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
KINDS: dict[str, LayerKind] = {"full_attention": "global", "sliding_attention": "window"}
OURS_ALONE = (
    "init_scale", "compute_dtype", "remat", "scan_layers",
    "balance_loss", "router_z_loss", "router_bias_rate", "expert_capacity",
)  # what no config.json says  # fmt: skip


def from_json(fields: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that a config.json describes; ValueError naming what our decoder does not express."""
    kind = fields.get("model_type")
    if kind not in DEFAULTS:
        hint = "; its text model alone is gemma3_text" if kind == "gemma3" else ""
        raise ValueError(f"{where}: model_type {kind!r} is not supported; {', '.join(DEFAULTS)} are{hint}")
    for name, neutral in (NEUTRAL | NEUTRAL_IN.get(kind, {})).items():
        if fields.get(name) not in (None, neutral):
            raise ValueError(f"{where}: {name}={_brief(fields[name])} is not supported; {neutral} is")
    fields = DEFAULTS[kind] | {name: value for name, value in fields.items() if value is not None or name in NULLABLE}
    try:
        read = _gpt2 if kind == "gpt2" else _deepseek if kind.startswith("deepseek") else _llama
        return ModelConfig(**read(fields, kind, where))
    except KeyError as error:
        raise ValueError(f"{where} lacks {error.args[0]}, which model_type {kind} needs") from error


# Null means none, not the default.
NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "q_lora_rank", "n_shared_experts")


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:60] + "…"


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"{where}: activation {name!r} is not supported; {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]


def _gpt2(fields: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    D, N = fields["n_embd"], fields["n_head"]
    return {
        "vocab_size": fields["vocab_size"],
        "embed_dim": D,
        "num_layers": fields["n_layer"],
        "num_heads": N,
        "num_kv_heads": N,
        "head_dim": D // N,
        "ffn_dim": fields["n_inner"] or 4 * D,
        "max_length": fields["n_positions"],
        "positions": "learned",
        "rope_theta": 10_000.0,
        "norm": "layer",
        "norm_eps": fields["layer_norm_epsilon"],
        "qkv_bias": True,
        "out_bias": True,
        "ffn_bias": True,
        "gated": False,
        "activation": _activation(fields["activation_function"], where),
        "query_scale": None if fields["scale_attn_weights"] else 1.0,
        "tied": fields["tie_word_embeddings"],
    }


def _llama(fields: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Llama and everything that grew from it."""
    heads, is_gemma = fields["num_attention_heads"], kind.startswith("gemma")
    head_dim = fields.get("head_dim", fields["hidden_size"] // heads)
    act = fields.get("hidden_activation", fields["hidden_act"])
    if is_gemma and act == "gelu":  # a slip of the first release: it always meant the approximation
        act = "gelu_pytorch_tanh"
    bias = bool(fields.get("attention_bias", False))
    scalar = fields.get("query_pre_attn_scalar", head_dim)
    config = {
        "vocab_size": fields["vocab_size"],
        "embed_dim": fields["hidden_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "ffn_dim": fields["intermediate_size"],
        "max_length": fields["max_position_embeddings"],
        "norm_eps": fields["rms_norm_eps"],
        "norm_zero_centered": is_gemma,
        "embed_scale": is_gemma,
        "post_norms": kind in ("gemma2", "gemma3_text"),
        "qk_norm": kind in ("qwen3", "qwen3_moe", "gemma3_text"),
        "qkv_bias": bias or kind == "qwen2",
        "out_bias": bias,
        "activation": _activation(act, where),
        "query_scale": None if scalar == head_dim else scalar**-0.5,
        "attention_softcap": fields.get("attn_logit_softcapping"),
        "final_softcap": fields.get("final_logit_softcapping"),
        "tied": fields["tie_word_embeddings"],
    }
    experts = EXPERTS[kind](fields, where) if kind in EXPERTS else {}
    return config | experts | _windows(fields, kind, where) | _rotary(fields, kind, where)


def _mixtral(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "num_experts": fields["num_local_experts"],
        "experts_per_token": fields["num_experts_per_tok"],
        "expert_ffn_dim": fields["intermediate_size"],
        "router": "softmax_after",
    }


def _qwen3_moe(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    dense = sorted(fields["mlp_only_layers"])
    if dense != list(range(len(dense))):
        raise ValueError(f"{where}: mlp_only_layers={dense} is not supported; the first layers are")
    return {
        "num_experts": fields.get("num_local_experts", fields["num_experts"]),
        "experts_per_token": fields["num_experts_per_tok"],
        "expert_ffn_dim": fields["moe_intermediate_size"],
        "num_dense_layers": len(dense),
        "router_normalize": fields["norm_topk_prob"],
    }


EXPERTS = {"mixtral": _mixtral, "qwen3_moe": _qwen3_moe}


def _deepseek(fields: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Latent attention, and experts after the first layers."""
    plain, turning = fields["qk_nope_head_dim"], fields["qk_rope_head_dim"]
    head_dim, value_dim, width = plain + turning, fields["v_head_dim"], fields["moe_intermediate_size"]
    same = {"head_dim": head_dim, "num_key_value_heads": fields["num_attention_heads"]}
    config = _llama({**fields, **same}, kind, where) | {
        "kv_rank": fields["kv_lora_rank"],
        "q_rank": fields["q_lora_rank"] or 0,
        "rope_dim": turning,
        "value_dim": 0 if value_dim == head_dim else value_dim,
    }
    return config | {
        "num_experts": fields["n_routed_experts"],
        "experts_per_token": fields["num_experts_per_tok"],
        "expert_ffn_dim": width,
        "shared_ffn_dim": width * (fields["n_shared_experts"] or 0),
        "num_dense_layers": fields["first_k_dense_replace"],
        "router": "sigmoid" if kind == "deepseek_v3" else "softmax",
        "router_normalize": fields["norm_topk_prob"],
        "router_scale": fields["routed_scaling_factor"],
        "router_groups": fields["n_group"],
        "router_top_groups": fields["topk_group"],
    }


WINDOWED = ("mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text")  # families whose layers may see a window


def _windows(fields: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Which layers see a window, as the shortest pattern that tiles them."""
    window, num_layers = fields.get("sliding_window"), fields["num_hidden_layers"]
    if kind in ("qwen2", "qwen3") and not fields.get("use_sliding_window", False):
        window = None
    if window is None or kind not in WINDOWED:
        return {}
    names = fields.get("layer_types")
    if names is None:
        period, first = fields.get("sliding_window_pattern"), fields.get("max_window_layers", 0)
        local = [l >= first if period is None else bool((l + 1) % period) for l in range(num_layers)]
        names = ["sliding_attention" if mine else "full_attention" for mine in local]
    for name in names:
        if name not in KINDS:
            raise ValueError(f"{where}: layer type {name!r} is not supported; {', '.join(KINDS)} are")
    kinds = [KINDS[name] for name in names]
    if len(kinds) != num_layers:
        raise ValueError(f"{where}: layer_types has {len(kinds)} entries for num_hidden_layers={num_layers}")
    if "window" not in kinds:
        return {}
    length = next(n for n in range(1, num_layers + 1) if kinds == (kinds[:n] * num_layers)[:num_layers])
    return {"layers": tuple(kinds[:length]), "window": window}


def _rotary(fields: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Bases and scaling, from transformers 5's rope_parameters or the fields before it."""
    given = fields.get("rope_parameters") or {}
    if kind == "gemma3_text":
        everywhere, local = given.get("full_attention", {}), given.get("sliding_attention", {})
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"{where}: rope_type {local['rope_type']!r} of sliding_attention is not supported; default is"
            )
        rest = {"rope_local_theta": float(local.get("rope_theta", fields["rope_local_base_freq"]))}
    else:
        everywhere, rest = given, {}
    scaling = everywhere or fields.get("rope_scaling") or {}
    theta = float(everywhere.get("rope_theta", fields["rope_theta"]))
    if kind.startswith("deepseek"):
        scaling = _without_mscale(scaling)
    return {"rope_theta": theta, "rope_scaling": _scaling(scaling, fields, where), **rest}


def _without_mscale(given: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSeek's scale of attention logits and of cos and sin, as our two names for them."""
    rest = {name: value for name, value in given.items() if name not in ("mscale", "mscale_all_dim")}
    one, all_dim = given.get("mscale") or 0.0, given.get("mscale_all_dim") or 0.0
    if one and all_dim and rest.get("attention_factor") is None:
        log = 0.1 * math.log(given["factor"])
        rest["attention_factor"] = (one * log + 1.0) / (all_dim * log + 1.0)
    return rest | {"logit_mscale": float(all_dim)}


def _scaling(given: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> RopeScaling:
    kind = given.get("rope_type", given.get("type", "default"))
    for name, neutral in {
        "partial_rotary_factor": 1.0,
        "truncate": True,
        "mscale": None,
        "mscale_all_dim": None,
    }.items():
        if given.get(name, neutral) != neutral:
            raise ValueError(f"{where}: rope {name}={given[name]} is not supported; {neutral} is")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(given["factor"]))
    original = given.get("original_max_position_embeddings", fields["max_position_embeddings"])
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(given["factor"]),
            original_length=original,
            low_frequency_factor=float(given["low_freq_factor"]),
            high_frequency_factor=float(given["high_freq_factor"]),
        )
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=float(given["factor"]),
            original_length=original,
            beta_fast=float(given.get("beta_fast") or 32.0),
            beta_slow=float(given.get("beta_slow") or 1.0),
            attention_factor=given.get("attention_factor"),
            logit_mscale=given.get("logit_mscale", 0.0),
        )
    raise ValueError(f"{where}: rope_type {kind!r} is not supported; default, linear, llama3, yarn are")


def model_type(config: ModelConfig) -> str:
    """The Hugging Face model type that is nearest to a config."""
    if config.positions == "learned":
        return "gpt2"
    if config.kv_rank:
        return "deepseek_v3" if config.router == "sigmoid" else "deepseek_v2"
    if config.num_experts:
        return "mixtral" if config.router == "softmax_after" else "qwen3_moe"
    if config.norm_zero_centered:
        return "gemma" if not config.post_norms else "gemma3_text" if config.qk_norm else "gemma2"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    return "llama" if config.window is None else "mistral"


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, in the fields that transformers 4 and 5 both read; ValueError where none means it."""
    kind = model_type(config)
    fields = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], "vocab_size": config.vocab_size}
    fields |= _gpt2_json(config) if kind == "gpt2" else _llama_json(config, kind)
    fields["tie_word_embeddings"] = config.tied
    back = dataclasses.replace(from_json(fields), **{name: getattr(config, name) for name in OURS_ALONE})
    unread = ["rope_theta", "rope_scaling", "rope_local_theta"] if kind == "gpt2" else []
    unread += ["ffn_dim"] if config.num_experts and not config.num_dense_layers else []
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(back, field.name)
        if field.name == "layers":
            ours, theirs = config.layer_kinds, back.layer_kinds
        if ours != theirs and field.name not in unread:
            raise ValueError(
                f"no Hugging Face model is like this one: model_type {kind} is nearest but has "
                f"{field.name}={theirs}, not {ours}"
            )
    return fields


def _their_activation(config: ModelConfig) -> str:
    return next(name for name, ours in reversed(ACTIVATIONS.items()) if ours == config.activation and name != "swish")


def _gpt2_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_dim,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else _their_activation(config),
        "scale_attn_weights": config.query_scale is None,
    }


def _llama_json(config: ModelConfig, kind: str) -> dict[str, Any]:
    act = _their_activation(config)
    fields = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": act,
        "attention_bias": config.out_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_json(config.rope_scaling),
    }
    if kind in WINDOWED:
        fields["sliding_window"] = config.window
    if kind in WINDOWED and kind not in ("mistral", "mixtral"):  # with layer_types transformers takes another model
        names = {ours: theirs for theirs, ours in KINDS.items()}
        fields["layer_types"] = [names[kind] for kind in config.layer_kinds]
        fields["use_sliding_window"] = config.window is not None
    if kind in ("gemma2", "gemma3_text"):
        scalar = config.head_dim if config.query_scale is None else round(config.query_scale**-2)
        fields |= {"hidden_activation": act, "query_pre_attn_scalar": scalar}
        fields |= {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.final_softcap}
    if kind == "gemma3_text":
        fields["rope_local_base_freq"] = config.rope_local_theta
    return fields | (_experts_json(config, kind) if config.num_experts else {}) | _latent_json(config)


def _experts_json(config: ModelConfig, kind: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_experts_per_tok": config.experts_per_token}
    if kind == "mixtral":
        return fields | {"num_local_experts": config.num_experts, "intermediate_size": config.expert_ffn_dim}
    fields |= {"moe_intermediate_size": config.expert_ffn_dim, "norm_topk_prob": config.router_normalize}
    if kind == "qwen3_moe":
        dense = list(range(config.num_dense_layers))
        return fields | {"num_experts": config.num_experts, "mlp_only_layers": dense, "decoder_sparse_step": 1}
    return fields | {
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.shared_ffn_dim // config.expert_ffn_dim,
        "first_k_dense_replace": config.num_dense_layers,
        "routed_scaling_factor": config.router_scale,
        "n_group": config.router_groups,
        "topk_group": config.router_top_groups,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        **{name: NEUTRAL_IN[kind][name] for name in ("scoring_func", "topk_method")},
    }


def _latent_json(config: ModelConfig) -> dict[str, Any]:
    if not config.kv_rank:
        return {}
    return {
        "kv_lora_rank": config.kv_rank,
        "q_lora_rank": config.q_rank or None,
        "qk_nope_head_dim": config.head_dim - config.rope_dim,
        "qk_rope_head_dim": config.rope_dim,
        "v_head_dim": config.value_dim or config.head_dim,
        "head_dim": config.rope_dim,  # what transformers calls so
    }


def _scaling_json(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    if scaling.kind == "yarn":
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.logit_mscale:
            fields["mscale_all_dim"] = scaling.logit_mscale
        if scaling.logit_mscale and scaling.attention_factor == 1.0:
            fields["mscale"] = scaling.logit_mscale
        elif scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
    return fields
