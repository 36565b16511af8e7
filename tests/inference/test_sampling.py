"""Sampling equals a slow twin that sorts, draws what it should, and treats each row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import sampling
from inference.config import GenerationConfig, SamplingConfig


def settings(**changes) -> SamplingConfig:
    return SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **changes})


def slow_distribution(logits: np.ndarray, seen: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The probabilities that a token is drawn from: one row, by sorting, in float64."""
    x = logits.astype(np.float64)
    x = np.where(seen, np.where(x < 0, x * config.repetition_penalty, x / config.repetition_penalty), x)
    if config.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    x = x / config.temperature
    if config.top_k:
        x = np.where(x >= np.sort(x)[::-1][min(config.top_k, len(x)) - 1], x, -np.inf)
    if config.top_p < 1:
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        order = np.argsort(-p, kind="stable")
        needed = np.searchsorted(np.cumsum(p[order]), config.top_p) + 1
        x = np.where(p >= p[order[needed - 1]], x, -np.inf)
    if config.min_p:
        x = np.where(x - x.max() >= np.log(config.min_p), x, -np.inf)
    p = np.exp(x - x.max())
    return p / p.sum()


def distribution(logits, seen, rows) -> np.ndarray:
    knobs = sampling.knobs(rows)
    scores = sampling.penalize(jnp.asarray(logits), jnp.asarray(seen), knobs)
    scores = sampling.narrowed(sampling.temper(scores, knobs.temperature), knobs)
    return np.asarray(jax.nn.softmax(scores, axis=-1))


ROWS = [
    settings(),
    settings(temperature=0.5),
    settings(temperature=1e-30),
    settings(top_k=1),
    settings(top_k=7),
    settings(top_k=1000),
    settings(top_p=0.5),
    settings(top_p=1e-6),
    settings(min_p=0.2),
    settings(min_p=1.0),
    settings(repetition_penalty=1.7),
    settings(repetition_penalty=0.5, temperature=2.0, top_k=20, top_p=0.8, min_p=0.05),
]


@pytest.mark.parametrize("seed", range(3))
def test_the_distribution_equals_the_slow_twin(seed):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (len(ROWS), 50)).astype(np.float32)
    seen = random.random(logits.shape) < 0.3
    slow = np.stack([slow_distribution(*row) for row in zip(logits, seen, ROWS, strict=True)])
    fast = distribution(logits, seen, ROWS)
    np.testing.assert_array_equal(fast > 0, slow > 0)
    np.testing.assert_allclose(fast, slow, atol=1e-6)


def test_ties_at_the_edge_are_all_kept():
    logits = np.log(np.asarray([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
    seen = np.zeros(logits.shape, bool)
    assert (distribution(logits, seen, [settings(top_k=2)]) > 0).tolist() == [[True, True, True, False, False]]
    assert (distribution(logits, seen, [settings(top_p=0.5)]) > 0).tolist() == [[True, True, True, False, False]]


def test_reaching_orders_every_float():
    values = np.asarray([[-np.inf, -3e38, -1.0, -1e-40, 0.0, 1e-40, 1.0, 3e38, np.inf]], np.float32)
    for k in range(1, values.size + 1):
        kept = sampling.reaching(jnp.asarray(values), jnp.ones_like(values), jnp.asarray([float(k)]))
        assert np.asarray(kept).tolist() == [[False] * (values.size - k) + [True] * k]


@pytest.mark.parametrize("V", [1, 63, 64, 200])
def test_argmax_is_the_first_of_the_largest(V):
    x = np.random.default_rng(V).integers(-3, 3, (40, V)).astype(np.float32)
    x[0] = -np.inf
    np.testing.assert_array_equal(sampling.argmax(jnp.asarray(x)), x.argmax(-1))


CHOOSE = jax.jit(sampling.choose, static_argnames="num_tokens")


def choose(logits, rows, *, index=None, num_tokens=None, seen=None):
    B, V = logits.shape
    seen = np.zeros((B, V), bool) if seen is None else seen
    index = np.zeros(B, np.int32) if index is None else index
    return CHOOSE(
        jnp.asarray(logits), jnp.asarray(seen), jnp.asarray(index), sampling.knobs(rows), num_tokens=num_tokens or V
    )


@pytest.mark.parametrize("config", [settings(), settings(temperature=0.7, top_k=4, top_p=0.9)])
def test_draws_follow_the_distribution(config):
    logits = np.asarray([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)
    draws = 20_000
    rows = [settings(**{**vars(config), "seed": seed}) for seed in range(draws)]
    tokens = np.asarray(choose(np.tile(logits, (draws, 1)), rows).tokens)
    expected = slow_distribution(logits, np.zeros(6, bool), config)
    share = np.bincount(tokens, minlength=6) / draws
    assert np.all(share[expected == 0] == 0)
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(0.25 / draws))


def test_draws_along_one_answer_follow_the_distribution():
    logits = np.log(np.asarray([0.5, 0.3, 0.2], np.float32))
    draws = 20_000
    rows = [settings(seed=3)] * draws
    tokens = np.asarray(choose(np.tile(logits, (draws, 1)), rows, index=np.arange(draws, dtype=np.int32)).tokens)
    np.testing.assert_allclose(np.bincount(tokens) / draws, [0.5, 0.3, 0.2], atol=5 * np.sqrt(0.25 / draws))


def test_a_row_depends_on_itself_alone():
    random = np.random.default_rng(0)
    logits = random.normal(0, 1, (6, 40)).astype(np.float32)
    rows = [settings(seed=seed, top_k=seed * 3) for seed in range(6)]
    index = np.arange(6, dtype=np.int32)
    together = choose(logits, rows, index=index)
    for b in range(6):
        alone = choose(logits[b : b + 1], rows[b : b + 1], index=index[b : b + 1])
        assert int(alone.tokens[0]) == int(together.tokens[b])
    moved = choose(logits[::-1].copy(), rows[::-1], index=index[::-1].copy())
    assert np.asarray(moved.tokens).tolist()[::-1] == np.asarray(together.tokens).tolist()


def test_greedy_takes_the_likeliest_beside_rows_that_draw():
    logits = np.random.default_rng(1).normal(0, 1, (2, 30)).astype(np.float32)
    rows = [settings(temperature=0.0), settings(temperature=5.0, seed=9)]
    assert int(choose(logits, rows).tokens[0]) == int(np.argmax(logits[0]))


def test_logprobs_are_those_of_the_model():
    logits = np.random.default_rng(2).normal(0, 2, (1, 30)).astype(np.float32)
    row = settings(temperature=0.3, top_k=2, repetition_penalty=2.0)
    choice = choose(logits, [row], seen=np.ones((1, 30), bool))
    expected = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    np.testing.assert_allclose(choice.logprobs[0], expected[int(choice.tokens[0])], rtol=1e-6)


def test_rows_of_the_table_without_a_token_are_never_chosen():
    logits = np.asarray([[0.0, 1.0, 9.0]], np.float32)
    assert int(choose(logits, [settings(temperature=0.0)], num_tokens=2).tokens[0]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "sampling.temperature=-1.0 must be between 0 and 100"),
        ({"temperature": float("nan")}, "sampling.temperature=nan"),
        ({"top_p": 0.0}, "sampling.top_p=0.0 must be above 0"),
        ({"top_k": -1}, "sampling.top_k=-1"),
        ({"min_p": 1.5}, "sampling.min_p=1.5"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty=0.0"),
        ({"seed": -1}, "sampling.seed=-1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.split(" must")[0]):
        SamplingConfig(**changes)


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        GenerationConfig(max_tokens=0)
    with pytest.raises(ValueError, match="stop"):
        GenerationConfig(stop=("",))
