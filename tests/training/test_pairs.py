"""Encoder–decoders in training: any mesh is one device, dropout included; smoothing is what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.dates import run as dates
from model import parameters
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from tests.model.seq2seq_cases import T, config_of, pairs, weights_of
from training.config import OptimConfig, TrainConfig
from training.losses import smoothing
from training.optimizer import learning_rate
from training.state import create_state
from training.step import make_steps

B, STEPS = 8, 4
OPTIM = OptimConfig(peak_lr=0.1, warmup_steps=1, eps=1.0, weight_decay=0.01, schedule="constant")
TRAIN = TrainConfig(steps=STEPS, batch_size=B, seq_len=T, loss_chunk=3, label_smoothing=0.1)
MESHES = {"data": {"data": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}}


def trained(config, mesh, train=TRAIN):
    """Losses and gradient norms of some steps, and the parameters after them."""
    grid, rules = make_mesh(mesh, jax.devices()[: np.prod([max(n, 1) for n in mesh.axes.values()])]), AxisRules()
    steps = make_steps(config, OPTIM, train, grid, rules)
    state = create_state(config, steps.optimizer, grid, rules, ema=False, seed=0)
    told = []
    for step in range(STEPS):
        batch = jax.device_put(pairs(B, seed=step), steps.batch)
        state, metrics = steps.train(state, batch)
        told.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
    held_out = steps.evaluate(state.parameters, jax.device_put(pairs(B, seed=9), steps.batch))
    return told, float(held_out["nll"]), jax.device_get(state.parameters)


KINDS = ("fixed-lstm-reversed", "additive", "relative")


@pytest.fixture(scope="module", params=KINDS)
def alone(request):
    config = config_of(request.param, dropout=0.2)
    return config, trained(config, MeshConfig(data=1))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_is_one_device(alone, mesh):
    """A mesh adds the same float32 numbers in another order: bounds as in test_meshes.py."""
    config, (told, nll, weights) = alone
    told_there, nll_there, weights_there = trained(config, MeshConfig(**MESHES[mesh]))
    for here, there in zip(told, told_there, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=6e-6)
        assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=6e-5)
    assert nll_there == pytest.approx(nll, rel=6e-6)
    for (path, a), b in zip(jax.tree.leaves_with_path(weights), jax.tree.leaves(weights_there), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6 * max(1.0, float(np.max(np.abs(a)))), err_msg=str(path))


def test_accumulated_parts_are_one_batch():
    config = config_of("additive", dropout=0.2)
    whole, _, _ = trained(config, MeshConfig(data=1))
    parts, _, _ = trained(config, MeshConfig(data=1), dataclasses.replace(TRAIN, accumulate=2))
    for here, there in zip(whole, parts, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=6e-6)
        assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=6e-5)


def test_smoothing_is_the_cross_entropy_of_smoothed_targets():
    config, batch, share = config_of("additive"), pairs(4), 0.1
    model = parameters.seq2seq(config, weights_of(config))
    hidden = model.forward(*map(jnp.asarray, (batch.source, batch.source_mask, batch.tokens)), None)
    log_p = jax.nn.log_softmax(model.logits(hidden))
    V, mask, targets = log_p.shape[-1], jnp.asarray(batch.mask), jnp.asarray(batch.targets)
    wanted = (1 - share) * jax.nn.one_hot(targets, V) + share / V
    whole = -jnp.sum(jnp.sum(wanted * log_p, axis=-1) * mask)
    nll = -jnp.sum(jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0] * mask)
    found = nll + share * smoothing(hidden, model.unembedding, targets, mask)
    assert float(found) == pytest.approx(float(whole), rel=1e-5)


def test_inverse_sqrt_is_vaswanis_schedule():
    """D^-0.5 min(step^-0.5, step warmup^-1.5), of which peak_lr is the maximum, (D warmup)^-0.5."""
    D, warmup = 512, 40
    rate = learning_rate(
        OptimConfig(peak_lr=(D * warmup) ** -0.5, warmup_steps=warmup, schedule="inverse_sqrt"), total_steps=1000
    )
    for step in (warmup, 100, 400, 999):
        assert float(rate(step)) == pytest.approx(D**-0.5 * step**-0.5, rel=1e-5)
    assert float(rate(10)) < float(rate(20)) < float(rate(warmup))


def test_steps_of_every_bucket_are_one_program_each():
    train = dataclasses.replace(dates.train, batch_size=2, seq_len=8, steps=2)
    config = dataclasses.replace(dates.model, vocab_size=64, embed_dim=8, recurrent_dim=8)
    mesh, rules = make_mesh(MeshConfig(data=1), jax.devices()[:1]), AxisRules()
    steps = make_steps(config, OPTIM, train, mesh, rules)
    state = create_state(config, steps.optimizer, mesh, rules, ema=False, seed=0)
    for rows, width in ((4, 4), (2, 8), (4, 4)):
        state, metrics = steps.train(state, jax.device_put(pairs(rows, width=width), steps.batch))
        assert np.isfinite(float(metrics["loss"]))
    assert optax.tree.norm(state.parameters) > 0
