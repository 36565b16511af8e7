"""GGUF in: llama.cpp's metadata as a ModelConfig, its tensors as our parameters. Knows no container and no tokenizer.

Names and layouts follow llama.cpp's convert_hf_to_gguf.py: it permutes the q and k rows of `llama` models for rotary
pairs (2h, 2h + 1), which the layout "(N h two) D -> D N (two h)" undoes; it stores Gemma's norm scales with their 1.
"""

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from model import gguf_file, weights
from model.config import LayerKind, ModelConfig, RopeScaling
from model.layers import rope_frequencies
from model.parameters import Parameters
from model.weights import Foreign, Slot
from parallel.config import AxisRules

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "gpt2")
SPARE = r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight"  # recomputed from the config, or checked against it
NAMES = {
    "embedding.tokens": "token_embd.weight",
    "embedding.positions": "position_embd.weight",
    "head": "output.weight",
    "norm.scale": "output_norm.weight",
    "norm.bias": "output_norm.bias",
    "layers.attention_norm.scale": "blk.{l}.attn_norm.weight",
    "layers.attention_norm.bias": "blk.{l}.attn_norm.bias",
    "layers.attention.q": "blk.{l}.attn_q.weight",
    "layers.attention.q_bias": "blk.{l}.attn_q.bias",
    "layers.attention.q_norm.scale": "blk.{l}.attn_q_norm.weight",
    "layers.attention.k": "blk.{l}.attn_k.weight",
    "layers.attention.k_bias": "blk.{l}.attn_k.bias",
    "layers.attention.k_norm.scale": "blk.{l}.attn_k_norm.weight",
    "layers.attention.v": "blk.{l}.attn_v.weight",
    "layers.attention.v_bias": "blk.{l}.attn_v.bias",
    "layers.attention.o": "blk.{l}.attn_output.weight",
    "layers.attention.o_bias": "blk.{l}.attn_output.bias",
    "layers.attention_post_norm.scale": "blk.{l}.post_attention_norm.weight",
    "layers.ffn_norm.scale": "blk.{l}.ffn_norm.weight",
    "layers.ffn_norm.bias": "blk.{l}.ffn_norm.bias",
    "layers.ffn.up": "blk.{l}.ffn_up.weight",
    "layers.ffn.up_bias": "blk.{l}.ffn_up.bias",
    "layers.ffn.gate": "blk.{l}.ffn_gate.weight",
    "layers.ffn.down": "blk.{l}.ffn_down.weight",
    "layers.ffn.down_bias": "blk.{l}.ffn_down.bias",
    "layers.ffn_post_norm.scale": "blk.{l}.post_ffw_norm.weight",
}
# All experts of a layer in one tensor.
EXPERTS_NAMES = {
    "layers.ffn.router": "blk.{l}.ffn_gate_inp.weight",
    "layers.ffn.gate": "blk.{l}.ffn_gate_exps.weight",
    "layers.ffn.up": "blk.{l}.ffn_up_exps.weight",
    "layers.ffn.down": "blk.{l}.ffn_down_exps.weight",
}
EXPERTS_LAYOUTS = {
    "layers.ffn.router": "E D -> D E",
    "layers.ffn.gate": "E f D -> E D f",
    "layers.ffn.up": "E f D -> E D f",
    "layers.ffn.down": "E D f -> E f D",
}
FUSED_NAMES = {f"layers.attention.{mine}": "blk.{l}.attn_qkv.weight" for mine in "qkv"} | {
    f"layers.attention.{mine}_bias": "blk.{l}.attn_qkv.bias" for mine in "qkv"
}
PERMUTED = {
    "layers.attention.q": "(N h two) D -> D N (two h)",
    "layers.attention.q_bias": "(N h two) -> N (two h)",
    "layers.attention.k": "(K h two) D -> D K (two h)",
    "layers.attention.k_bias": "(K h two) -> K (two h)",
}
GEMMA = {
    "norm_zero_centered": True,
    "embed_scale": True,
    "activation": "gelu_tanh",
}


def load(
    path: pathlib.Path | str, mesh: Mesh, rules: AxisRules, *, scan_layers: bool = True
) -> tuple[ModelConfig, Parameters]:
    """The config and float32 parameters of a GGUF file, layers stacked or (`scan_layers=False`) apart.

    Raises ValueError for a file that is no GGUF, truncated, or of a model that our decoder does not express.
    """
    file = gguf_file.open_file(path)
    config = config_of(file, scan_layers=scan_layers)
    return config, load_parameters(file, config, mesh, rules)


def load_parameters(file: gguf_file.File, config: ModelConfig, mesh: Mesh, rules: AxisRules) -> Parameters:
    """The float32 parameters of an open file, in the shape that `config_of` found in it."""
    shapes = {name: block.shape for name, block in file.blocks.items()}
    foreign = Foreign(str(file.path), shapes, functools.lru_cache(maxsize=1)(file.read))  # shards follow one another
    places = slots(config, file.metadata["general.architecture"])
    return weights.assemble(config, places, foreign, mesh, rules, spare=SPARE)


def config_of(file: gguf_file.File, *, scan_layers: bool = True) -> ModelConfig:
    """The shape of the model in a file, from its metadata and, for biases and tying, from which tensors there are."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{file.path}: architecture {architecture!r} is not supported; {', '.join(ARCHITECTURES)} are")
    if file.metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{file.path} is one of {file.metadata['split.count']} parts; join them first: llama-gguf-split --merge"
        )
    values = {
        key.removeprefix(architecture + "."): _short(value)
        for key, value in file.metadata.items()
        if key.startswith(architecture + ".")
    }
    try:
        common, family = _common(values, file), _family(values, architecture, file)
        return ModelConfig(**common, **family, **_experts(values, architecture, file), scan_layers=scan_layers)
    except KeyError as error:
        raise ValueError(f"{file.path} lacks the metadata {architecture}.{error.args[0]}") from error


def _short(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _common(values: Mapping[str, Any], file: gguf_file.File) -> dict[str, Any]:
    """What every architecture says in the same way."""
    heads = values["attention.head_count"]
    kv_heads = values.get("attention.head_count_kv", heads)
    ffn_dim = values["feed_forward_length"]
    for name, value in {"head counts": heads, "KV head counts": kv_heads, "FFN widths": ffn_dim}.items():
        if isinstance(value, list):
            raise ValueError(f"{file.path}: layers have different {name} ({value[:3]}…); one for all is supported")
    head_dim = values.get("attention.key_length", values["embedding_length"] // heads)
    if values.get("attention.value_length", head_dim) != head_dim:
        raise ValueError(
            f"{file.path}: keys are {head_dim} wide, values {values['attention.value_length']}; must be equal"
        )
    if values.get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"{file.path}: rotary positions on {values['rope.dimension_count']} of {head_dim} dims of a head"
        )
    if "token_embd.weight" not in file.blocks:
        raise ValueError(f"{file.path} lacks tensor token_embd.weight; is it a model of text?")
    vocab_size, _ = file.blocks["token_embd.weight"].shape
    return {
        "vocab_size": vocab_size,
        "embed_dim": values["embedding_length"],
        "num_layers": values["block_count"],
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_dim": ffn_dim,
        "max_length": values["context_length"],
        "rope_theta": values.get("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(values, head_dim, file),
        "tied": "output.weight" not in file.blocks,
        "qkv_bias": not {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}.isdisjoint(file.blocks),
        "out_bias": "blk.0.attn_output.bias" in file.blocks,
        "ffn_bias": "blk.0.ffn_up.bias" in file.blocks,
        "qk_norm": "blk.0.attn_q_norm.weight" in file.blocks,
        "post_norms": "blk.0.post_attention_norm.weight" in file.blocks,
    }


def _family(values: Mapping[str, Any], architecture: str, file: gguf_file.File) -> dict[str, Any]:
    """What the architecture's name implies."""
    if architecture == "gpt2":
        norm_eps = values["attention.layer_norm_epsilon"]
        return {
            "norm": "layer",
            "norm_eps": norm_eps,
            "positions": "learned",
            "gated": False,
            "activation": "gelu_tanh",
        }
    family: dict[str, Any] = {"norm_eps": values["attention.layer_norm_rms_epsilon"]}
    window = values.get("attention.sliding_window")
    if architecture.startswith("gemma"):
        family |= GEMMA
    if architecture in ("gemma2", "gemma3"):
        family |= {"layers": _kinds(values, 2 if architecture == "gemma2" else 6), "window": window}
        if values["block_count"] == (46 if architecture == "gemma2" else 62):  # the 27B models scale by D/N, not H
            family["query_scale"] = (values["embedding_length"] / values["attention.head_count"]) ** -0.5
    elif window:
        family |= {"layers": ("window",), "window": window}
    if architecture == "gemma2":
        family |= {
            "attention_softcap": values.get("attn_logit_softcapping", 50.0),
            "final_softcap": values.get("final_logit_softcapping", 30.0),
        }
    if architecture == "gemma3":
        family |= {"rope_local_theta": values.get("rope.freq_base_swa", 10_000.0)}
        family |= {"final_softcap": values.get("final_logit_softcapping") or None}
    return family


def _experts(values: Mapping[str, Any], architecture: str, file: gguf_file.File) -> dict[str, Any]:
    """Mixtral, which is llama with experts as wide as its FFN would be, and Qwen 3's mixtures; nothing if dense."""
    if not values.get("expert_count", 0):
        return {}
    if architecture not in ("llama", "qwen3moe"):
        raise ValueError(
            f"{file.path}: {values['expert_count']} experts in {architecture}; llama and qwen3moe may have them"
        )
    return {
        "num_experts": values["expert_count"],
        "experts_per_token": values["expert_used_count"],
        "expert_ffn_dim": values["feed_forward_length" if architecture == "llama" else "expert_feed_forward_length"],
        "router": "softmax_after" if architecture == "llama" else "softmax",
    }


def _kinds(values: Mapping[str, Any], period: int) -> tuple[LayerKind, ...]:
    """Local layers with a global one last in each period; a file may say so itself, by number or layer by layer."""
    pattern = values.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):
        return tuple("window" if local else "global" for local in pattern)
    return ("window",) * (pattern - 1) + ("global",)


def _scaling(values: Mapping[str, Any], head_dim: int, file: gguf_file.File) -> RopeScaling:
    """Rotary scaling from its metadata or, as Llama 3 has it, from a tensor of factors."""
    if "rope_freqs.weight" in file.blocks:
        return _llama3(file.read("rope_freqs.weight"), head_dim, values["rope.freq_base"], file.path)
    if not {"rope_factors_long.weight", "rope_factors_short.weight"}.isdisjoint(file.blocks):
        raise ValueError(f"{file.path}: longrope scaling is not supported; linear, llama3 and yarn are")
    kind, factor = values.get("rope.scaling.type", "none"), values.get("rope.scaling.factor", 1.0)
    if kind == "none" or factor == 1.0:
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind != "yarn":
        raise ValueError(f"{file.path}: rope scaling {kind!r} is not supported; linear, llama3 and yarn are")
    times = values.get("rope.scaling.yarn_attn_factor", values.get("rope.scaling.attn_factor"))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_length=values["rope.scaling.original_context_length"],
        beta_fast=values.get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=values.get("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=None if times is None else times * (0.1 * math.log(factor) + 1.0),
    )


def _llama3(divisors: np.ndarray, head_dim: int, theta: float, path: pathlib.Path) -> RopeScaling:
    """The scaling whose frequencies are the plain ones over these divisors, as Llama 3.1 and 3.2 have them.

    The slowest pair keeps a share of its frequency and stretches the rest: 1 / divisor = kept + (1 - kept) / factor.
    """
    plain, _ = rope_frequencies(head_dim, theta, RopeScaling())
    unstretched, _ = rope_frequencies(head_dim, theta, RopeScaling(kind="llama3", factor=math.inf))
    kept = unstretched[-1] / plain[-1]
    scaling = RopeScaling(kind="llama3", factor=round((1 - kept) / (1 / float(divisors[-1]) - kept), 3))
    stretched, _ = rope_frequencies(head_dim, theta, scaling)
    if not np.allclose(np.divide(plain, stretched), divisors, rtol=1e-4):
        raise ValueError(f"{path}: rope_freqs.weight does not follow Llama 3's rule with factor {scaling.factor:g}")
    return scaling


def slots(config: ModelConfig, architecture: str) -> list[Slot]:
    """Where each tensor of a GGUF file goes."""
    if architecture == "gpt2":
        return weights.slots(config, NAMES | FUSED_NAMES, weights.LINEAR | weights.FUSED_LINEAR)
    names, layouts = NAMES, weights.LINEAR | (PERMUTED if architecture == "llama" else {})
    if config.num_experts:
        names, layouts = names | EXPERTS_NAMES, layouts | EXPERTS_LAYOUTS
    return weights.slots(config, names, layouts, added_to_norms=float(config.norm_zero_centered))
