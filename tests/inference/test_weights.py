"""What is served is the same model, in the shapes that were foretold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import weights
from inference.weights import serving_parameters
from ops.slabs import Slabs
from parallel.config import MeshConfig
from tests.inference.small import GPT2, MIXTURE, ONE, engine, mesh_of, parameters, row, run

PROMPT = (5, 4, 3)


@pytest.fixture(autouse=True)
def _three_cores(monkeypatch):
    monkeypatch.setattr(weights, "cores", lambda: 3)


@pytest.mark.parametrize(("family", "scan_layers"), [(GPT2, True), (GPT2, False), (MIXTURE, True)])
def test_a_cpu_is_served_slabs_of_the_same_model(family, scan_layers):
    config = dataclasses.replace(family, scan_layers=scan_layers)
    served_config, served = serving_parameters(config, parameters(config), mesh_of(ONE))
    assert served_config == family
    assert isinstance(served["layers"][0]["attention"]["q"], Slabs)
    assert len(served["embedding"]["tokens"].parts) == 3
    if family.num_experts:  # one tensor for all of them
        assert isinstance(served["layers"][0]["ffn"]["up"], jax.Array)
    plain, cut = engine(family), engine(family)
    cut.parameters = served
    (tokens, logprobs), (expected, expected_logprobs) = run(cut, [row(PROMPT)])[0], run(plain, [row(PROMPT)])[0]
    assert tokens == expected
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-5)


@pytest.mark.parametrize("mesh", [ONE, MeshConfig(data=2, tensor=2)])
def test_matrices_are_served_in_the_type_they_multiply_in(mesh):
    config = dataclasses.replace(GPT2, compute_dtype="bfloat16")
    _, served = serving_parameters(config, parameters(GPT2, mesh), mesh_of(mesh))
    assert {leaf.dtype for leaf in jax.tree.leaves(served["embedding"]["tokens"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(served["layers"][1]["ffn"]["up"])} == {jnp.dtype("bfloat16")}
    assert served["norm"]["scale"].dtype == served["embedding"]["positions"].dtype == jnp.float32


def test_several_devices_keep_whole_matrices():
    mesh = mesh_of(MeshConfig(data=2, tensor=2))
    assert weights.num_slabs(mesh) == 1
    assert weights.num_slabs(mesh_of(ONE)) == 3
