"""Products of 8 bits: near the float product, equal between kernels, and gradients that are near, too.

Rounding a row to 127 steps each way errs by up to half a step, 1 / 254 of its largest number, sqrt(1/12) of a step in
the mean. In a row of D normal numbers the largest is about 3.5 deviations, so a number errs by 3.5 / 127 / sqrt(12) =
0.8 %, two factors by 1.1 %, and so does a sum of their products. e4m3 has 3 bits behind the point: up to 1 / 16, 2.6 %
in the mean; e5m2 twice that.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.quantized_matmul import quantize, quantized_matmul
from tests.tpu import tpu_devices

BOUNDS = {"int8": (0.015, 0.015), "fp8": (0.045, 0.07)}  # of a product, of a gradient: relative, Frobenius


def arrays(T=256, D=384, F=128):
    x, w, grad = jax.random.split(jax.random.key(0), 3)
    return jax.random.normal(x, (T, D)), jax.random.normal(w, (D, F)), jax.random.normal(grad, (T, F))


def error(mine, exact):
    return float(jnp.linalg.norm(mine - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize("kind", BOUNDS)
def test_products_and_gradients_are_near_the_float_ones(kind):
    x, w, grad = arrays()
    y, pull = jax.vjp(lambda x, w: quantized_matmul(x, w, kind), x, w)
    exact, exact_pull = jax.vjp(jnp.matmul, x, w)
    assert 0 < error(y, exact) < BOUNDS[kind][0]
    for mine, theirs in zip(pull(grad), exact_pull(grad), strict=True):
        assert 0 < error(mine, theirs) < BOUNDS[kind][1]


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("shape", [(256, 384, 128), (512, 1024, 512)], ids=str)
def test_the_tpu_kernel_gives_the_same_numbers(kind, shape):
    x, w, grad = arrays(*shape)

    def both(kernel):
        y, pull = jax.vjp(lambda x, w: quantized_matmul(x, w, kind, kernel, kernel == "pallas"), x, w)
        return y, *pull(grad)

    for mine, theirs in zip(jax.jit(both, static_argnums=0)("pallas"), both("plain"), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)


def test_a_large_number_costs_its_own_row_alone():
    x, w, _ = arrays()
    spoiled = x.at[0, 0].set(1e4)
    np.testing.assert_array_equal(quantized_matmul(spoiled, w, "int8")[1:], quantized_matmul(x, w, "int8")[1:])


def test_zeros_stay_zeros():
    q, scale = quantize(jnp.zeros((2, 8)), jnp.int8)
    assert not q.any()
    assert (scale == 1).all()


def test_bfloat16_in_bfloat16_out():
    x, w, _ = arrays()
    assert quantized_matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), "int8").dtype == jnp.bfloat16


@pytest.mark.parametrize(("topology", "kind"), [("v5e:2x2", "int8"), ("v6e:2x2", "fp8")])
def test_it_compiles_for_tpus(topology, kind, monkeypatch):
    one = jax.sharding.SingleDeviceSharding(tpu_devices(topology, monkeypatch)[0])
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=one)
    program = jax.jit(lambda x, w: quantized_matmul(x, w, kind, "pallas")).lower(x, x).compile()
    assert f"{kind}_matmul" in program.as_text()
