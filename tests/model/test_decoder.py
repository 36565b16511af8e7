"""The decoder's meaning: causality, documents apart, windows, caches, layers stacked or apart, one device or eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig, RopeScaling
from model.memory import Packed, Queries, dense_cache
from model.parameters import decoder, initialize, shardings, unrolled
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from parallel.sharding import use

RULES = AxisRules()
V, B, T = 40, 2, 12

PLAIN = ModelConfig(
    vocab_size=V,
    embed_dim=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    max_length=32,
    rope_theta=1e4,
    norm_eps=1e-6,
    init_scale=2.0,
)
MIXED = dataclasses.replace(  # everything that differs between layers, and Gemma's norms and caps
    PLAIN,
    layers=("window", "window", "global"),
    window=4,
    rope_local_theta=100.0,
    rope_scaling=RopeScaling(kind="linear", factor=2.0),
    qk_norm=True,
    post_norms=True,
    norm_zero_centered=True,
    embed_scale=True,
    attention_softcap=5.0,
    final_softcap=4.0,
    activation="gelu_tanh",
)
LEARNED = dataclasses.replace(
    PLAIN, positions="learned", norm="layer", qkv_bias=True, out_bias=True, ffn_bias=True, gated=False, tied=False
)
MIXTURE = dataclasses.replace(  # latent attention, a dense layer, then experts beside shared ones, as DeepSeek has it
    PLAIN,
    num_kv_heads=4,
    kv_rank=10,
    q_rank=12,
    rope_dim=4,
    value_dim=6,
    rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_length=8, logit_mscale=0.5),
    num_experts=8,
    experts_per_token=3,
    expert_ffn_dim=12,
    shared_ffn_dim=8,
    num_dense_layers=1,
    router="sigmoid",
    router_scale=2.5,
    router_groups=4,
    router_top_groups=2,
)
CONFIGS = {"mixed": MIXED, "learned": LEARNED, "mixture": MIXTURE}


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def parameters_of(config):
    """Initial parameters moved off their zeros and ones, on one device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    random = np.random.default_rng(0)
    initial = initialize(config, mesh, RULES, key=jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.1 * random.standard_normal(leaf.shape, np.float32), initial)


def tokens_of(seed=0, shape=(B, T)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, shape), jnp.int32)


def whole(shape=(B, T)):
    """One document a row."""
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    return Queries(positions, jnp.ones(shape, jnp.int32))


# These programs run once or twice: compiled in haste.
compiled = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def logits_of(config, parameters, tokens, queries):
    model = decoder(config, parameters)
    return model.logits(model(tokens, queries, Packed())[0])


forward = compiled(logits_of)


@compiled
def gradients(config, parameters):
    """Of a loss that every logit enters."""
    return jax.value_and_grad(lambda p: jnp.square(logits_of(config, p, tokens_of(), whole())).mean())(parameters)


@compiled
def step(config, parameters, tokens, queries, memory):
    model = decoder(config, parameters)
    hidden, memory = model(tokens, queries, memory)
    return model.logits(hidden), memory


@compiled
def influence(config, parameters):
    """[T, T]: how much the hidden state at t depends on the embedding at s, by gradients."""
    tokens = tokens_of(shape=(1, T))

    def hidden_of(embeddings):
        table = parameters["embedding"] | {"tokens": embeddings}
        model = decoder(config, parameters | {"embedding": table})
        return model(jnp.arange(T, dtype=jnp.int32)[None], whole((1, T)), Packed())[0][0]

    embeddings = parameters["embedding"]["tokens"][tokens[0]]
    _, pull = jax.vjp(hidden_of, embeddings)
    ones = jnp.eye(embeddings.size).reshape(-1, *embeddings.shape)
    jacobian = jax.lax.map(lambda one: pull(one)[0], ones)  # one after another: ragged_dot is not batched
    return jnp.abs(jacobian).reshape(*embeddings.shape, *embeddings.shape).sum((1, 3))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_depends_on_a_later_one(name):
    seen = np.asarray(influence(CONFIGS[name], parameters_of(CONFIGS[name])))
    later = np.triu(np.ones((T, T), bool), 1)
    assert (seen[later] == 0).all()
    assert (seen[~later] > 0).all()  # the last of MIXED's layers is global


def test_windows_reach_as_far_as_they_say():
    """Two layers with a window of 3 see 2 * (3 - 1) tokens back."""
    windowed = dataclasses.replace(PLAIN, num_layers=2, layers=("window",), window=3)
    seen = np.asarray(influence(windowed, parameters_of(windowed)))
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    assert ((seen > 0) == ((distance >= 0) & (distance <= 4))).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_as_if_alone(name):
    config = CONFIGS[name]
    parameters, tokens = parameters_of(config), tokens_of(shape=(1, T))
    cut = 5
    positions = jnp.concatenate([jnp.arange(cut), jnp.arange(T - cut)])[None].astype(jnp.int32)
    segments = jnp.where(jnp.arange(T) < cut, 1, 2)[None].astype(jnp.int32)
    packed = forward(config, parameters, tokens, Queries(positions, segments))
    # each alone, moved to the front of a row whose rest is padding
    for start, end in ((0, cut), (cut, T)):
        row = jnp.zeros((1, T), jnp.int32).at[0, : end - start].set(tokens[0, start:end])
        padding = (jnp.arange(T) < end - start).astype(jnp.int32)[None]
        alone = forward(config, parameters, row, Queries(whole((1, T)).positions, padding))
        np.testing.assert_allclose(packed[0, start:end], alone[0, : end - start], atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_are_the_full_forward(name):
    """Step by step, over a cache with more slots than tokens, for layers stacked and apart."""
    config = CONFIGS[name]
    parameters, tokens, queries = parameters_of(config), tokens_of(), whole()
    full = forward(config, parameters, tokens, queries)
    for form, values in ((config, parameters), unrolled(config, parameters)):
        memory = dense_cache(form, B, T + 3)
        read = 7
        logits, memory = step(form, values, tokens[:, :read], Queries(*(q[:, :read] for q in queries)), memory)
        np.testing.assert_allclose(logits, full[:, :read], atol=2e-5)
        for t in range(read, T):
            one = Queries(*(q[:, t : t + 1] for q in queries))
            logits, memory = step(form, values, tokens[:, t : t + 1], one, memory)
            np.testing.assert_allclose(logits[:, 0], full[:, t], atol=2e-5)


def test_rows_of_different_lengths_are_each_as_if_alone():
    """Padding at the end of a short prompt is overwritten before its position is reached."""
    config, parameters, tokens = PLAIN, parameters_of(PLAIN), np.asarray(tokens_of())
    full = np.asarray(forward(config, parameters, tokens, whole()))
    rows, lengths = np.arange(B), np.asarray([4, 7], np.int32)
    prompt = np.where(np.arange(8)[None] < lengths[:, None], tokens[:, :8], 0)
    logits, memory = step(config, parameters, prompt, whole((B, 8)), dense_cache(config, B, T))
    last = np.asarray(logits)[rows, lengths - 1]
    for _ in range(4):
        np.testing.assert_allclose(last, full[rows, lengths - 1], atol=2e-5)
        queries = Queries(lengths[:, None], np.ones((B, 1), np.int32))
        logits, memory = step(config, parameters, tokens[rows, lengths][:, None], queries, memory)
        last = np.asarray(logits)[:, 0]
        lengths = lengths + 1


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_stacked_and_apart_agree(name):
    """Loss and gradients."""
    config = CONFIGS[name]
    apart, split = unrolled(config, parameters_of(config))
    stacked_loss, stacked = gradients(config, parameters_of(config))
    apart_loss, single = gradients(apart, split)
    np.testing.assert_allclose(stacked_loss, apart_loss, rtol=1e-5)
    expected = unrolled(config, stacked)[1]
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_in_backward_changes_nothing(remat):
    _, plain = gradients(MIXED, parameters_of(MIXED))
    _, again = gradients(dataclasses.replace(MIXED, remat=remat), parameters_of(MIXED))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_logits_are_float32_near_and_capped():
    """bfloat16 compute changes the logits by its precision; a cap of 4 bounds them."""
    half = dataclasses.replace(MIXED, compute_dtype="bfloat16")
    exact = forward(MIXED, parameters_of(MIXED), tokens_of(), whole())
    rough = forward(half, parameters_of(MIXED), tokens_of(), whole())
    assert rough.dtype == exact.dtype == jnp.float32
    assert np.abs(exact - rough).max() < 0.3
    assert np.abs(exact).max() < 4.0
    uncapped = dataclasses.replace(MIXED, final_softcap=None)
    assert np.abs(forward(uncapped, parameters_of(MIXED), tokens_of(), whole())).max() > 4.0


@pytest.mark.parametrize(
    "mesh_config",
    [
        MeshConfig(data=8),
        MeshConfig(data=1, fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(fsdp=4, tensor=2),
    ],
    ids=str,
)
def test_any_mesh_computes_what_one_device_does(mesh_config):
    tokens, queries = tokens_of(shape=(8, T)), whole((8, T))
    expected = forward(MIXED, parameters_of(MIXED), tokens, queries)
    mesh = make_mesh(mesh_config)
    with use(mesh, RULES):
        spread = jax.device_put(parameters_of(MIXED), shardings(MIXED, mesh, RULES))
        logits = compiled(logits_of)(MIXED, spread, tokens, queries)
    np.testing.assert_allclose(logits, expected, atol=3e-5)


def test_a_mesh_splits_latents_and_experts_as_well():
    tokens, queries = tokens_of(shape=(8, T)), whole((8, T))
    expected = forward(MIXTURE, parameters_of(MIXTURE), tokens, queries)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with use(mesh, RULES):
        spread = jax.device_put(parameters_of(MIXTURE), shardings(MIXTURE, mesh, RULES))
        logits = compiled(logits_of)(MIXTURE, spread, tokens, queries)
    np.testing.assert_allclose(logits, expected, atol=3e-5)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_layers_with_experts_tell_of_their_use(scan_layers):
    """Of the two of three that have experts; padding chooses none. A dense decoder tells nothing."""
    config, values = MIXTURE, parameters_of(MIXTURE)
    if not scan_layers:
        config, values = unrolled(config, values)
    queries = whole()._replace(segments=jnp.asarray(np.arange(T)[None] < [[T], [T - 2]], jnp.int32))

    @jax.jit
    def tell(values):
        return decoder(config, values).forward(tokens_of(), queries, Packed())[2]

    aux = tell(values)
    assert aux.load.shape == (2, 8)
    np.testing.assert_allclose(aux.load.sum(1), [3 * (2 * T - 2)] * 2)
    dense = jax.eval_shape(lambda p: decoder(PLAIN, p).forward(tokens_of(), queries, Packed()), parameters_of(PLAIN))
    assert dense[2] is None
