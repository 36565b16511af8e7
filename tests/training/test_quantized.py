"""Training with products of 8 bits: the same curve, nearly, and nearly the same on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from parallel.config import MeshConfig
from parallel.mesh import make_mesh
from tests.training.test_step import MODEL, run


def losses(kind, mesh=None, batches=[0] * 8):
    devices = jax.devices() if mesh else jax.devices()[:1]
    model = dataclasses.replace(MODEL, matmul=kind)
    return [
        float(step["loss"]) for step in run(make_mesh(mesh or MeshConfig(), devices), model=model, batches=batches)[1]
    ]


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("fp8", 0.03)])
def test_the_curve_stays_close(kind, bound):
    plain, rounded = losses("float"), losses(kind)
    assert plain[-1] < plain[0] - 0.5
    assert rounded != plain
    np.testing.assert_allclose(rounded, plain, rtol=bound)


def test_a_mesh_stays_close_to_one_device():
    """Not equal: a part of a split sum is scaled by its own largest numbers."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    np.testing.assert_allclose(losses("int8", mesh, [0, 1, 2]), losses("int8", None, [0, 1, 2]), rtol=0.005)
