"""A ring of any size, and gathered keys, answer as one device does, forward and backward.

Bound. Outputs are means of v and gradients sums of T terms of size about 1, in float32: both sides round each sum in
another order, which errs by some eps * sqrt(T) of the largest term. 50 eps = 6e-6, over values of up to about 4.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from model.memory import GatheredKV, Queries, Ring, Rule
from ops import attention, reference
from ops.attention import Places
from parallel import ring_attention
from parallel.ring_attention import LSE, OUT, gathered, ring, zigzag, zigzag_inverse

BOUND = {"atol": 2.5e-5, "rtol": 50 * float(np.finfo(np.float32).eps)}
SCALE = 0.3


def random(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def packed(rows):
    """Document lengths of each row -> places; what is left of a row is padding."""
    positions, segments = np.zeros((2, len(rows), max(map(sum, rows))), np.int32)
    for row, lengths in enumerate(rows):
        at = 0
        for number, length in enumerate(lengths, 1):
            positions[row, at : at + length] = np.arange(length)
            segments[row, at : at + length] = number
            at += length
    return Places(positions, segments)


def problem(rows, heads=(4, 2), seed=0):
    """-> q, k, v, the gradient of out (none where there is padding), places."""
    at, rng, (N, K), H = packed(rows), np.random.default_rng(seed), heads, 8
    B, T = at.positions.shape
    q, k, v, d_out = random(rng, B, T, N, H), random(rng, B, T, K, H), random(rng, B, T, K, H), random(rng, B, T, N, H)
    return jax.tree.map(jnp.asarray, (q, k, v, d_out * (at.segments > 0)[..., None, None], at))


@functools.partial(jax.jit, static_argnames=("window", "softcap"))
def one_device(q, k, v, d_out, at, *, window=None, softcap=None):
    mask = reference.visible(at.positions, at.positions, at.segments, at.segments, window=window)
    out, pull = jax.vjp(lambda *x: reference.attention(*x, mask, scale=SCALE, softcap=softcap), q, k, v)
    return out, *pull(d_out)


def split(attend, mesh, axes, *, balanced=False):
    """`attend(q, k, v, at)` of tokens split over axes, with its gradients: (q, k, v, d_out, at) as on one device."""
    spec = P(None, axes)

    def inside(q, k, v, d_out, at):
        out, pull = jax.vjp(lambda *x: attend(*x, at), q, k, v)
        return out, *pull(d_out)

    program = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def whole(*args):
        _, T, _, _ = args[0].shape
        order, back = np.arange(T), np.arange(T)
        if balanced:
            order, back = zigzag(T, mesh.size), zigzag_inverse(T, mesh.size)
        results = program(*jax.tree.map(lambda x: x[:, order], args))
        return jax.tree.map(lambda x: x[:, back], results)

    return jax.jit(whole)


def make_mesh(**axes):
    size = int(np.prod(list(axes.values())))
    return Mesh(np.asarray(jax.devices()[:size]).reshape(tuple(axes.values())), tuple(axes))


def assert_equal(results, expected, at):
    (out, *grads), (good, *expected), at = jax.device_get((results, expected, at))
    real = at.segments > 0
    np.testing.assert_allclose(out[real], good[real], **BOUND)
    for grad, good in zip(grads, expected, strict=True):
        np.testing.assert_allclose(grad, good, **BOUND)


ROWS = [[5, 20, 30, 9], [64], [1, 50]]  # documents across the borders of chunks, one of all the row, padding


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_ring_answers_as_one_device(size, balanced):
    args = problem(ROWS)
    attend = functools.partial(
        ring, axes=("context",), window=None, scale=SCALE, softcap=None, kernel=attention, balanced=balanced
    )
    results = split(attend, make_mesh(context=size), ("context",), balanced=balanced)(*args)
    assert_equal(results, one_device(*args), args[-1])


def test_a_long_ring_is_a_loop_and_answers_the_same(monkeypatch):
    monkeypatch.setattr(ring_attention, "UNROLL", 2)  # 3 steps: one turn of two, and one more
    args = problem(ROWS)
    attend = functools.partial(
        ring, axes=("context",), window=None, scale=SCALE, softcap=None, kernel=attention, balanced=True
    )
    results = split(attend, make_mesh(context=4), ("context",), balanced=True)(*args)
    assert_equal(results, one_device(*args), args[-1])


@pytest.mark.parametrize("balanced", [False, True])
def test_a_ring_with_window_and_softcap_over_two_mesh_axes(balanced):
    args, axes, rule = problem(ROWS, heads=(2, 2)), ("a", "b"), {"window": 11, "softcap": 1.5}
    attend = functools.partial(ring, axes=axes, scale=SCALE, kernel=attention, balanced=balanced, **rule)
    results = split(attend, make_mesh(a=2, b=2), axes, balanced=balanced)(*args)
    assert_equal(results, one_device(*args, **rule), args[-1])


@pytest.mark.parametrize("rule", [{}, {"window": 11, "softcap": 1.5}])
def test_gathered_keys_answer_as_one_device_in_any_order(rule):
    args, axes = problem(ROWS, heads=(4, 1)), ("a", "b")
    rule = {"window": None, "softcap": None} | rule
    attend = functools.partial(gathered, axes=axes, scale=SCALE, kernel=attention, **rule)
    results = split(attend, make_mesh(a=2, b=2), axes, balanced=True)(*args)
    assert_equal(results, one_device(*args, **rule), args[-1])


@settings(max_examples=5, deadline=None)
@given(
    data=st.data(),
    size=st.sampled_from([2, 4]),
    half_chunk=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 3)]),
    window=st.none() | st.integers(1, 40),
    softcap=st.sampled_from([None, 2.0]),
    how=st.sampled_from(["ring", "balanced", "gathered"]),
)
def test_any_packing_on_any_ring_answers_as_one_device(data, size, half_chunk, heads, window, softcap, how):
    T = 2 * size * half_chunk
    cuts = data.draw(st.lists(st.sets(st.integers(1, T), max_size=4), min_size=1, max_size=2))
    rows = [np.diff([0, *sorted(cut)]).tolist() for cut in cuts]
    rows = [*rows, [T]]  # one row is full
    args, rule = problem(rows, heads), {"window": window, "softcap": softcap, "scale": SCALE, "kernel": attention}
    if how == "gathered":
        attend = functools.partial(gathered, axes=("context",), **rule)
    else:
        attend = functools.partial(ring, axes=("context",), balanced=how == "balanced", **rule)
    results = split(attend, make_mesh(context=size), ("context",), balanced=how == "balanced")(*args)
    assert_equal(results, one_device(*args, window=window, softcap=softcap), args[-1])


@pytest.mark.parametrize("memory", [Ring(axes=("context",), balanced=True), GatheredKV(axes=("context",))])
def test_memories_in_a_scan_with_remat_and_a_window_known_late(memory):
    """As layers are run: the window differs from layer to layer, and a policy keeps out and log-sum-exp."""
    args, windows = problem(ROWS), jnp.asarray([7, 1000], jnp.int32)

    def layers(attend):
        return lambda q, k, v: jax.lax.scan(lambda x, window: (attend(x, k, v, window), None), q, windows)[0]

    def attend(q, k, v, at):
        look = lambda q, k, v, w: memory.attend(q, k, v, Queries(*at), Rule(SCALE, None, w))[0]  # noqa: E731
        return layers(jax.checkpoint(look, policy=jax.checkpoint_policies.save_only_these_names(OUT, LSE)))(q, k, v)

    def slow(q, k, v):
        def look(q, k, v, window):
            at = args[-1]
            mask = reference.visible(at.positions, at.positions, at.segments, at.segments, window=window)
            return reference.attention(q, k, v, mask, scale=SCALE)

        return layers(look)(q, k, v)

    results = split(attend, make_mesh(context=2), ("context",), balanced=True)(*args)
    out, pull = jax.vjp(slow, *args[:3])
    assert_equal(results, (out, *pull(args[3])), args[-1])


@pytest.mark.parametrize("kept", [(), (OUT, LSE)])
def test_out_and_lse_kept_across_remat_spare_the_second_forward(kept):
    """Permutes of a ring of two: k and v forward; k, v, d_k and d_v backward, and d_k and d_v home."""
    args = problem([[16]])
    policy = jax.checkpoint_policies.save_only_these_names(*kept)

    def attend(q, k, v, at):
        how = {"window": None, "scale": SCALE, "softcap": None, "kernel": attention, "balanced": True}
        look = lambda q, k, v: ring(q, k, v, at, axes=("context",), **how)  # noqa: E731
        return jax.checkpoint(look, policy=policy)(q, k, v)

    program = split(attend, make_mesh(context=2), ("context",)).lower(*args).as_text()
    forward, backward = 2, 4 + 2
    assert program.count("stablehlo.collective_permute") == forward + backward + (0 if kept else forward)


def test_zigzag_and_back():
    assert zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    for tokens, size in ((8, 2), (12, 3), (64, 8), (4, 1)):
        order = zigzag(tokens, size)
        assert order[zigzag_inverse(tokens, size)].tolist() == list(range(tokens))
    with pytest.raises(ValueError, match="10 tokens do not divide into 4 chunks, two for each of 2 devices"):
        zigzag(10, 2)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zigzag_gives_each_device_the_same_work_and_half_of_it(size):
    T = 64
    chunks = zigzag(T, size).reshape(size, -1)
    seen = [int((np.arange(T)[None] <= chunk[:, None]).sum()) for chunk in chunks]
    assert seen == [T * (T + 1) // 2 // size] * size

    products = []  # of each kernel call that a device makes; one program, so the same on all

    class Counting:
        @staticmethod
        def forward(q, k, v, q_at, k_at, **rule):
            (B, t, *_), (_, s, *_) = q.shape, k.shape
            products.append(B * t * s)
            return attention.forward(q, k, v, q_at, k_at, **rule)

    t = T // size
    q, k, v, _, at = problem([[T]])
    for balanced, step in ((False, t * t), (True, t * t // 2)):
        how = {"window": None, "scale": SCALE, "softcap": None, "kernel": Counting, "balanced": balanced}
        attend = functools.partial(ring, axes=("context",), **how)
        spec = P(None, "context")
        products.clear()
        jax.eval_shape(jax.shard_map(attend, mesh=make_mesh(context=size), in_specs=spec, out_specs=spec), q, k, v, at)
        assert products[0] == t * t  # its own chunk
        assert set(products[1:]) == {step}  # each that passes


def test_what_zigzag_leaves_out_is_hidden():
    """Keys of zeros weigh the same, so out is the mean of what is seen: of the columns up to the query's own."""
    T, size = 32, 4
    q, k, v, _, at = problem([[T]])
    attend = functools.partial(
        ring, axes=("context",), window=None, scale=SCALE, softcap=None, kernel=attention, balanced=True
    )
    values = np.broadcast_to(np.arange(T, dtype=np.float32)[None, :, None, None], v.shape)
    out, *_ = split(attend, make_mesh(context=size), ("context",), balanced=True)(q, k * 0, values, q * 0, at)
    np.testing.assert_allclose(out[0, :, 0, 0], np.arange(T) / 2, rtol=1e-5)


def test_an_odd_chunk_cannot_be_balanced():
    q, k, v, _, at = problem([[6]])
    attend = functools.partial(
        ring, axes=("context",), window=None, scale=SCALE, softcap=None, kernel=attention, balanced=True
    )
    with pytest.raises(ValueError, match="an odd 3 tokens"):
        split(attend, make_mesh(context=2), ("context",))(q, k, v, q, at)
