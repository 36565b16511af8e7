"""Routers choose as their papers say; the mixture equals a loop over tokens, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model import moe
from model.config import ModelConfig
from model.layers import RESIDUAL, TOGETHER, names_of
from model.moe import Aux, MoE, choose, updated_bias, utilisation
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from parallel.sharding import everywhere, relaid, spec, summed_gradient, use

B, T, D, F, E, A = 8, 4, 8, 6, 8, 2


def config(**changes) -> ModelConfig:
    dense = {"num_layers": 2, "num_heads": 1, "num_kv_heads": 1, "head_dim": D, "ffn_dim": 4, "max_length": T}
    experts = {"num_experts": E, "experts_per_token": A, "expert_ffn_dim": F}
    return ModelConfig(embed_dim=D, rope_theta=1e4, norm_eps=1e-6, **(dense | experts | changes))


KINDS = {
    "qwen": {"router": "softmax", "router_normalize": False},
    "mixtral": {"router": "softmax_after"},
    "deepseek": {
        "router": "sigmoid",
        "router_scale": 2.5,
        "router_groups": 4,
        "router_top_groups": 2,
        "shared_ffn_dim": 5,
    },
}


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def choice_of(kind: str, logits: np.ndarray, bias: np.ndarray) -> dict[int, float]:
    """Expert -> gate of one token, straight from the papers."""
    if kind == "mixtral":
        chosen = np.argsort(-logits)[:A]
        return dict(zip(chosen.tolist(), softmax(logits[chosen]), strict=True))
    if kind == "qwen":
        chosen = np.argsort(-logits)[:A]
        return {int(e): softmax(logits)[e] for e in chosen}
    scores = 1 / (1 + np.exp(-logits))
    ranked = scores + bias
    groups = ranked.reshape(4, 2)
    best = np.argsort(-np.sort(groups)[:, -2:].sum(1))[:2]
    allowed = [e for e in range(E) if e // 2 in best]
    chosen = sorted(allowed, key=lambda e: -ranked[e])[:A]
    return {e: 2.5 * scores[e] / scores[chosen].sum() for e in chosen}


@pytest.mark.parametrize("kind", KINDS)
def test_router(kind):
    logits = jax.random.normal(jax.random.key(0), (B, T, E)) * 2
    bias = jnp.linspace(-0.5, 0.5, E) if kind == "deepseek" else None
    chosen, gates, _ = choose(config(**KINDS[kind]), logits, bias)
    for b in range(B):
        for t in range(T):
            expected = choice_of(kind, np.asarray(logits[b, t]), np.linspace(-0.5, 0.5, E))
            found = dict(zip(chosen[b, t].tolist(), gates[b, t].tolist(), strict=True))
            assert found == pytest.approx(expected, rel=1e-5)


def test_bias_moves_the_choice_and_not_the_gate():
    logits = jnp.zeros((1, 1, E)).at[0, 0, 0].set(1.0)
    sigmoid = config(router="sigmoid", experts_per_token=1, router_normalize=False)
    chosen, gates, _ = choose(sigmoid, logits, jnp.zeros(E).at[5].set(9.0))
    assert (chosen.item(), gates.item()) == (5, 0.5)
    slope = jax.grad(lambda bias: jnp.sum(choose(sigmoid, logits, bias).gates))(jnp.zeros(E))
    np.testing.assert_array_equal(slope, 0)


def ffn(x, gate, up, down):
    a = x @ gate
    return (a / (1 + np.exp(-a)) * (x @ up)) @ down


def inputs():
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    return x, jnp.ones((B, T), bool).at[0, 2:].set(False).at[3].set(False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_goes_through_its_experts(kind):
    module = MoE(config(**KINDS[kind]), jax.random.key(0))
    x, mask = inputs()
    y, aux = jax.jit(lambda x, mask: module(x, mask))(x, mask)
    p = {name: np.asarray(getattr(module, name)[...]) for name in ("router", "gate", "up", "down")}
    shared = module.shared and [np.asarray(w[...]) for w in (module.shared.gate, module.shared.up, module.shared.down)]
    load = np.zeros(E)
    for b, t in np.ndindex(B, T):
        token = np.asarray(x[b, t])
        expected = ffn(token, *shared) if shared else np.zeros(D)
        choice = choice_of(kind, token @ p["router"], np.zeros(E)) if mask[b, t] else {}
        for e, gate in choice.items():
            expected = expected + gate * ffn(token, p["gate"][e], p["up"][e], p["down"][e])
            load[e] += 1
        np.testing.assert_allclose(y[b, t], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(aux.load, load)


@jax.jit
def aux_of(logits, mask) -> Aux:
    return moe._aux(logits, choose(config(), logits, None), mask)


def test_balance_counts_tokens_where_use_is_even_and_more_where_not():
    everyone = jnp.ones((1, E // A), bool)
    even = 5.0 * jax.nn.one_hot(jnp.arange(E).reshape(1, E // A, A), E).sum(2)  # token t to experts 2t, 2t + 1
    skewed = jnp.broadcast_to(even[:, :1], even.shape)
    flat = jnp.zeros_like(even)
    assert aux_of(even, everyone).balance == pytest.approx(E // A, rel=1e-5)
    assert aux_of(flat, everyone).balance == pytest.approx(E // A, rel=1e-5)
    assert aux_of(skewed, everyone).balance == pytest.approx(E // A * E / A, rel=0.03)  # softmax(5) is not quite all
    pushed = -jax.grad(lambda logits: aux_of(logits, everyone).balance)(0.2 * skewed)
    assert (pushed[..., :A] < 0).all()  # descent lowers the logits of the experts that all chose
    assert (pushed[..., A:] > 0).all()


def test_aux_is_a_sum_over_sequences_and_over_tokens_that_are_not_padding():
    logits = jax.random.normal(jax.random.key(0), (2, T, E))
    mask = jnp.ones((2, T), bool).at[1, 1:].set(False)
    whole = aux_of(logits, mask)
    parts = aux_of(logits[:1], mask[:1]), aux_of(logits[1:, :1], mask[1:, :1])
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=1e-6), whole, *parts)
    assert aux_of(jnp.zeros((1, T, E)), mask[:1]).router_z == pytest.approx(T * np.log(E) ** 2, rel=1e-5)


def test_bias_follows_load():
    np.testing.assert_allclose(
        updated_bias(jnp.asarray([0.0, 0.5, 0.0]), jnp.asarray([6.0, 3.0, 0.0]), 0.1), [-0.1, 0.5, 0.1]
    )


def test_utilisation():
    found = utilisation(jnp.asarray([[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0]]))
    assert {name: float(value) for name, value in found.items()} == {"max_load": 2.5, "unused": 0.375}


MESHES = [
    {"expert": 8},
    {"expert": 4, "data": 2},
    {"expert": 2, "context": 2, "tensor": 2},
]


def objective(state, x, mask, graphdef):
    """This device's share of a loss of every output; and what it was made of. `x` is laid out as RESIDUAL."""
    y, aux = nnx.merge(graphdef, state)(x, mask)
    valid = relaid(mask.astype(x.dtype), TOGETHER[:2], RESIDUAL[:2])[..., None]
    return jnp.sum(jnp.sin(y) * valid) + 0.3 * aux.balance + 0.1 * aux.router_z, (y, aux)


@pytest.mark.parametrize("kind", ["qwen", "deepseek"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_on_a_mesh_as_on_one_device(kind, sizes):
    changes = KINDS[kind] | {"shared_ffn_dim": 0 if kind == "qwen" else 4}
    graphdef, state = nnx.split(MoE(config(**changes), jax.random.key(0)))
    x, mask = inputs()
    gradient = jax.value_and_grad(functools.partial(objective, graphdef=graphdef), argnums=(0, 1), has_aux=True)
    (loss, (y, aux)), (d_state, d_x) = jax.jit(gradient)(state, x, mask)

    mesh, rules = make_mesh(MeshConfig(**({"data": 1} | sizes))), AxisRules(expert_embed=None, embed=None)
    variables = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    names = [names_of(variable) for variable in variables]
    flat = [spec(names, rules, mesh) for names in names]
    specs = jax.tree.unflatten(jax.tree.structure(state), flat)
    stream, tokens = spec(RESIDUAL, rules, mesh), spec(TOGETHER[:2], rules, mesh)

    def inside(state, x, mask):
        with use(mesh, rules, manual=True):
            (loss, (y, aux)), (d_state, d_x) = gradient(state, x, mask)
            summed = [summed_gradient(d, n) for d, n in zip(jax.tree.leaves(d_state), names, strict=True)]
            return jax.lax.psum((loss, aux), everywhere()), y, summed, d_x

    mapped = jax.shard_map(
        inside, mesh=mesh, in_specs=(specs, stream, tokens), out_specs=(P(), stream, flat, stream), check_vma=False
    )
    ours, theirs = jax.jit(mapped)(state, x, mask), ((loss, aux), y, jax.tree.leaves(d_state), d_x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, theirs)


def test_under_automatic_partitioning():
    """Inference: experts split, tokens split, and the compiler finds the communication."""
    module = MoE(config(**KINDS["deepseek"]), jax.random.key(0))
    graphdef, state = nnx.split(module)
    run = jax.jit(lambda state, x, mask: nnx.merge(graphdef, state)(x, mask))
    expected = run(state, *inputs())
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))

    def put(path, w):
        is_expert = path[0].key in ("gate", "up", "down")
        return jax.device_put(w, NamedSharding(mesh, P("expert") if is_expert else P()))

    spread = jax.tree_util.tree_map_with_path(put, state)
    x, mask = jax.device_put(inputs(), NamedSharding(mesh, P(("data", "expert"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run(spread, x, mask), expected)
