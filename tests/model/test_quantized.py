"""A quantized decoder is the same from every source, in its folder and on every mesh; a damaged folder is one line."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import gguf, huggingface, quantized
from model.memory import Packed, Queries
from model.parameters import decoder, summed_dims
from ops.quantize import SCHEMES, Quantized, quantize
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from parallel.sharding import einsum, use
from tests.inference.small import GPT2, LLAMA, MIXTURE, ONE, mesh_of, parameters
from tests.model.test_gguf import case_of, write
from tests.tpu import tpu_devices

RULES = AxisRules()
TENSOR = MeshConfig(data=1, tensor=2)


def made(config, scheme, mesh=ONE):
    return quantized.quantized(config, parameters(config, mesh), scheme, mesh_of(mesh), RULES)


def assert_same(found, expected):
    """Every array alike, bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("family", [GPT2, MIXTURE])
def test_matrices_are_quantized_and_nothing_else(family):
    tree = made(family, "int4")
    layer = tree["layers"][0]
    kept = layer["attention_norm"]["scale"], tree["norm"]["scale"]
    kept += (
        (layer["ffn"]["router"],) if family is MIXTURE else (layer["ffn"]["up_bias"], tree["embedding"]["positions"])
    )
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}
    assert isinstance(layer["ffn"]["up"], Quantized)
    assert layer["ffn"]["up"].codes.dtype == jnp.uint4
    assert tree["embedding"]["tokens"].codes.dtype == tree["head"].codes.dtype == jnp.int8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_gives_back_every_bit(scheme, tmp_path):
    tree = made(MIXTURE, scheme)
    quantized.save(tmp_path, MIXTURE, tree, scheme)
    assert quantized.read_config(tmp_path) == (MIXTURE, scheme)
    assert_same(quantized.load(tmp_path, MIXTURE, scheme, mesh_of(ONE), RULES), tree)
    with pytest.raises(FileExistsError, match=r"already holds model\.safetensors"):
        quantized.save(tmp_path, MIXTURE, tree, scheme)


def test_an_odd_number_of_small_codes_is_packed():
    codes = np.arange(15).astype(jnp.uint4).reshape(3, 5)
    stored = quantized.packed(codes)
    assert (stored.dtype, stored.size) == (np.uint8, 8)
    np.testing.assert_array_equal(quantized.unpacked(stored, codes).astype(np.int32), codes.astype(np.int32))


def test_gguf_and_safetensors_are_the_same_source(tmp_path):
    config, tensors = case_of("llama")
    write(tmp_path / "model.gguf", "llama", config, tensors)
    mesh = mesh_of(ONE)
    config, from_gguf = gguf.load(tmp_path / "model.gguf", mesh, RULES, scan_layers=False)
    huggingface.save(tmp_path / "folder", config, from_gguf, dtype="float32")
    _, from_folder = huggingface.load(tmp_path / "folder", mesh, RULES, scan_layers=False)
    first, second = (quantized.quantized(config, tree, "int4", mesh, RULES) for tree in (from_gguf, from_folder))
    assert_same(first, second)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def logits(tree, tokens, config, mesh):
    queries = Queries(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], jnp.ones_like(tokens))
    with use(mesh, RULES):
        model = decoder(config, tree)
        return model.logits(model(tokens, queries, Packed())[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_devices_are_one(scheme, tmp_path):
    tokens = jnp.asarray([[5, 4, 3, 9, 11]], jnp.int32)
    expected = logits(made(LLAMA, scheme), tokens, LLAMA, mesh_of(ONE))
    mesh = mesh_of(TENSOR)
    split = made(LLAMA, scheme, TENSOR)
    up = split["layers"][0]["ffn"]["up"]
    assert up.codes.sharding.spec == jax.sharding.PartitionSpec("tensor", None)
    assert up.scales.sharding.spec == jax.sharding.PartitionSpec("tensor", None)
    assert_same(jax.device_get(split), jax.device_get(made(LLAMA, scheme)))
    np.testing.assert_allclose(logits(split, tokens, LLAMA, mesh), expected, atol=2e-5, rtol=2e-5)
    if scheme == "int4":  # saved by two, loaded by one
        quantized.save(tmp_path, LLAMA, split, scheme)
        assert_same(quantized.load(tmp_path, LLAMA, scheme, mesh_of(ONE), RULES), made(LLAMA, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_is_that_of_the_decoded_weights(scheme):
    tokens = jnp.asarray([[5, 4, 3, 9, 11]], jnp.int32)
    tree, is_held = made(MIXTURE, scheme), lambda leaf: isinstance(leaf, Quantized)
    plain = jax.tree.map(
        lambda leaf: leaf.astype(jnp.dtype(jnp.float32)) if is_held(leaf) else leaf, tree, is_leaf=is_held
    )
    found, expected = (logits(each, tokens, MIXTURE, mesh_of(ONE)) for each in (tree, plain))
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=5e-5)


DAMAGE = {
    "scheme 'int5' is unknown; did you mean int8?": {"scheme": "int5"},
    "scheme None is unknown": {"scheme": None},
    "meshlight_quantized is 2, this version reads 1": {"meshlight_quantized": 2},
    "the file is damaged, or was written by another version": {"decoder": {"num_layer": 3}},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_config_is_one_line(message, tmp_path):
    fields = {"meshlight_quantized": 1, "scheme": "int8", "decoder": {}} | DAMAGE[message]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        quantized.read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_weights_are_one_line(tmp_path):
    quantized.save(tmp_path, LLAMA, made(LLAMA, "int8"), "int8")
    read = functools.partial(quantized.load, tmp_path, LLAMA, mesh=mesh_of(ONE), rules=RULES)
    with pytest.raises(ValueError, match=r"holds tensor|lacks tensor"):
        read(scheme="int4")
    with pytest.raises(ValueError, match=r"is \('I8', .*not \('F8_E4M3'"):
        read(scheme="fp8")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-9])
    with pytest.raises(ValueError, match="it is truncated"):
        read(scheme="int8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tpu_multiplies_by_codes(scheme):
    """A decode step's FFN, split over four chips: no weight is written out in a wider type."""
    mesh = make_mesh(TENSOR, tpu_devices("v5e:2x2")[:2])

    def weight(shape, names):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        held = jax.eval_shape(functools.partial(quantize, summed=summed_dims(names), scheme=scheme), leaf)
        where = quantized.places(held, names, mesh, RULES)
        return jax.tree.map(lambda part, to: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=to), held, where)

    def ffn(x, up, down):
        with use(mesh, RULES):
            h = einsum("BTD,DF->BTF", x, up, out=("batch", "seq", "act_ffn"))
            return einsum("BTF,FD->BTD", h, down, sums="act_ffn", out=("batch", "residual_seq", "act_embed"))

    up, down = weight((512, 2048), ("embed", "ffn")), weight((2048, 512), ("ffn", "embed"))
    x = jax.ShapeDtypeStruct((8, 1, 512), jnp.bfloat16)
    text = jax.jit(ffn).lower(x, up, down).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert re.search(
        {"int8": r"s8\[1024,512\]", "int4": r"u4\[1024,512\]", "fp8": r"f8e4m3fn\[1024,512\]"}[scheme], entry
    )
    written = re.findall(r"= (?:bf16|f32)\[([\d,]+)\]", entry)
    assert max(np.prod([int(size) for size in shape.split(",")]) for shape in written) < 512 * 1024
    assert "all-gather" not in text


def test_shapes_are_those_that_are_made():
    wanted = quantized.shapes(MIXTURE, "int4")
    found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), made(MIXTURE, "int4"))
    assert jax.tree.structure(wanted) == jax.tree.structure(found)
    assert jax.tree.leaves(wanted) == jax.tree.leaves(found)
