"""One step is the same step on every mesh, in parts or whole, and a bad one changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.packing import Batch
from model.config import ModelConfig
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh
from training.config import OptimConfig, TrainConfig
from training.state import create_state, state_shardings
from training.step import make_steps

B, T, V, RULES = 8, 12, 64, AxisRules()
MODEL = ModelConfig(
    vocab_size=V, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=24, max_length=16,
    rope_theta=1e4, norm_eps=1e-6, layers=("window", "global"), window=4,
)  # fmt: skip
OPTIM = OptimConfig(peak_lr=1e-2, warmup_steps=1, ema_decay=0.5)
TRAIN = TrainConfig(steps=10, batch_size=B, seq_len=T, loss_chunk=5)


def batch_of(seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(0, V, (B, T + 1), dtype=np.int32)
    mask = np.ones((B, T), np.float32)
    mask[:3, 7:] = 0  # rows of different lengths: parts of a batch count different numbers of tokens
    places = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return Batch(ids[:, :-1], ids[:, 1:], mask, np.ones((B, T), np.int32), places)


def run(mesh, optim=OPTIM, train=TRAIN, model=MODEL, batches=(0, 1, 2)):
    steps = make_steps(model, optim, train, mesh, RULES)
    state = create_state(model, steps.optimizer, mesh, RULES, ema=optim.ema_decay > 0, seed=0)
    first, metrics = jax.device_get(state.parameters), []
    for seed in batches:
        state, values = steps.train(state, batch_of(seed))
        metrics.append(jax.device_get(values))
    return first, metrics, jax.device_get(dataclasses.replace(state, key=None))


@pytest.fixture(scope="module")
def one_device():
    return run(make_mesh(MeshConfig(), jax.devices()[:1]))


def assert_trees(actual, expected, **bound):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **bound)


# Float32 sums in another order: a few units in the last place of the loss; Adam's first steps divide by moments of the
# size of the gradient itself, so parameters agree to about the learning rate times the gradients' relative error.
MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=4, tensor=2),
]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"data{m.data}-fsdp{m.fsdp}-tensor{m.tensor}")
def test_any_mesh_equals_one_device(mesh, one_device):
    first, metrics, after = run(make_mesh(mesh))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(one_device[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    for mine, theirs in zip(metrics, one_device[1], strict=True):
        assert_trees(mine, theirs, rtol=3e-6)
    assert_trees(after.parameters, one_device[2].parameters, atol=2e-5)
    assert_trees(after.ema, one_device[2].ema, atol=2e-5)


def test_accumulation_equals_the_whole_batch(one_device):
    _, metrics, after = run(make_mesh(MeshConfig(), jax.devices()[:1]), train=dataclasses.replace(TRAIN, accumulate=4))
    for mine, theirs in zip(metrics, one_device[1], strict=True):
        assert_trees(mine, theirs, rtol=3e-6)
    assert_trees(after.parameters, one_device[2].parameters, atol=2e-5)


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"scan_layers": False}], ids=str)
def test_remat_and_unrolling_equal_the_plain_step(change, one_device):
    model = dataclasses.replace(MODEL, **change)
    _, metrics, _ = run(make_mesh(MeshConfig(), jax.devices()[:1]), model=model)
    if model.scan_layers:
        for mine, theirs in zip(metrics, one_device[1], strict=True):
            assert_trees(mine, theirs, rtol=3e-6)
    else:
        np.testing.assert_allclose(metrics[0]["loss"], one_device[1][0]["loss"], rtol=3e-6)


def test_the_first_loss_is_near_log_vocabulary(one_device):
    assert abs(one_device[1][0]["loss"] - np.log(V)) < 1.0


def test_a_model_learns_one_batch():
    _, metrics, _ = run(make_mesh(MeshConfig(), jax.devices()[:1]), batches=[0] * 9)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1.0


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    steps = make_steps(MODEL, OPTIM, TRAIN, mesh, RULES)
    state = create_state(MODEL, steps.optimizer, mesh, RULES, ema=True, seed=0)
    before = jax.device_get((state.parameters, state.optimizer, state.ema))
    bad = batch_of(0)
    bad.mask[0, 0] = np.nan
    skipped = []
    for batch in (bad, bad):
        state, metrics = steps.train(state, batch)
        skipped.append(int(metrics["skipped"]))
    for a, b in zip(
        jax.tree.leaves(jax.device_get((state.parameters, state.optimizer, state.ema))),
        jax.tree.leaves(before),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    state, metrics = steps.train(state, batch_of(0))
    assert skipped == [1, 2]
    assert int(metrics["skipped"]) == 0
    assert (int(state.step), int(state.skipped_total)) == (3, 2)
    assert float(metrics["learning_rate"]) == pytest.approx(OPTIM.peak_lr / 2)  # the schedule waited, too


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "lion", "muon"])
def test_moments_are_split_like_their_parameters(rule):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    steps = make_steps(MODEL, dataclasses.replace(OPTIM, name=rule), TRAIN, mesh, RULES)
    placed = state_shardings(MODEL, steps.optimizer, mesh, RULES, ema=True)
    specs = {str(where.spec) for where in jax.tree.leaves(placed.optimizer)}
    if rule != "adafactor":  # its factors are vectors
        assert str(placed.parameters["layers"]["ffn"]["up"].spec) in specs
    assert placed.ema == placed.parameters


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"'heads' of size 2 .* does not divide over 4 devices"):
        make_steps(MODEL, OPTIM, TRAIN, make_mesh(MeshConfig(data=2, tensor=4)), RULES)


def test_documents_of_a_row_cannot_see_each_other():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    steps = make_steps(MODEL, OPTIM, TRAIN, mesh, RULES)
    state = create_state(MODEL, steps.optimizer, mesh, RULES, ema=True, seed=0)
    batch = batch_of(0)
    batch.segments[:, 6:] = 2
    batch.positions[:, 6:] = np.arange(T - 6)
    batch.mask[:, :6] = 0
    other = batch._replace(tokens=batch.tokens.copy())
    other.tokens[:, :6] = (other.tokens[:, :6] + 1) % V
    losses = [jax.device_get(steps.evaluate(state.parameters, b))["nll"] for b in (batch, other)]
    assert losses[0] == losses[1]


def test_bfloat16_compute_stays_close():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(MODEL, compute_dtype=dtype)
        steps = make_steps(model, OPTIM, TRAIN, mesh, RULES)
        state = create_state(model, steps.optimizer, mesh, RULES, ema=True, seed=0)
        assert jax.tree.leaves(state.parameters)[0].dtype == jnp.float32
        losses.append(float(steps.train(state, batch_of(0))[1]["loss"]))
    assert abs(losses[0] - losses[1]) < 0.02
