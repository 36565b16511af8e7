"""Every mesh gives one device's losses and gradients, over 20 steps from the same weights and batches, bit for bit.

    pytest tests/training/test_meshes.py                         a row of each kind
    pytest tests/training/test_meshes.py -m "slow or not slow"   the whole table, and more random meshes

Where the bounds come from. A mesh adds the same float32 numbers in another order, so one step differs by rounding alone:
u = 2^-24 = 6e-8 for each operation, of which a path from a token through 4 layers to the loss and back to a weight has
about 100, every one a sum of up to B * T = 256 terms. Errors of either sign add up as a random walk: a gradient is off by
about sqrt(100) u = 6e-7 of its norm, ten times that where terms cancel (biases, norms): GRADIENT. A loss is a mean of
numbers of one sign: a few u.

Over steps weights drift apart. With Adam's usual eps a weight moves by the learning rate whatever its gradient is, and
noise in a small gradient is blown up to that size; here eps = 1 is far above any gradient, and AdamW is gradient descent
with momentum: w moves by rate * m. A rate below 2 / curvature doesn't amplify what is there, so after n steps weights are
off by at most n * rate * (error of a gradient) and the loss by |g| times that: 20 * 0.5 * 6e-7 * |g|^2 with |g| <= 1 after
clipping, 6e-6 of a loss of 3: LOSS. A missing or double sum is off by a factor: `test_a_lost_sum_is_seen` loses some.

bfloat16 has u = 2^-9 = 2e-3 in products, with float32 sums; parameters, moments and the loss stay float32. The loss averages
over 200 tokens what u does to a logit, and drifts as above: 20 * 0.5 * (gradients' 2e-2) * |g|^2, of which most averages out.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data.packing import Batch
from model.config import ModelConfig
from parallel.config import AxisRules, ExecutionConfig, MeshConfig
from parallel.mesh import make_mesh
from training import step
from training.config import OptimConfig, TrainConfig
from training.state import create_state
from training.step import make_steps

B, T, V, STEPS, RULES = 16, 16, 64, 20, AxisRules()
DENSE = ModelConfig(
    vocab_size=V, embed_dim=16, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=4, ffn_dim=24, max_length=T,
    rope_theta=1e4, norm_eps=1e-6, layers=("window", "global"), window=4,
)  # fmt: skip
EXPERTS = dataclasses.replace(
    DENSE, num_experts=8, experts_per_token=2, expert_ffn_dim=8, shared_ffn_dim=8, router="sigmoid",
    router_bias_rate=0.01, balance_loss=0.01, router_z_loss=0.001,
)  # fmt: skip
MODELS = {"dense": DENSE, "experts": EXPERTS}
OPTIM = OptimConfig(peak_lr=0.5, warmup_steps=2, eps=1.0, weight_decay=0.01, schedule="constant")
TRAIN = TrainConfig(steps=STEPS, batch_size=B, seq_len=T, loss_chunk=5, z_loss=1e-3)


class Bound(NamedTuple):
    """How far a mesh may be from one device."""

    loss: float  # relative, at every step
    gradient: float  # norm of the difference / norm, of each parameter


BOUNDS = {"float32": Bound(loss=6e-6, gradient=6e-6), "bfloat16": Bound(loss=5e-3, gradient=5e-2)}


class Result(NamedTuple):
    initial: dict
    metrics: list[dict]
    gradients: dict  # of the first step, clipped


def batch_of(seed: int, batch_size: int = B, seq_len: int = T) -> Batch:
    """Rows of two documents, some of them cut short: devices have different numbers of tokens that count."""
    random = np.random.default_rng(seed)
    ids = (random.random((batch_size, seq_len + 1)) ** 2 * V).astype(np.int32)  # small ones more often: can be learnt
    mask = np.ones((batch_size, seq_len), np.float32)
    mask[: batch_size // 4, seq_len - 6 :] = 0
    segments = np.where(np.arange(seq_len) < 6, 1, 2) * np.ones((batch_size, 1), np.int32)
    segments[: batch_size // 4, seq_len - 6 :] = 0
    places = np.arange(seq_len) - np.where(np.arange(seq_len) < 6, 0, 6)
    positions = np.tile(places.astype(np.int32), (batch_size, 1))
    return Batch(ids[:, :-1], ids[:, 1:], mask, segments.astype(np.int32), positions)


def run(mesh: MeshConfig | None, model, train=TRAIN, execution=ExecutionConfig(), num_steps=STEPS) -> Result:
    grid = make_mesh(mesh or MeshConfig(), jax.devices() if mesh else jax.devices()[:1])
    steps = make_steps(model, OPTIM, train, grid, RULES, execution)
    state = create_state(model, steps.optimizer, grid, RULES, ema=False, seed=0)
    initial, metrics, gradients = jax.device_get(state.parameters), [], {}
    for number in range(num_steps):
        state, told = steps.train(state, batch_of(number % 4, train.batch_size, train.seq_len))
        metrics.append({name: float(value) for name, value in jax.device_get(told).items()})
        if number == 0:
            moments = optax.tree.get(state.optimizer, "mu")  # after one step (1 - b1) times the gradient
            gradients = jax.tree.map(lambda mu: mu / (1 - OPTIM.b1), jax.device_get(moments))
    return Result(initial, metrics, gradients)


@functools.cache
def one_device(kind: str, loss: str, dtype: str) -> Result:
    model = dataclasses.replace(MODELS[kind], compute_dtype=dtype)
    return run(None, model, dataclasses.replace(TRAIN, loss=loss))


def loss_error(result: Result, reference: Result) -> float:
    pairs = zip(result.metrics, reference.metrics, strict=True)
    return max(abs(mine["loss"] / theirs["loss"] - 1) for mine, theirs in pairs)


def gradient_errors(result: Result, reference: Result) -> dict[str, float]:
    """By parameter; norms below a millionth of the largest (a bias without gradient) count as that."""
    mine, theirs = (dict(jax.tree.leaves_with_path(r.gradients)) for r in (result, reference))
    least = 1e-6 * max(np.linalg.norm(grad) for grad in theirs.values())
    return {
        jax.tree_util.keystr(path): float(
            np.linalg.norm(mine[path] - theirs[path]) / max(np.linalg.norm(theirs[path]), least)
        )
        for path in theirs
    }


def check(result: Result, reference: Result, bound: Bound) -> None:
    jax.tree.map(np.testing.assert_array_equal, result.initial, reference.initial)
    errors = gradient_errors(result, reference)
    worst = max(errors, key=errors.__getitem__)
    print(f"gradient {errors[worst]:.1e} {worst} loss {loss_error(result, reference):.1e} {reference.metrics[0]['loss']:.3f}->{reference.metrics[-1]['loss']:.3f} norm {reference.metrics[0]['grad_norm']:.3f} {reference.metrics[-1]['grad_norm']:.3f}")
    assert errors[worst] <= bound.gradient, f"{worst}: {errors[worst]:.1e} of its norm; all: {errors}"
    assert loss_error(result, reference) <= bound.loss, [(a["loss"], b["loss"]) for a, b in zip(*map(lambda r: r.metrics, (result, reference)))]
    for mine, theirs in zip(result.metrics, reference.metrics, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["tokens"] == theirs["tokens"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * bound.loss)


def row(kind: str, *marks, loss="tokens", dtype="float32", how=None, **sizes: int):
    mesh, execution = MeshConfig(**{"data": 1, **sizes}), ExecutionConfig(**(how or {}))
    words = [kind, *(f"{axis}{size}" for axis, size in sizes.items()), loss, *(str(v) for v in (how or {}).values())]
    return pytest.param(kind, loss, dtype, mesh, execution, marks=marks, id="-".join([*words, dtype]))


slow = pytest.mark.slow
GATHER, CHUNKS, TURNS = {"context": "gather"}, {"repeats": 2}, {"pipeline": "1f1b"}
TABLE = [
    row("dense", slow, data=8),
    row("dense", slow, fsdp=8, loss="vocabulary"),
    row("dense", slow, data=2, fsdp=4),
    row("dense", slow, data=2, tensor=4),
    row("dense", slow, fsdp=2, tensor=4, loss="vocabulary"),
    row("dense", slow, context=8),
    row("dense", slow, context=8, how=GATHER, loss="vocabulary"),
    row("dense", data=2, tensor=2, context=2),
    row("dense", slow, data=2, tensor=2, context=2, loss="vocabulary"),
    row("dense", fsdp=2, tensor=2, context=2, how=GATHER, loss="vocabulary"),
    row("dense", slow, fsdp=2, context=4, loss="vocabulary"),
    row("dense", slow, data=2, context=4, how=GATHER),
    row("dense", slow, data=4, pipe=2),
    row("dense", pipe=2, fsdp=2, tensor=2),
    row("dense", slow, pipe=2, fsdp=2, tensor=2, loss="vocabulary"),
    row("dense", slow, pipe=4, data=2),
    row("dense", slow, pipe=4, fsdp=2, how=TURNS),
    row("dense", slow, pipe=2, fsdp=4, how=CHUNKS),
    row("dense", slow, pipe=2, context=2, tensor=2, how=CHUNKS, loss="vocabulary"),
    row("dense", slow, pipe=2, context=4),
    row("dense", pipe=2, context=2, tensor=2, how=TURNS),
    row("dense", slow, pipe=2, data=2, fsdp=2, how={**TURNS, "microbatches": 4}, loss="vocabulary"),
    row("dense", slow, pipe=2, fsdp=2, context=2, how=GATHER),
    row("dense", slow, data=2, fsdp=2, tensor=2, dtype="bfloat16"),
    row("dense", slow, pipe=2, context=2, tensor=2, dtype="bfloat16", loss="vocabulary"),
    row("experts", slow, data=8),
    row("experts", slow, expert=8, loss="vocabulary"),
    row("experts", slow, expert=4, data=2),
    row("experts", expert=2, context=2, tensor=2),
    row("experts", slow, expert=4, tensor=2, loss="vocabulary"),
    row("experts", slow, expert=2, fsdp=4),
    row("experts", slow, fsdp=2, expert=2, tensor=2, loss="vocabulary"),
    row("experts", slow, expert=2, context=4, how=GATHER),
    row("experts", slow, tensor=4, fsdp=2),
    row("experts", slow, pipe=2, expert=2, context=2),
    row("experts", slow, pipe=2, expert=2, fsdp=2, how=CHUNKS, loss="vocabulary"),
    row("experts", pipe=2, expert=2, tensor=2, how=TURNS),
    row("experts", slow, pipe=4, expert=2),
    row("experts", slow, expert=2, fsdp=2, tensor=2, dtype="bfloat16"),
]


@pytest.mark.parametrize(("kind", "loss", "dtype", "mesh", "execution"), TABLE)
def test_a_mesh_equals_one_device(kind, loss, dtype, mesh, execution):
    model = dataclasses.replace(MODELS[kind], compute_dtype=dtype)
    result = run(mesh, model, dataclasses.replace(TRAIN, loss=loss), execution)
    check(result, one_device(kind, loss, dtype), BOUNDS[dtype])
