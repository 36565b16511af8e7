"""Encoder–decoders: decoding goes as training reads, padding changes nothing, and the equations are the papers'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import parameters, rnn, transformer
from model.dropout import dropout
from model.seq2seq_config import Seq2SeqConfig
from ops import recurrence
from tests.model.seq2seq_cases import KINDS, S, T, V, config_of, pairs, weights_of


def read(config, weights, batch):
    return forward(parameters.seq2seq(config, weights), batch)


def forward(model, batch, seeds=None):
    return model.forward(*map(jnp.asarray, (batch.source, batch.source_mask, batch.tokens)), seeds)


def decoded(config, weights, batch):
    """Hidden states and weights over the source, token by token."""
    model = parameters.seq2seq(config, weights)
    encoded = model.encode(jnp.asarray(batch.source), jnp.asarray(batch.source_mask))
    state, states, looks = model.start(encoded, T), [], []
    for token in range(T):
        hidden, state, look = model.step(encoded, state, jnp.asarray(batch.tokens[:, token]))
        states.append(hidden)
        looks.append(look)
    return jnp.stack(states, axis=1), jnp.stack(looks, axis=1)


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    config, batch = config_of(request.param), pairs(4)
    weights = weights_of(config)
    hidden = jax.jit(functools.partial(read, config))(weights, batch)
    return config, weights, batch, hidden, jax.jit(functools.partial(decoded, config))(weights, batch)


def test_decoding_gives_what_training_reads(case):
    _, _, _, hidden, (states, _) = case
    np.testing.assert_allclose(states, hidden, atol=2e-6)


def test_looks_are_a_share_of_the_source(case):
    config, _, batch, _, (_, looks) = case
    hidden = np.broadcast_to((batch.source_mask == 0).reshape(4, *[1] * (looks.ndim - 2), S), looks.shape)
    assert np.all(np.asarray(looks)[hidden] == 0), "padding is looked at"
    total = np.sum(looks, axis=-1)
    if config.kind == "fixed":
        assert np.all(total == 0)
    elif config.score == "local":
        assert np.all((total > 0) & (total <= 1 + 1e-6))
    else:
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_reading_a_pair_tells_what_its_writing_looked_at(case):
    config, weights, batch, _, (_, looks) = case
    told = parameters.seq2seq(config, weights).looks(*map(jnp.asarray, (batch.source, batch.source_mask, batch.tokens)))
    if config.kind == "fixed":
        assert told == (None, None, None)
    elif config.is_recurrent:
        np.testing.assert_allclose(told.cross[:, 0, 0], looks, atol=2e-6)
        assert told.encoder is told.decoder is None
    else:
        np.testing.assert_allclose(told.cross, jnp.moveaxis(looks, 1, 3), atol=2e-6)
        assert np.all(np.triu(np.asarray(told.decoder), 1) == 0)
        np.testing.assert_allclose(np.sum(told.encoder, axis=-1), 1, atol=1e-6)


def test_padding_and_neighbours_change_nothing(case):
    config, weights, batch, hidden, _ = case
    one = jax.tree.map(lambda x: x[1:2], batch)
    wider = type(batch)(*(np.pad(x, ((0, 0), (0, 3))) for x in one))
    alone = read(config, weights, wider)[:, :T]
    seen = one.mask[0] > 0
    np.testing.assert_allclose(alone[0, seen], hidden[1, seen], atol=2e-6)


def test_a_target_does_not_see_what_comes(case):
    config, weights, batch, hidden, _ = case
    tokens = batch.tokens.copy()
    tokens[:, 5:] = 7
    changed = read(config, weights, batch._replace(tokens=tokens))
    np.testing.assert_allclose(changed[:, :5], hidden[:, :5], atol=2e-6)
    assert float(jnp.max(jnp.abs(changed[:, 5] - hidden[:, 5]))) > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if config_of(kind).is_recurrent])
def test_gradients_of_a_recurrence_are_those_of_its_slow_twin(kind, monkeypatch):
    config, batch = config_of(kind), pairs(3)
    weights = weights_of(config)

    def loss(weights):
        return jnp.sum(jnp.sin(3 * read(config, weights, batch)))

    fast = jax.jit(jax.grad(loss))(weights)
    monkeypatch.setattr(rnn, "recur", recurrence.recur_plainly)
    slow = jax.jit(jax.grad(lambda weights: loss(weights)))(weights)
    for (path, a), b in zip(jax.tree.leaves_with_path(fast), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(b)))), err_msg=str(path))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_gru_is_the_papers_equations():
    rng = np.random.default_rng(0)
    gates, back = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)
    h = rng.normal(size=(2, 5)).astype(np.float32)
    r, z = sigmoid(gates[:, 0] + back[:, 0]), sigmoid(gates[:, 1] + back[:, 1])
    n = np.tanh(gates[:, 2] + r * back[:, 2])
    now = rnn.advanced("gru", jnp.asarray(gates), jnp.asarray(back), rnn.CellState(jnp.asarray(h), jnp.zeros((2, 0))))
    np.testing.assert_allclose(now.h, (1 - z) * n + z * h, atol=1e-6)


def test_an_lstm_is_the_papers_equations():
    rng = np.random.default_rng(0)
    gates, back = rng.normal(size=(2, 2, 4, 5)).astype(np.float32)
    h, c = rng.normal(size=(2, 2, 5)).astype(np.float32)
    i, f, o = (sigmoid(gates[:, gate] + back[:, gate]) for gate in range(3))
    after = f * c + i * np.tanh(gates[:, 3] + back[:, 3])
    now = rnn.advanced("lstm", jnp.asarray(gates), jnp.asarray(back), rnn.CellState(jnp.asarray(h), jnp.asarray(c)))
    np.testing.assert_allclose(now.c, after, atol=1e-6)
    np.testing.assert_allclose(now.h, o * np.tanh(after), atol=1e-6)


def test_sinusoids_are_section_3_5():
    waves = transformer.sinusoids(7, 6)
    assert waves[3, 2] == pytest.approx(np.sin(3 / 10_000 ** (2 / 6)), abs=1e-6)
    assert waves[3, 3] == pytest.approx(np.cos(3 / 10_000 ** (2 / 6)), abs=1e-6)


@pytest.mark.parametrize(
    ("distance", "both", "bucket"),
    # computed by hand from T5's rule: 32 buckets, max distance 128
    [(0, True, 0), (-1, True, 1), (1, True, 17), (-7, True, 7), (-8, True, 8), (-127, True, 15), (-500, True, 15),
     (500, True, 31), (1, False, 0), (-15, False, 15), (-16, False, 16), (-128, False, 31)],
)  # fmt: skip
def test_distances_share_buckets_as_in_t5(distance, both, bucket):
    found = transformer.distance_bucket(jnp.asarray([[distance]]), 32, 128, both_ways=both)
    assert int(found[0, 0]) == bucket


def test_a_distance_of_one_over_root_h_adds_one_to_a_logit():
    distances = transformer.Distances(config_of("relative"), both_ways=True)  # 4 heads of H 4, 8 buckets
    distances.biases[...] = distances.biases[...].at[2, 1].set(0.5)
    biases = distances(jnp.arange(3), jnp.arange(3))
    expected = np.zeros((1, 4, 3, 3), np.float32)
    expected[0, 2, [1, 2], [0, 1]] = 1.0  # head 2, one token back
    np.testing.assert_array_equal(biases, expected)


def test_dropout_keeps_the_mean_and_its_share_and_goes_by_row():
    x, seeds = jnp.ones((64, 8, 32)), jnp.arange(64, dtype=jnp.uint32)
    y = dropout(x, 0.25, seeds, 3)
    assert float(jnp.mean(y == 0)) == pytest.approx(0.25, abs=0.02)
    assert float(jnp.mean(y)) == pytest.approx(1.0, abs=0.03)
    np.testing.assert_array_equal(dropout(x[10:20], 0.25, seeds[10:20], 3), y[10:20])
    assert np.any(np.asarray(dropout(x, 0.25, seeds, 4)) != np.asarray(y))
    assert np.any(np.asarray(y[0]) != np.asarray(y[1]))


def test_dropout_reaches_training_alone():
    config, batch = config_of("transformer", dropout=0.5), pairs(4)
    model = parameters.seq2seq(config, weights_of(config))
    plain = forward(model, batch)
    dropped = forward(model, batch, jnp.arange(4, dtype=jnp.uint32))
    assert float(jnp.max(jnp.abs(plain - dropped))) > 0.01


def test_separate_vocabularies_have_separate_tables():
    config = config_of("additive", shared=False, source_vocab_size=40)
    shapes = parameters.abstract(config).shapes
    assert shapes["source"].shape == (40, 16)
    assert shapes["target"].shape == (V, 16)
    assert parameters.num_parameters(config) == parameters.num_parameters(config_of("additive")) + 40 * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "fixed", "recurrent_dim": 0}, r"model\.recurrent_dim=0 must be at least 1"),
        ({"kind": "transformer"}, r"model\.num_heads=0 must be at least 1"),
        ({"kind": "fixed", "recurrent_dim": 8, "reversed_source": True}, "reads the source both ways"),
        ({"kind": "attention", "recurrent_dim": 7}, "recurrent_dim=7 is odd"),
        ({"kind": "attention", "recurrent_dim": 8, "input_feeding": True}, "take model.score=general"),
        ({"kind": "fixed", "recurrent_dim": 8, "source_vocab_size": 9}, "take model.shared=false"),
        ({"kind": "fixed", "recurrent_dim": 8, "dropout": 0.95}, r"model\.dropout=0\.95 must be between 0 and 0\.9"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Seq2SeqConfig(**{"vocab_size": V, "embed_dim": 16, "max_length": 16, **changes})


def test_a_fixed_context_is_all_that_the_decoder_knows():
    """Two sources with the same last state, whatever stands between, give the same target: the bottleneck."""
    config = config_of("fixed")
    model, batch = parameters.seq2seq(config, weights_of(config)), pairs(2)
    encoded = model.encode(jnp.asarray(batch.source), jnp.asarray(batch.source_mask))
    other = encoded._replace(source=jax.tree.map(jnp.zeros_like, encoded.source))
    tokens = jnp.asarray(batch.tokens[:, 0])
    one, _, _ = model.step(encoded, model.start(encoded, T), tokens)
    two, _, _ = model.step(other, model.start(other, T), tokens)
    np.testing.assert_array_equal(one, two)
