"""Schedules by their values, decay by names, and every rule descends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.config import OptimConfig
from training.optimizer import RULES, is_matrix, learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("schedule", "expected"),  # at steps 0, 5, 9, 10, 60, 85, 110
    [
        ("constant", [1 / 11, 6 / 11, 10 / 11, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1 / 11, 6 / 11, 10 / 11, 1.0, 0.55, 0.325, 0.1]),
        ("cosine", [1 / 11, 6 / 11, 10 / 11, 1.0, 0.55, 0.2318, 0.1]),
        ("wsd", [1 / 11, 6 / 11, 10 / 11, 1.0, 1.0, 0.55, 0.1]),
    ],
)
def test_schedules(schedule, expected):
    config = OptimConfig(schedule=schedule, peak_lr=1.0, warmup_steps=10, final_lr_ratio=0.1, decay_fraction=50 / 110)
    rate = learning_rate(config, total_steps=110)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose([rate(step) for step in (0, 5, 9, 10, 60, 85, 110)], expected, atol=2e-4)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("embed", "heads", "head"), True),
        (("layers", "heads", "head", "embed"), True),
        (("embed", "ffn"), True),
        (("vocab", "embed"), False),
        (("layers", None), False),
        (("layers", "heads", "head"), False),
        ((None, "embed"), False),
    ],
)
def test_only_matrices_are_decayed(names, expected):
    assert is_matrix(names) is expected


NAMES = {"matrix": ("layers", "embed", "ffn"), "scale": (None,)}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_descends_and_decays_matrices_alone(rule):
    params = {"matrix": jnp.full((2, 4, 6), 0.5), "scale": jnp.full((4,), 0.5)}
    config = OptimConfig(name=rule, peak_lr=1e-2, warmup_steps=0, schedule="constant", weight_decay=0.5)

    def moved(grads):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            optimizer = make_optimizer(config, NAMES, total_steps=10)
            updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return jax.tree.map(jnp.mean, updates)

    against = moved(jax.tree.map(jnp.ones_like, params))
    assert against["matrix"] < 0
    assert against["scale"] < 0
    still = moved(jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(still["matrix"], -1e-2 * 0.5 * 0.5, rtol=1e-5)
    assert still["scale"] == 0
