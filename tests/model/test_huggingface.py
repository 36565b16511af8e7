"""Checkpoints: what is loaded and saved again is the same bit for bit; what is wrong with one is named in one line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import huggingface, weights
from model.config import ModelConfig
from model.huggingface_config import from_json
from model.parameters import abstract, shardings
from model.weights import leaves
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from tests.model.cases import FIELDS, draw
from tests.model.test_parity import GOLDEN

RULES = AxisRules()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=4))


def tensors_of(case, dtype="float32"):
    """The drawn tensors of a case under their Hugging Face names."""
    about = json.loads((GOLDEN / f"{case}.json").read_text())
    kind = about["config"]["model_type"]
    return {name: draw(name, tuple(shape), kind).astype(jnp.dtype(dtype)) for name, shape in about["shapes"].items()}


def write_checkpoint(folder, case, tensors):
    """A single-file checkpoint, written by the safetensors package."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(FIELDS[case]))
    return folder


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("case", FIELDS)
def test_round_trip_is_identical(case, mesh, tmp_path):
    tensors = tensors_of(case)
    config, parameters = huggingface.load(write_checkpoint(tmp_path / "in", case, tensors), mesh, RULES)
    huggingface.save(tmp_path / "out", config, parameters, dtype="float32")
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    assert huggingface.read_config(tmp_path / "out") == config


@pytest.mark.parametrize("case", ["gemma3", "gpt2"])
def test_sharded_round_trip_in_bfloat16(case, mesh, tmp_path):
    tensors = tensors_of(case, "bfloat16")
    config, parameters = huggingface.load(
        write_checkpoint(tmp_path / "in", case, tensors), mesh, RULES, scan_layers=False
    )
    huggingface.save(tmp_path / "out", config, parameters, dtype="bfloat16", max_shard_bytes=4000)
    index = json.loads((tmp_path / "out" / huggingface.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    found = {}
    for file in files:
        part = load_file(tmp_path / "out" / file)
        assert len(part) == 1 or sum(array.nbytes for array in part.values()) <= 4000
        assert all(index["weight_map"][name] == file for name in part)
        found |= part
    assert_same_bits(found, tensors)
    again, same = huggingface.load(tmp_path / "out", mesh, RULES, scan_layers=False)
    assert again == config
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(parameters), strict=True))


def test_stacked_and_apart_hold_the_same(mesh, tmp_path):
    folder = write_checkpoint(tmp_path, "llama", tensors_of("llama"))
    _, stacked = huggingface.load(folder, mesh, RULES)
    _, apart = huggingface.load(folder, mesh, RULES, scan_layers=False)
    stacked, apart = dict(leaves(stacked)), dict(leaves(apart))
    for l in range(3):
        assert np.array_equal(stacked["layers.attention.q"][l], apart[f"layers.{l}.attention.q"])
    assert np.array_equal(stacked["head"], apart["head"])


def test_each_device_holds_its_slice(tmp_path):
    folder = write_checkpoint(tmp_path, "llama", tensors_of("llama"))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, parameters = huggingface.load(folder, mesh, RULES)
    q = parameters["layers"]["attention"]["q"]  # L D N H: D over fsdp, N over tensor
    assert q.sharding.shard_shape(q.shape) == (3, 12, 2, 8)
    _, whole = huggingface.load(folder, make_mesh(MeshConfig(), jax.devices()[:1]), RULES)
    assert np.array_equal(q, whole["layers"]["attention"]["q"])


def test_only_the_needed_rows_are_read(monkeypatch, mesh, tmp_path):
    """A device's slice of each tensor is cut before it is converted: no float32 copy of a whole one arises."""
    folder = write_checkpoint(tmp_path, "llama", tensors_of("llama", "bfloat16"))
    made = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, *rest: made.append(shape) or empty(shape, *rest))
    huggingface.load(folder, mesh, RULES)
    assert [3, 24 // 4, 40] in made  # ffn.up, D over fsdp
    assert [3, 24, 40] not in made


def test_half_precision_is_widened(mesh, tmp_path):
    tensors = {name: array.astype(np.float16) for name, array in tensors_of("qwen3").items()}
    _, parameters = huggingface.load(write_checkpoint(tmp_path, "qwen3", tensors), mesh, RULES)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
    assert np.array_equal(parameters["head"], tensors["lm_head.weight"].astype(np.float32))


def test_buffers_and_a_tied_head_are_tolerated(mesh, tmp_path):
    tensors = tensors_of("smollm2")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    config, _ = huggingface.load(write_checkpoint(tmp_path, "smollm2", tensors), mesh, RULES)
    assert config.tied
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        huggingface.load(write_checkpoint(tmp_path, "smollm2", tensors), mesh, RULES)


def test_names_without_prefix_and_masks_are_read(mesh, tmp_path):
    """The hub's gpt2 is like that."""
    tensors = {name.removeprefix("transformer."): array for name, array in tensors_of("gpt2").items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
    _, parameters = huggingface.load(write_checkpoint(tmp_path, "gpt2", tensors), mesh, RULES)
    assert np.array_equal(parameters["embedding"]["tokens"], tensors["wte.weight"])


def test_a_second_tokens_layer_is_left_out(mesh, tmp_path):
    tensors = tensors_of("deepseek_v3")
    tensors["model.layers.3.eh_proj.weight"] = np.zeros((24, 48), np.float32)
    config, parameters = huggingface.load(write_checkpoint(tmp_path, "deepseek_v3", tensors), mesh, RULES)
    assert (config.num_layers, len(parameters["layers"]["attention"]["k"])) == (3, 2)
    tensors["model.layers.4.eh_proj.weight"] = tensors.pop("model.layers.3.eh_proj.weight")
    with pytest.raises(ValueError, match=r"holds tensor model.layers.4.eh_proj.weight"):
        huggingface.load(write_checkpoint(tmp_path, "deepseek_v3", tensors), mesh, RULES)


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3"])
def test_experts_apart_and_together_are_the_same(case, mesh, tmp_path):
    """Names in which transformers 5 keeps them in memory."""
    tensors = tensors_of(case)
    _, apart = huggingface.load(write_checkpoint(tmp_path / "apart", case, tensors), mesh, RULES)
    together = {name.replace("block_sparse_moe", "mlp"): array for name, array in tensors.items()}
    gate, up, down = ("w1", "w3", "w2") if case == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name in [name for name in together if f"experts.0.{gate}" in name]:
        layer, _ = name.split("experts.0.")
        experts = range(4 if case == "mixtral" else 8)
        gates, ups, downs = (
            [together.pop(f"{layer}experts.{e}.{mine}.weight") for e in experts] for mine in (gate, up, down)
        )
        pairs = [np.concatenate(pair) for pair in zip(gates, ups, strict=True)]
        together |= {f"{layer}experts.gate_up_proj": np.stack(pairs), f"{layer}experts.down_proj": np.stack(downs)}
    _, same = huggingface.load(write_checkpoint(tmp_path / "together", case, together), mesh, RULES)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(apart), strict=True))


def test_each_expert_stands_in_its_place(mesh, tmp_path):
    tensors = tensors_of("qwen3_moe")
    _, parameters = huggingface.load(write_checkpoint(tmp_path, "qwen3_moe", tensors), mesh, RULES)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"  # the second layer with experts: layer 0 is dense
    assert np.array_equal(parameters["layers"]["ffn"]["up"][1, 5], tensors[name].T)
    assert np.array_equal(parameters["dense_layers"]["ffn"]["up"][0], tensors["model.layers.0.mlp.up_proj.weight"].T)


def test_rotary_pairs_are_brought_apart(mesh, tmp_path):
    """DeepSeek turns rows 2h and 2h + 1 of the last four of each head, we turn h and h + 2."""
    tensors = tensors_of("deepseek_v3")
    _, parameters = huggingface.load(write_checkpoint(tmp_path, "deepseek_v3", tensors), mesh, RULES)
    shared = tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][10:]
    assert np.array_equal(parameters["dense_layers"]["attention"]["k_rope"][0], shared[[0, 2, 1, 3]].T)
    head = tensors["model.layers.2.self_attn.q_b_proj.weight"].reshape(4, 12, 12)[3]
    assert np.array_equal(parameters["layers"]["attention"]["q_rope"][1][:, 3], head[8:][[0, 2, 1, 3]].T)
    assert np.array_equal(parameters["layers"]["attention"]["q"][1][:, 3], head[:8].T)


def test_wrong_tensors_are_named(mesh, tmp_path):
    def refused(change, match):
        tensors = tensors_of("llama")
        change(tensors)
        with pytest.raises(ValueError, match=match):
            huggingface.load(write_checkpoint(tmp_path, "llama", tensors), mesh, RULES)

    up = "model.layers.1.mlp.up_proj.weight"
    refused(lambda t: t.pop(up), rf"lacks tensor {up}")
    refused(lambda t: t.update(extra=np.zeros(2, np.float32)), r"holds tensor extra, for which")
    refused(lambda t: t.update({up: np.zeros((40, 23), np.float32)}), r"has shape \(40, 23\) where .* \(40, 24\)")
    refused(lambda t: t.update({up: np.zeros((40, 24), np.int32)}), r"up_proj.weight is I32; F64, F32, F16, BF16 are")


def test_missing_and_truncated_files_are_named(mesh, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        huggingface.load(tmp_path, mesh, RULES)
    with pytest.raises(FileNotFoundError, match=r"is no folder and no file"):
        huggingface._files(tmp_path / "nowhere")
    folder = write_checkpoint(tmp_path / "in", "llama", tensors_of("llama"))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for kept in (len(whole) - 100, 50, 3, 0):
        file.write_bytes(whole[:kept])
        with pytest.raises(
            ValueError, match=rf"model.safetensors has {kept} bytes but its .* byte \d+; it is truncated"
        ):
            huggingface.load(folder, mesh, RULES)
    file.write_bytes(b"\x10" + bytes(7) + b"not json at all.")
    with pytest.raises(ValueError, match=r"is no safetensors file"):
        huggingface.load(folder, mesh, RULES)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        huggingface.load(folder, mesh, RULES)


def test_a_missing_shard_is_named(mesh, tmp_path):
    folder = write_checkpoint(tmp_path / "in", "llama", tensors_of("llama"))
    config, parameters = huggingface.load(folder, mesh, RULES)
    huggingface.save(tmp_path / "out", config, parameters, dtype="float32", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"lacks {shards[1].name}: .* {len(shards)} files and {len(shards) - 1}"
    ):
        huggingface.load(tmp_path / "out", mesh, RULES)


def test_weights_are_not_overwritten(mesh, tmp_path):
    folder = write_checkpoint(tmp_path, "llama", tensors_of("llama"))
    before = (folder / "model.safetensors").read_bytes()
    config, parameters = huggingface.load(folder, mesh, RULES)
    with pytest.raises(FileExistsError, match=r"already holds weights"):
        huggingface.save(folder, config, parameters, dtype="float32")
    assert (folder / "model.safetensors").read_bytes() == before


def test_our_own_models_are_exported(mesh, tmp_path):
    """A run's model, never seen by transformers: what the quickstart trains is a Qwen 3."""
    config = ModelConfig(
        vocab_size=64,
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=24,
        max_length=32,
        rope_theta=1e4,
        norm_eps=1e-6,
        qk_norm=True,
    )
    random = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf, where: jax.device_put(random.standard_normal(leaf.shape, np.float32), where),
        abstract(config).shapes,
        shardings(config, mesh, RULES),
    )
    huggingface.save(tmp_path, config, parameters, dtype="float32", token_ids={"eos_token_id": 3})
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["model_type"], fields["eos_token_id"]) == ("qwen3", 3)
    again, same = huggingface.load(tmp_path, mesh, RULES)
    assert again == config
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(parameters), strict=True))


@pytest.mark.parametrize("case", FIELDS)
def test_every_leaf_of_every_family_has_a_name(case):
    """Stacked or apart."""
    for scan_layers in (True, False):
        config = dataclasses.replace(from_json(FIELDS[case]), scan_layers=scan_layers)
        by_leaf = weights.by_leaf(huggingface.slots(config), config)
        assert by_leaf.keys() == dict(leaves(abstract(config).shapes)).keys()
