"""Moments in bfloat16, and what waits in host memory: the same curve in fewer bytes, refused where it means nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.commandline import resolve
from parallel.config import MeshConfig
from parallel.mesh import make_mesh
from perf import memory
from tests.training.test_step import MODEL, OPTIM, RULES, TRAIN, run
from train import DEFAULT
from training.optimizer import SLOWEST
from training.state import abstract_state
from training.step import make_steps

HALF = dataclasses.replace(OPTIM, moments="bfloat16")


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def moments(optim):
    steps = make_steps(MODEL, optim, TRAIN, one_device(), RULES)
    state = abstract_state(MODEL, steps.optimizer, ema=True)
    fields = {}
    for path, leaf in jax.tree.leaves_with_path(state.optimizer):
        for key in path:
            if getattr(key, "name", None) in ("mu", "nu"):
                fields.setdefault(key.name, set()).add(leaf.dtype)
    return fields, memory.training(MODEL, TRAIN, one_device(), RULES, state, steps.state)["moments"]


@pytest.mark.parametrize("rule", ["adamw", "lion", "muon"])
def test_moments_rest_in_half_the_bytes(rule):
    fields, held = moments(dataclasses.replace(HALF, name=rule))
    _, before = moments(dataclasses.replace(OPTIM, name=rule))
    assert all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in fields.values())
    assert "mu" in fields
    assert held == pytest.approx(before / 2, rel=0.01)


def test_a_second_moment_too_slow_for_bfloat16_stays_float32():
    fields, _ = moments(dataclasses.replace(HALF, b2=0.999))
    assert fields == {"mu": {jnp.dtype(jnp.bfloat16)}, "nu": {jnp.dtype(jnp.float32)}}
    number = jnp.asarray(1.0, jnp.bfloat16)
    assert (0.999 * number.astype(jnp.float32)).astype(jnp.bfloat16) == number, "it would stand still"
    assert (SLOWEST * number.astype(jnp.float32)).astype(jnp.bfloat16) < number


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_the_curve_stays_close(rule):
    curves = [
        [
            float(values["loss"])
            for values in run(one_device(), dataclasses.replace(optim, name=rule), batches=[0] * 8)[1]
        ]
        for optim in (OPTIM, HALF)
    ]
    assert curves[0][-1] < curves[0][0] - 0.5
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.01)


def test_host_memory_is_refused_on_a_cpu():
    model = dataclasses.replace(MODEL, remat="full", remat_offload=("middle",))
    with pytest.raises(ValueError, match=r"model\.remat_offload=middle moves arrays to host memory"):
        make_steps(model, OPTIM, TRAIN, one_device(), RULES)


@pytest.mark.parametrize("field", ["remat", "remat_save", "remat_offload"])
def test_unknown_names_are_refused(field):
    with pytest.raises(ValueError, match=field):
        resolve([f"model.{field}=midle"], DEFAULT)


@pytest.mark.parametrize(
    "change",
    [{"remat": "attention"}, {"remat": "minimal"}, {"remat": "full", "remat_save": ("middle", "ffn_up")}],
    ids=str,
)
def test_every_policy_gives_the_plain_step(change):
    plain, other = (
        run(one_device(), model=model, batches=(0, 1))[1] for model in (MODEL, dataclasses.replace(MODEL, **change))
    )
    for mine, theirs in zip(other, plain, strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=3e-6)
