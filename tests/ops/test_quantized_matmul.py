"""Products in 8 bits stay within the bounds of their rounding, on both kernels; a TPU's compiler takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from ops.quantized_matmul import LANES, _tile, quantized, quantized_einsum, quantized_matmul
from tests.tpu import tpu_devices

# Of a product of normal numbers; both operands err by themselves, so that squares of errors add up.
# int8 rounds by a step of absmax / 127, which is off by step / sqrt(12) in the mean; absmax of 512 numbers is about 3.2
# standard deviations: 0.7 % each, 1.0 % together. e4m3 has 3 bits of mantissa and is off by up to 1/16, 2.6 % in the
# mean: 3.7 % together. e5m2 has one bit less, 5.2 %, with e4m3 5.8 %. The bounds leave a third and more to luck.
BOUNDS = {"int8": (0.015, 0.015, 0.015), "fp8": (0.06, 0.08, 0.08)}  # of y, d_x, d_w

KINDS = list(BOUNDS)


def arrays(rows=96, inputs=512, outputs=512, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (rows, inputs), (inputs, outputs), (rows, outputs)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnames=("kind", "kernel", "backward"))
def gradients(x, w, d_y, kind, kernel="plain", backward="quantized"):
    product = functools.partial(quantized_matmul, kind=kind, kernel=kernel, gradients=backward)
    y, pull = jax.vjp(jnp.matmul if kind is None else product, x, w)
    return y, *pull(d_y)


def error(ours, theirs):
    return np.linalg.norm(np.float32(ours) - np.float32(theirs)) / np.linalg.norm(np.float32(theirs))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_error_of_a_random_product(kind, dtype):
    inputs = arrays(rows=512, dtype=dtype)
    exact = gradients(*(x.astype(jnp.float32) for x in inputs), None)
    for ours, theirs, bound in zip(gradients(*inputs, kind), exact, BOUNDS[kind], strict=True):
        assert ours.dtype == dtype
        assert error(ours, theirs) < bound


def test_plain_gradients_are_those_of_the_plain_product():
    inputs = arrays()
    y, *ours = gradients(*inputs, "int8", backward="plain")
    exact, *theirs = gradients(*inputs, None)
    assert 0 < error(y, exact) < 0.015
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.floats(-20, 20))
def test_no_sum_is_off_by_more_than_its_terms_can_be(seed, kind, spread):
    """Terms of any size: |q - x| is half a step of int8, or 1/16 of x, and where e4m3 is even, half of 2^-9."""
    rng = np.random.default_rng(seed)
    x, w = (rng.normal(size=shape) * np.exp2(spread * rng.random(shape)) for shape in ((3, 7), (7, 5)))
    x, w = np.float32(x), np.float32(w)

    def off(values, axis):
        most = np.abs(values).max(axis=axis, keepdims=True)
        if kind == "int8":
            return np.broadcast_to(most / 127 / 2, values.shape)
        return np.maximum(np.abs(values) / 16, most / 448 * 2**-10)

    off_x, off_w = off(x, 1), off(w, 0)
    bound = np.abs(x) @ off_w + off_x @ np.abs(w) + off_x @ off_w
    y = quantized_matmul(jnp.asarray(x), jnp.asarray(w), kind=kind, kernel="plain")
    assert np.all(np.abs(y - np.float64(x) @ w) <= bound * (1 + 1e-4) + 1e-6 * (np.abs(x) @ np.abs(w)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_eight_bits_can_say_is_exact(kind):
    """Small whole numbers, of which each row and column has its largest."""
    largest = 127 if kind == "int8" else 448
    x = jnp.asarray([[largest, 2, 0], [-8, largest, 1]], jnp.float32)
    w = jnp.asarray([[1, largest], [largest, 0], [-3, 4]], jnp.float32)
    np.testing.assert_allclose(quantized_matmul(x, w, kind=kind, kernel="plain"), x @ w, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_and_what_is_not_finite_is_seen(kind):
    x, w, d_y = arrays(4, 8, 8)
    y = quantized_matmul(x.at[0].set(0).at[1, 2].set(jnp.nan).at[2, 3].set(jnp.inf), w, kind=kind, kernel="plain")
    assert np.all(y[0] == 0)
    assert not np.any(np.isfinite(y[1:3]))
    assert np.all(np.isfinite(y[3]))
    for tiny in (1e-32, 1e-36, 1e-38):  # below what scales are made of
        assert np.all(np.abs(quantized_matmul(x * tiny, w, kind=kind, kernel="plain")) < 1e-29)


def test_a_large_number_costs_its_own_row_alone():
    x, w, _ = arrays()
    spoiled, same = (quantized_matmul(x, w, kind="int8", kernel="plain") for x in (x.at[0, 0].set(1e4), x))
    np.testing.assert_array_equal(spoiled[1:], same[1:])


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_rounding_is_to_nearest_even(dtype):
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = jnp.asarray([[largest, 0.5, 1.5, -2.5, 2.25]])
    values, scales = quantized(x, jnp.dtype(dtype), axis=1)
    expected = jnp.asarray([largest, 0, 2, -2, 2]) if dtype == jnp.int8 else x[0].astype(dtype).astype(jnp.float32)
    np.testing.assert_array_equal(values[0].astype(jnp.float32), expected)
    np.testing.assert_array_equal(scales, [1.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(3, 5, 7), (130, 200, 260), (256, 384, 128)], ids=str)
def test_pallas_equals_plain(kind, sizes):
    """Less than a tile, not a multiple of one, several of each."""
    inputs = arrays(*sizes)
    with pltpu.force_tpu_interpret_mode():
        ours = gradients(*inputs, kind, "pallas")
    for a, b in zip(ours, gradients(*inputs, kind), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_pallas_adds_up_tiles(monkeypatch):
    monkeypatch.setattr("ops.quantized_matmul.TILES", (LANES, LANES, LANES))
    x, w, _ = arrays(256, 384, 256, seed=1)
    with pltpu.force_tpu_interpret_mode():
        y = quantized_matmul(x, w, kind="int8", kernel="pallas")
    np.testing.assert_allclose(y, quantized_matmul(x, w, kind="int8", kernel="plain"), rtol=1e-6)


def test_tiles_divide_what_they_are_padded_to():
    assert [_tile(size, 1024) for size in (1, 128, 640, 1024, 1100, 2688, 14336)] == [
        128,
        128,
        640,
        1024,
        384,
        896,
        1024,
    ]


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("BTD,DF->BTF", (2, 3, 8), (8, 5)),
        ("BTD,DNH->BTNH", (2, 3, 8), (8, 2, 4)),
        ("BTNH,NHD->BTD", (2, 3, 2, 4), (2, 4, 8)),
    ],
)
def test_einsum(equation, x, w):
    x, w = (jax.random.normal(jax.random.key(len(shape)), shape) for shape in (x, w))
    ours = quantized_einsum(equation, x, w, kind="int8", kernel="plain")
    assert ours.shape == jnp.einsum(equation, x, w).shape
    assert error(ours, jnp.einsum(equation, x, w)) < 0.015


@pytest.mark.parametrize("equation", ["BTD,VD->BTV", "BTD,DF->TBF", "BTD,EF->BTDEF", "BTD,DT->BT"])
def test_other_einsums_are_refused(equation):
    with pytest.raises(ValueError, match="not a product over the last dims"):
        quantized_einsum(equation, jnp.ones((2, 3, 4)), jnp.ones((4, 4)), kind="int8", kernel="plain")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["plain", "pallas"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_tpu_compiler_takes_it(topology, kind, kernel):
    here = SingleDeviceSharding(tpu_devices(topology)[0])
    shapes = (1024, 2048), (2048, 1536), (1024, 1536)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in shapes]
    text = gradients.lower(*inputs, kind, kernel).compile().as_text()
    assert text.count("tpu_custom_call") == (3 if kernel == "pallas" else 0)  # y, d_x, d_w
    assert ("s8[" if kind == "int8" else "f8e5m2[") in text
