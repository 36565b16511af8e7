"""Hugging Face checkpoints in and out: a folder of safetensors and a config.json. Knows no tokenizer files.

Loading maps the files and builds each parameter on its sharding, so that a host reads only the slices it holds. Saving
writes one tensor at a time; what is loaded and saved again is the same bit for bit.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from model import safetensors_file, weights
from model.config import ModelConfig
from model.huggingface_config import from_json, model_type, to_json
from model.parameters import Parameters
from model.weights import Foreign, Slot
from parallel.config import AxisRules

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

LLAMA_NAMES = {
    "embedding.tokens": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm.scale": "model.norm.weight",
    "layers.attention_norm.scale": "model.layers.{l}.input_layernorm.weight",
    "layers.attention.q": "model.layers.{l}.self_attn.q_proj.weight",
    "layers.attention.q_bias": "model.layers.{l}.self_attn.q_proj.bias",
    "layers.attention.q_norm.scale": "model.layers.{l}.self_attn.q_norm.weight",
    "layers.attention.k": "model.layers.{l}.self_attn.k_proj.weight",
    "layers.attention.k_bias": "model.layers.{l}.self_attn.k_proj.bias",
    "layers.attention.k_norm.scale": "model.layers.{l}.self_attn.k_norm.weight",
    "layers.attention.v": "model.layers.{l}.self_attn.v_proj.weight",
    "layers.attention.v_bias": "model.layers.{l}.self_attn.v_proj.bias",
    "layers.attention.o": "model.layers.{l}.self_attn.o_proj.weight",
    "layers.attention.o_bias": "model.layers.{l}.self_attn.o_proj.bias",
    "layers.ffn_norm.scale": "model.layers.{l}.post_attention_layernorm.weight",
    "layers.ffn.up": "model.layers.{l}.mlp.up_proj.weight",
    "layers.ffn.gate": "model.layers.{l}.mlp.gate_proj.weight",
    "layers.ffn.down": "model.layers.{l}.mlp.down_proj.weight",
}
# With norms on both sides of each sublayer, one name of Llama's means another norm.
POST_NORM_NAMES = {
    "layers.attention_post_norm.scale": "model.layers.{l}.post_attention_layernorm.weight",
    "layers.ffn_norm.scale": "model.layers.{l}.pre_feedforward_layernorm.weight",
    "layers.ffn_post_norm.scale": "model.layers.{l}.post_feedforward_layernorm.weight",
}
GPT2_NAMES = {
    "embedding.tokens": "transformer.wte.weight",
    "embedding.positions": "transformer.wpe.weight",
    "head": "lm_head.weight",
    "norm.scale": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "layers.attention_norm.scale": "transformer.h.{l}.ln_1.weight",
    "layers.attention_norm.bias": "transformer.h.{l}.ln_1.bias",
    "layers.attention.q": "transformer.h.{l}.attn.c_attn.weight",
    "layers.attention.k": "transformer.h.{l}.attn.c_attn.weight",
    "layers.attention.v": "transformer.h.{l}.attn.c_attn.weight",
    "layers.attention.q_bias": "transformer.h.{l}.attn.c_attn.bias",
    "layers.attention.k_bias": "transformer.h.{l}.attn.c_attn.bias",
    "layers.attention.v_bias": "transformer.h.{l}.attn.c_attn.bias",
    "layers.attention.o": "transformer.h.{l}.attn.c_proj.weight",
    "layers.attention.o_bias": "transformer.h.{l}.attn.c_proj.bias",
    "layers.ffn_norm.scale": "transformer.h.{l}.ln_2.weight",
    "layers.ffn_norm.bias": "transformer.h.{l}.ln_2.bias",
    "layers.ffn.up": "transformer.h.{l}.mlp.c_fc.weight",
    "layers.ffn.up_bias": "transformer.h.{l}.mlp.c_fc.bias",
    "layers.ffn.down": "transformer.h.{l}.mlp.c_proj.weight",
    "layers.ffn.down_bias": "transformer.h.{l}.mlp.c_proj.bias",
}
# GPT-2's matrices stand [in, out].
GPT2_LAYOUTS = {
    "layers.attention.q": "D [(N H)]+(K H)+(K H) -> D N H",
    "layers.attention.k": "D (N H)+[(K H)]+(K H) -> D K H",
    "layers.attention.v": "D (N H)+(K H)+[(K H)] -> D K H",
    "layers.attention.o": "(N H) D -> N H D",
    "layers.ffn.up": "D F -> D F",
    "layers.ffn.down": "F D -> F D",
}
# DeepSeek's attention; without a latent for queries they come from q_proj.
LATENT_NAMES = {
    "layers.attention.q_down": "model.layers.{l}.self_attn.q_a_proj.weight",
    "layers.attention.q_norm.scale": "model.layers.{l}.self_attn.q_a_layernorm.weight",
    "layers.attention.q": "model.layers.{l}.self_attn.q_b_proj.weight",
    "layers.attention.q_rope": "model.layers.{l}.self_attn.q_b_proj.weight",
    "layers.attention.kv_down": "model.layers.{l}.self_attn.kv_a_proj_with_mqa.weight",
    "layers.attention.k_rope": "model.layers.{l}.self_attn.kv_a_proj_with_mqa.weight",
    "layers.attention.kv_norm.scale": "model.layers.{l}.self_attn.kv_a_layernorm.weight",
    "layers.attention.k": "model.layers.{l}.self_attn.kv_b_proj.weight",
    "layers.attention.v": "model.layers.{l}.self_attn.kv_b_proj.weight",
}
WHOLE_QUERY_NAMES = {f"layers.attention.{mine}": "model.layers.{l}.self_attn.q_proj.weight" for mine in ("q", "q_rope")}
# Experts as Qwen and DeepSeek name them, and as Mixtral does.
EXPERTS_NAMES = {
    "layers.ffn.router": "model.layers.{l}.mlp.gate.weight",
    "layers.ffn.router_bias": "model.layers.{l}.mlp.gate.e_score_correction_bias",
    "layers.ffn.gate": "model.layers.{l}.mlp.experts.{e}.gate_proj.weight",
    "layers.ffn.up": "model.layers.{l}.mlp.experts.{e}.up_proj.weight",
    "layers.ffn.down": "model.layers.{l}.mlp.experts.{e}.down_proj.weight",
    "layers.ffn.shared.gate": "model.layers.{l}.mlp.shared_experts.gate_proj.weight",
    "layers.ffn.shared.up": "model.layers.{l}.mlp.shared_experts.up_proj.weight",
    "layers.ffn.shared.down": "model.layers.{l}.mlp.shared_experts.down_proj.weight",
}
MIXTRAL_NAMES = {
    "layers.ffn.router": "model.layers.{l}.block_sparse_moe.gate.weight",
    "layers.ffn.gate": "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
    "layers.ffn.up": "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight",
    "layers.ffn.down": "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
}
# All experts of a layer in one tensor, gate and up in one: as transformers 5 has them in memory, and rarely on disk.
FUSED_NAMES = {
    "layers.ffn.gate": "model.layers.{l}.mlp.experts.gate_up_proj",
    "layers.ffn.up": "model.layers.{l}.mlp.experts.gate_up_proj",
    "layers.ffn.down": "model.layers.{l}.mlp.experts.down_proj",
}
FUSED_LAYOUTS = {
    "layers.ffn.gate": "E [f]+f D -> E D f",
    "layers.ffn.up": "E f+[f] D -> E D f",
    "layers.ffn.down": "E D f -> E f D",
}
# Buffers that some releases stored: rotary frequencies, GPT-2's causal masks.
BUFFERS = r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(masked_)?bias"


def slots(config: ModelConfig, *, fused: bool = False) -> list[Slot]:
    """Where each tensor of a checkpoint goes; `fused` is one whose experts are not apart."""
    if config.positions == "learned":
        return weights.slots(config, GPT2_NAMES, weights.LINEAR | weights.FUSED_LINEAR | GPT2_LAYOUTS)
    names, layouts = LLAMA_NAMES | (POST_NORM_NAMES if config.post_norms else {}), weights.LINEAR
    if config.kv_rank:
        names = names | LATENT_NAMES | ({} if config.q_rank else WHOLE_QUERY_NAMES)
        layouts = layouts | weights.LATENT_LINEAR
    if config.num_experts:
        experts = MIXTRAL_NAMES if model_type(config) == "mixtral" else EXPERTS_NAMES
        names = weights.with_dense_layers(names) | experts
        layouts = weights.with_dense_layers(layouts) | weights.EXPERTS_LINEAR
    if fused:
        names, layouts = names | EXPERTS_NAMES | FUSED_NAMES, layouts | FUSED_LAYOUTS
    return weights.slots(config, names, layouts)


def load(
    path: pathlib.Path | str, mesh: Mesh, rules: AxisRules, *, scan_layers: bool = True
) -> tuple[ModelConfig, Parameters]:
    """The config and float32 parameters of a folder (or of one .safetensors file beside its config.json).

    Raises ValueError for a model that our decoder does not express, and where files or tensors are missing, truncated,
    superfluous or of another shape; FileNotFoundError where there is no checkpoint.
    """
    path = pathlib.Path(path)
    config = read_config(path if path.is_dir() else path.parent, scan_layers=scan_layers)
    foreign = _foreign(path, _files(path))
    fused = any(name.endswith(".experts.gate_up_proj") for name in foreign.shapes)
    places, spare = slots(config, fused=fused), BUFFERS
    if config.kv_rank:
        spare += rf"|model\.layers\.{config.num_layers}\..*"  # DeepSeek's layer that predicts a second token
    if not foreign.shapes.keys().isdisjoint(("embed_tokens.weight", "wte.weight")):
        places = [_without_prefix(slot) for slot in places]  # a checkpoint of the model without its head
    if config.tied and "lm_head.weight" in foreign.shapes:
        _check_tied(foreign, next(slot.name for slot in places if slot.path == "embedding.tokens"))
        spare += r"|lm_head\.weight"
    return config, weights.assemble(config, places, foreign, mesh, rules, spare=spare)


def read_config(folder: pathlib.Path, *, scan_layers: bool = True) -> ModelConfig:
    """The model that a folder's config.json describes."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; a checkpoint has its config.json beside its weights") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    config = from_json(fields, str(path))
    return dataclasses.replace(config, scan_layers=scan_layers)


def _without_prefix(slot: Slot) -> Slot:
    return dataclasses.replace(slot, name=re.sub(r"^(model|transformer)\.", "", slot.name))


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The weight files of a checkpoint, each there."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder and no file")
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise FileNotFoundError(f"{path} has neither {SINGLE} nor {INDEX}; only safetensors are read")
        return [path / SINGLE]
    try:
        names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path / INDEX} is no index: it has no weight_map") from error
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {missing[0]}: {INDEX} lists {len(names)} files and {len(names) - len(missing)} are here; "
            "fetch the rest"
        )
    return [path / name for name in names]


def _foreign(path: pathlib.Path, files: list[pathlib.Path]) -> Foreign:
    opened = [safetensors_file.open_file(file) for file in files]
    holder = {name: file for file in opened for name in file.header}
    shapes = {name: file.shape(name) for name, file in holder.items()}
    return Foreign(str(path), shapes, lambda name: holder[name].read(name))


def _check_tied(foreign: Foreign, embedding: str) -> None:
    """A stored head must be the embedding table where the config says that they are one; some rows are compared."""
    head, table = foreign.read("lm_head.weight"), foreign.read(embedding)
    step = max(1, len(table) // 64)
    if head.shape != table.shape or not np.array_equal(head[::step], table[::step]):
        raise ValueError(
            f"{foreign.where}: tie_word_embeddings is true but lm_head.weight differs from {embedding}; "
            "set it to false in config.json"
        )


def save(
    folder: pathlib.Path | str,
    config: ModelConfig,
    parameters: Parameters,
    *,
    dtype: Literal["float32", "bfloat16"],
    max_shard_bytes: int = 5 * 10**9,
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and safetensors that transformers reads. `token_ids` adds fields like eos_token_id.

    Raises FileExistsError where the folder already holds weights, ValueError where no Hugging Face model is like ours.
    """
    folder, kind = pathlib.Path(folder), np.dtype(jnp.dtype(dtype))
    fields = (
        to_json(config) | {"torch_dtype": dtype, "bos_token_id": None, "eos_token_id": None} | dict(token_ids or {})
    )
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        raise FileExistsError(f"{folder} already holds weights; choose another folder or remove them first")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(config)
    shapes = {name: weights.foreign_shape(group[0].layout, config) for name, group in tensors.items()}
    leaves = dict(weights.leaves(parameters))

    def make(name: str) -> np.ndarray:
        return weights.to_foreign(tensors[name], [_filled(leaves, slot) for slot in tensors[name]], config)

    shards = _shards(shapes, kind.itemsize, max_shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        held = {name: shapes[name] for name in names}
        safetensors_file.write_file(folder / file, held, dict.fromkeys(held, kind), make)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * kind.itemsize
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _tensors(config: ModelConfig) -> dict[str, list[Slot]]:
    """For each tensor of the checkpoint the slots that fill it, layer by layer."""
    found: dict[str, list[Slot]] = {}
    for group in weights.by_leaf(slots(config), config).values():
        for slot in group:
            found.setdefault(slot.name, []).append(slot)
    return {name: sorted(group, key=lambda slot: weights.sides(slot.layout).part) for name, group in found.items()}


def _filled(leaves: Mapping[str, jax.Array], slot: Slot) -> np.ndarray:
    """What fills a slot, on the host."""
    return np.asarray(leaves[slot.path][slot.index])


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Names in order, in groups of at most `max_bytes` (a tensor larger than that stands alone)."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if groups[-1] and held + size > max_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
