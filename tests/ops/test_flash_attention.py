"""The Pallas attention equals the reference, forward and backward, in interpret mode; and a TPU's compiler takes it."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ops import flash_attention, reference
from ops.attention import Places
from ops.flash_attention import EMPTY, Blocks
from parallel.topology import ENVIRONMENT
from tests.tpu import needs_libtpu

B, T, H = 2, 256, 16
BLOCKS = Blocks(128, 128)
SCALE = 0.3
F32_BOUND = 3e-5  # 256 terms of order one, each rounded by 2^-23
BF16_BOUND = 2**-5  # a value of order four, rounded by 2^-8, twice


def inputs(T=T, S=T, N=4, K=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (B, *shape, H)).astype(dtype)
        for key, shape in zip(keys, [(T, N), (S, K), (S, K), (T, N)], strict=True)
    ]


def places(positions, segments=1):
    positions = np.asarray(positions)
    return Places(*(jnp.asarray(np.broadcast_to(x, (B, len(positions))), jnp.int32) for x in (positions, segments)))


ROW = np.arange(T)
WHOLE = places(ROW)
DOCUMENTS = places([*range(100), *range(140), *range(16)], [1] * 100 + [2] * 140 + [0] * 16)
ENDS, MIDDLE = places([*range(128), *range(384, 512)]), places(range(128, 384))  # two of ring attention's chunks
MIXED = Places(*(jnp.stack([a[0], b[0]]) for a, b in zip(DOCUMENTS, WHOLE, strict=True)))  # rows of unequal visits
STRANGERS = places(ROW, [7] * 150 + [1] * 106)  # the first 150 are of no document that the others know


def values_and_gradients(attention, q, k, v, d_out):
    out, pull, lse = jax.vjp(attention, q, k, v, has_aux=True)
    return out, lse, *pull(d_out)


def fast(q, k, v, d_out, q_at, k_at, *, window, softcap=None):
    """Compiled once for a table of places; a window is static where the table has none."""
    knobs = {"softcap": softcap, "scale": SCALE, "blocks": BLOCKS, "interpret": True}
    out, lse = flash_attention.forward(q, k, v, q_at, k_at, window=window, **knobs)
    return out, lse, *flash_attention.backward(q, k, v, out, lse, d_out, q_at, k_at, window=window, **knobs)


late = jax.jit(fast)
early = jax.jit(fast, static_argnames=("window", "softcap"))


@functools.partial(jax.jit, static_argnames=("softcap",))
def slow(q, k, v, d_out, q_at, k_at, *, window, softcap=None):
    mask = reference.visible(q_at.positions, k_at.positions, q_at.segments, k_at.segments, window=window)
    sees = jnp.any(mask, axis=2)

    def attention(q, k, v):
        out = reference.attention(q, k, v, mask, scale=SCALE, softcap=softcap)
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)) * SCALE
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        lse = jax.nn.logsumexp(jnp.where(mask[:, None], logits, -jnp.inf), axis=3)
        return jnp.where(sees[..., None, None], out, 0.0), jnp.where(sees[:, None], lse, EMPTY)

    return values_and_gradients(attention, q, k, v, d_out)


def assert_equal(fast, slow, bound):
    for name, a, b in zip(("out", "lse", "d_q", "d_k", "d_v"), fast, slow, strict=True):
        assert a.dtype == (jnp.float32 if name == "lse" else fast[0].dtype)
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=bound, rtol=bound, err_msg=name)


@pytest.mark.parametrize(
    ("q_at", "k_at", "window"),
    [
        pytest.param(WHOLE, WHOLE, T, id="causal"),
        pytest.param(WHOLE, WHOLE, 70, id="window"),
        pytest.param(WHOLE, WHOLE, 1, id="window of itself"),
        pytest.param(DOCUMENTS, DOCUMENTS, T, id="documents"),
        pytest.param(DOCUMENTS, DOCUMENTS, 40, id="documents, window"),
        pytest.param(MIXED, MIXED, T, id="rows that differ"),
        pytest.param(MIXED, WHOLE, T, id="a row that sees little"),
        pytest.param(places(ROW + T), WHOLE, 2 * T, id="keys of an earlier chunk"),
        pytest.param(ENDS, MIDDLE, 2 * T, id="keys between the queries"),
        pytest.param(MIDDLE, ENDS, 200, id="keys around the queries"),
        pytest.param(STRANGERS, WHOLE, T, id="queries that see nothing"),
        pytest.param(WHOLE, STRANGERS, T, id="keys that nobody sees"),
        pytest.param(WHOLE, places(ROW + T), T, id="keys of a later chunk"),
    ],
)
def test_equals_the_reference(q_at, k_at, window):
    qkv, window = inputs(), jnp.int32(window)
    assert_equal(late(*qkv, q_at, k_at, window=window), slow(*qkv, q_at, k_at, window=window), F32_BOUND)


@pytest.mark.parametrize(
    ("shape", "window", "softcap"),
    [
        pytest.param({"K": 1}, 70, 2.0, id="many queries a key, window known early, softcap"),
        pytest.param({"T": 131, "S": 300, "N": 2}, None, None, id="one query a key, odd lengths, no window"),
    ],
)
def test_every_shape_and_knob_equals_the_reference(shape, window, softcap):
    qkv = inputs(**shape)
    q_at, k_at = (places(np.arange(x.shape[1]) + shift) for x, shift in zip(qkv, (90, 0), strict=False))
    expected = slow(*qkv, q_at, k_at, window=None if window is None else jnp.int32(window), softcap=softcap)
    assert_equal(early(*qkv, q_at, k_at, window=window, softcap=softcap), expected, F32_BOUND)


def test_bfloat16_is_near_the_float32_reference():
    qkv = inputs(dtype=jnp.bfloat16)
    expected = slow(*(x.astype(jnp.float32) for x in qkv), DOCUMENTS, DOCUMENTS, window=jnp.int32(T))
    assert_equal(late(*qkv, DOCUMENTS, DOCUMENTS, window=jnp.int32(T)), expected, BF16_BOUND)


def test_keys_too_many_for_vmem_are_taken_in_parts(monkeypatch):
    """Each part with the log-sum-exp of all, as ring attention calls it."""
    q, k, v, d_out = inputs()
    out, lse, *expected = late(q, k, v, d_out, DOCUMENTS, DOCUMENTS, window=jnp.int32(T))
    monkeypatch.setattr(flash_attention, "KEPT_BYTES", 0)
    knobs = {"window": T, "softcap": None, "scale": SCALE, "blocks": BLOCKS, "interpret": True}
    parts = jax.jit(lambda *x: flash_attention.backward(*x, DOCUMENTS, DOCUMENTS, **knobs))(q, k, v, out, lse, d_out)
    for part, whole in zip(parts, expected, strict=True):
        np.testing.assert_allclose(part, whole, atol=F32_BOUND)


def test_a_query_that_sees_nothing():
    out, lse, d_q, _, _ = late(*inputs(), STRANGERS, WHOLE, window=jnp.int32(T))
    assert np.all(np.asarray(out)[:, :150] == 0)
    assert np.all(np.asarray(lse)[:, :, :150] == EMPTY)
    assert np.all(np.asarray(d_q)[:, :150] == 0)
    assert np.all(np.asarray(lse)[:, :, 150:] > -100)


def kernels_of_a_gradient(policy):
    """Names of the kernels that the gradient of two scanned, rematerialised layers runs in each."""
    w = jnp.zeros((2, H, 4, H))

    def layer(x, w):
        q = jnp.einsum("BTD,DNH->BTNH", x, w)
        knobs = {"window": None, "scale": SCALE, "softcap": None, "interpret": True}
        out = flash_attention.attend(q, q[:, :, :2], q[:, :, 2:], WHOLE, WHOLE, **knobs)
        return x + jnp.einsum("BTNH,DNH->BTD", out, w), None

    def loss(w, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, policy=policy), x, w)[0])

    return [
        eqn.params["name"]
        for eqn in equations(jax.make_jaxpr(jax.grad(loss))(w, jnp.zeros((B, T, H))).jaxpr)
        if eqn.primitive.name == "pallas_call"
    ]


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_a_policy_that_saves_the_two_names_runs_the_forward_kernel_once():
    save = jax.checkpoint_policies.save_only_these_names
    forward, backward = "attention_forward", "attention_backward"
    assert kernels_of_a_gradient(save("attention_out", "attention_lse")) == [forward, backward]
    assert kernels_of_a_gradient(save("attention_out")) == [forward, forward, backward]


COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ops.attention import Places
from ops.flash_attention import attend

mesh = Mesh(np.array(topologies.get_topology_desc("v5e:2x2", "tpu").devices), ("data",), axis_types=(AxisType.Auto,))

def gradient(q, k, v, at):
    out = lambda q, k, v: attend(q, k, v, at, at, window=None, scale=0.1, softcap=None).astype(jnp.float32).sum()
    return jax.grad(out, (0, 1, 2))(q, k, v)

data = PartitionSpec("data")

def shape(*dims, dtype):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, data))

step = jax.shard_map(gradient, mesh=mesh, in_specs=data, out_specs=data, check_vma=False)
q, k = (shape(4, 256, heads, 64, dtype=jnp.bfloat16) for heads in (2, 1))
at = Places(*[shape(4, 256, dtype=jnp.int32)] * 2)
hlo = jax.jit(step).lower(q, k, k, at).compile().as_text()
calls = [line for line in hlo.splitlines() if "tpu_custom_call" in line]
print(*(sum(f"attention_{way}" in call.split("=")[0] for call in calls) for way in ("forward", "backward")))
"""


@needs_libtpu
def test_a_tpu_compiles_it():
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=root,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1"]
