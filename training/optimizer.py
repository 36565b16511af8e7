"""Optimizers and schedules as optax values. Knows parameters by their logical names, not by their paths."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from model.parameters import COUNTED, summed_dims
from parallel.sharding import Names
from training.config import OptimConfig

# The largest decay whose steps bfloat16 can tell: it rounds by up to 2**-8, and a moment moves by 1 - decay.
SLOWEST = 1 - 2**-6


def learning_rate(config: OptimConfig, *, total_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up to peak_lr, then the named schedule down to final_lr_ratio of it."""
    peak, warmup = config.peak_lr, config.warmup_steps
    last, rest = peak * config.final_lr_ratio, max(total_steps - warmup, 1)
    decay_steps = max(round(config.decay_fraction * total_steps), 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_lr_ratio),
        "linear": optax.linear_schedule(peak, last, rest),
        "wsd": optax.linear_schedule(peak, last, decay_steps, transition_begin=max(rest - decay_steps, 0)),
        "constant": optax.constant_schedule(peak),
        "inverse_sqrt": lambda step: peak * jnp.sqrt(max(warmup, 1) / (max(warmup, 1) + step)),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def is_matrix(names: Names) -> bool:
    """Whether a parameter is decayed, and orthogonalised by Muon: matrices are, embedding tables are not."""
    return "vocab" not in names and summed_dims(names) is not None


def make_optimizer(config: OptimConfig, names: Any, *, total_steps: int) -> optax.GradientTransformation:
    """Clip, then the named rule; `names` is the tree of logical names of the parameters."""
    schedule = learning_rate(config, total_steps=total_steps)
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    decayed = jax.tree.map(is_matrix, names, is_leaf=is_names)
    rule = RULES[config.name](config, schedule, decayed, jax.tree.map(_muon_dims, names, is_leaf=is_names))
    if config.moments == "bfloat16":
        rule = at_rest(rule, jnp.bfloat16, ("mu", "nu") if config.b2 <= SLOWEST else ("mu",))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule) if config.clip_norm else rule


def at_rest(rule: optax.GradientTransformation, dtype: Any, fields: tuple[str, ...]) -> optax.GradientTransformation:
    """The rule with these fields of its state kept in `dtype` between updates, which are computed in float32."""

    def cast(state: Any, dtype: Any) -> Any:
        is_moment = lambda path: any(getattr(key, "name", None) in fields for key in path)  # noqa: E731
        return jax.tree.map_with_path(lambda path, x: x.astype(dtype) if is_moment(path) else x, state)

    def update(updates, state, params=None):
        updates, state = rule.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(rule.init(params), dtype), update)


def _muon_dims(names: Names) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dims of a matrix are summed over when it multiplies, and which come out; the rest are a batch."""
    ins = summed_dims(names)
    if ins is None or not is_matrix(names):
        return None
    return optax.contrib.MuonDimensionNumbers(
        ins, tuple(dim for dim, name in enumerate(names) if name not in COUNTED and dim not in ins)
    )


def _adamw(config: OptimConfig, schedule: optax.Schedule, decayed, _) -> optax.GradientTransformation:
    return optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed
    )


def _adafactor(config: OptimConfig, schedule: optax.Schedule, decayed, _) -> optax.GradientTransformation:
    """arXiv:1804.04235 with a given learning rate; decay is scaled by it as in the other rules."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )


def _lion(config: OptimConfig, schedule: optax.Schedule, decayed, _) -> optax.GradientTransformation:
    return optax.lion(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed)


def _muon(config: OptimConfig, schedule: optax.Schedule, decayed, dims) -> optax.GradientTransformation:
    """Muon on matrices, scaled to AdamW's typical update (arXiv:2502.16982, eq. 4); AdamW on the rest."""
    return optax.contrib.muon(
        schedule,
        beta=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=lambda step: schedule(step) * config.adam_lr_ratio,
        muon_weight_dimension_numbers=dims,
        consistent_rms=0.2,
    )


RULES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}
