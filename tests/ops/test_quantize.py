"""Quantized weights err no more than their scheme says, and multiply as the array that they mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import quantize as module
from ops.quantize import SCHEMES, Quantized, group_size, quantize, streamed

KEY, F32 = jax.random.key(0), jnp.dtype(jnp.float32)
PRODUCTS = [
    ("BTD,DNH->BTNH", (2, 3, 64), (64, 5, 2), (0,)),
    ("BTNH,NHD->BTD", (2, 3, 2, 32), (2, 32, 6), (0, 1)),
    ("BTD,DF->BTF", (1, 1, 64), (64, 7), (0,)),
    ("BTD,VD->BTV", (1, 4, 32), (11, 32), (1,)),
]


@pytest.mark.parametrize("summed", [(0,), (1,)])
def test_int8_errs_by_half_a_scale_of_its_output(summed):
    w = jax.random.normal(KEY, (64, 48))
    made = quantize(w, summed, "int8")
    assert made.codes.dtype == jnp.int8
    scale = jnp.max(jnp.abs(w), axis=summed, keepdims=True) / 127
    error = jnp.abs(made.astype(F32) - w) / scale
    assert 0.4 < float(jnp.max(error)) < 0.5001


def test_fp8_errs_by_a_sixteenth_or_a_step_near_zero():
    w = jax.random.normal(KEY, (64, 48)) * jnp.exp(jax.random.normal(jax.random.key(1), (64, 1)) * 4)
    made = quantize(w, (0,), "fp8")
    assert made.codes.dtype == jnp.float8_e4m3fn
    step = jnp.max(jnp.abs(w), axis=0, keepdims=True) / 448 / 1024
    error = jnp.abs(made.astype(F32) - w)
    assert bool(jnp.all(error <= jnp.maximum(jnp.abs(w) / 16, step) * 1.0001))


def test_every_code_of_fp8_is_decoded():
    codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.float8_e4m3fn)
    exact = codes.astype(F32)
    finite = np.isfinite(exact)
    assert finite.sum() == 254
    np.testing.assert_array_equal(np.asarray(module._as_float(codes))[finite], np.asarray(exact)[finite])


def test_int4_errs_by_half_a_step_of_its_group_without_clipping(monkeypatch):
    monkeypatch.setattr(module, "SHRINKS", (1.0,))
    w = jax.random.normal(KEY, (64, 48))
    made = quantize(w, (0,), "int4")
    assert (made.codes.dtype, made.codes.shape, made.scales.shape) == (jnp.uint4, (48, 64), (48, 2))
    groups = w.reshape(2, 32, 48)
    step = (jnp.max(groups, axis=1, keepdims=True) - jnp.min(groups, axis=1, keepdims=True)) / 15
    error = jnp.abs(made.astype(F32).reshape(2, 32, 48) - groups) / step
    assert 0.4 < float(jnp.max(error)) < 0.51


def test_int4_clips_only_where_the_squares_become_fewer(monkeypatch):
    w = jax.random.t(KEY, 3.0, (64, 48))

    def squares():
        error = quantize(w, (0,), "int4").astype(F32) - w
        return jnp.sum((error**2).reshape(2, 32, 48), axis=1)

    clipped = squares()
    monkeypatch.setattr(module, "SHRINKS", (1.0,))
    plain = squares()
    assert bool(jnp.all(clipped <= plain * 1.0001))
    assert float(jnp.sum(clipped)) < 0.97 * float(jnp.sum(plain))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_again_changes_nothing_where_weights_lie_on_the_grid(scheme):
    once = quantize(jax.random.normal(KEY, (64, 6)), (0,), scheme)
    again = quantize(once.astype(F32), (0,), scheme)
    np.testing.assert_allclose(again.astype(F32), once.astype(F32), atol=2e-3 if scheme == "int4" else 1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme):
    assert not np.any(np.asarray(quantize(jnp.zeros((64, 3)), (0,), scheme).astype(F32)))


def test_groups_divide_the_inputs():
    assert [group_size(size) for size in (576, 64, 48, 31, 37)] == [32, 32, 24, 31, 1]


@pytest.mark.parametrize("form", ["plain", "streamed", "in tiles"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("equation", "x_shape", "w_shape", "summed"), PRODUCTS)
def test_products_are_those_of_the_decoded_weight(equation, x_shape, w_shape, summed, scheme, form, monkeypatch):
    x, w = jax.random.normal(KEY, x_shape), jax.random.normal(jax.random.key(1), w_shape)
    if form == "in tiles":  # of three outputs, which leaves a rest
        monkeypatch.setattr(module, "TILE_BYTES", 3 * 4 * 64)
    made = quantize(w, summed, scheme)
    expected = jnp.einsum(equation, x, made.astype(F32))
    held = made if form == "plain" else streamed(made)
    assert held.shape == w.shape
    found = jax.jit(lambda x, held: held.einsum(equation, x))(x, held)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(held[...].astype(F32), made.astype(F32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_in_bfloat16_are_near(scheme):
    x, w = jax.random.normal(KEY, (1, 2, 64)).astype(jnp.bfloat16), jax.random.normal(KEY, (64, 7))
    made = quantize(w, (0,), scheme)
    expected = np.asarray(jnp.einsum("BTD,DF->BTF", x.astype(F32), made.astype(F32)))
    for held in (made, streamed(made)):
        found = held.einsum("BTD,DF->BTF", x)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(F32), expected, atol=0.15)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_a_table(scheme):
    made = quantize(jax.random.normal(KEY, (11, 32)), (1,), scheme)
    ids = jnp.asarray([[0, 5, 10], [3, 3, 7]])
    for held in (made, streamed(made)):
        np.testing.assert_array_equal(held.take(ids), made.astype(F32)[ids])


def test_bytes_are_those_that_are_stored():
    w = jnp.ones((64, 10))
    sizes = {scheme: quantize(w, (0,), scheme).num_bytes for scheme in SCHEMES}
    assert sizes == {"int8": 640 + 40, "fp8": 640 + 40, "int4": 320 + 2 * 2 * 20}
    assert streamed(quantize(w, (0,), "int4")).num_bytes == 400


def test_a_loop_over_tokens_does_not_decode_before_it():
    """What is decoded once, before the loop, is read as float32 in every turn."""
    held = streamed(quantize(jax.random.normal(KEY, (96, 64)), (0,), "int8"))

    def turns(held: Quantized, x):
        def body(_, x):
            return held.einsum("BTD,DF->BTF", jnp.pad(x, ((0, 0), (0, 0), (0, 32))))

        return jax.lax.fori_loop(0, 4, body, x)

    text = jax.jit(turns).lower(held, jnp.ones((1, 1, 64))).compile().as_text()
    (while_,) = [line for line in text.splitlines() if " while(" in line]
    assert "s8[64,96]" in while_
    assert "f32[64,96]" not in while_
    assert "f32[96,64]" not in while_


def test_the_form_is_part_of_the_tree():
    made = quantize(jnp.ones((64, 2)), (0,), "int8")
    assert jax.tree.structure(made) != jax.tree.structure(streamed(made))
    assert dataclasses.replace(streamed(made), is_streamed=False).codes.dtype == made.codes.dtype
