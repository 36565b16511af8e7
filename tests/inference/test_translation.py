"""Batches of sources translate as each alone; one beam is greedy; a wide search finds the likeliest of all answers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import translation
from inference.config import BeamConfig
from inference.translation import Program, batches, greedy_answers, searched_answers, translate
from model.parameters import initialize, seq2seq
from model.seq2seq_config import Seq2SeqConfig
from parallel.config import AxisRules, MeshConfig
from parallel.sharding import use
from tests.inference.small import ONE, mesh_of

BOS, EOS, V, M = 1, 2, 7, 12
SHAPE = {"vocab_size": V, "embed_dim": 8, "max_length": M, "tied": False}
FIXED = Seq2SeqConfig(kind="fixed", recurrent_dim=8, **SHAPE)
CLOSE = {"atol": 5e-5, "rtol": 1e-5}


class Fake:
    """Logits from a table by the source's sum, the last token and the place: all that a step may know."""

    def __init__(self, config, parameters):
        self.table = parameters["table"]  # [sum of the source, last token, place, V]

    def encode(self, source, mask):
        return {"sum": jnp.sum(source * mask.astype(jnp.int32), axis=1) % len(self.table)}

    def start(self, encoded, length):
        return {"place": jnp.zeros_like(encoded["sum"]), "past": jnp.zeros((len(encoded["sum"]), length), jnp.int32)}

    def step(self, encoded, state, tokens):
        place, past = state["place"], state["past"]
        past = past.at[jnp.arange(len(past)), place].set(tokens)
        history = jnp.sum(past, axis=1) % 5  # what came before counts, so states must follow their beams
        hidden = self.table[encoded["sum"], tokens, history]
        return hidden, {"place": place + 1, "past": past}, jnp.zeros((len(tokens), 1))

    def logits(self, hidden):
        return hidden


@pytest.fixture
def table(monkeypatch):
    """Parameters of the fake, which stands where the model would."""
    monkeypatch.setattr(translation, "seq2seq", Fake)
    jax.clear_caches()
    yield {"table": jnp.asarray(np.random.default_rng(5).normal(0, 2, (11, V, 5, V)), jnp.float32)}
    jax.clear_caches()


def sources(count=23, longest=M):
    rng = np.random.default_rng(8)
    return [[*rng.integers(3, V, n - 1).tolist(), EOS] for n in rng.integers(1, longest + 1, count)]


def run(parameters, some, config=FIXED, mesh=ONE, max_tokens=M, **beam):
    return translate(
        config, parameters, mesh_of(mesh), AxisRules(), some,
        beam=BeamConfig(**beam), bos_id=BOS, eos_id=EOS, max_tokens=max_tokens,
    )  # fmt: skip


def slow_logprobs(parameters, source, tokens) -> np.ndarray:
    """log p of the next token in plain numpy."""
    table, history = np.asarray(parameters["table"]), [BOS, *tokens]
    logits = table[sum(source) % len(table), history[-1], sum(history) % 5]
    return logits - np.log(np.exp(logits).sum())


def slow_greedy(parameters, source, most):
    tokens = []
    while len(tokens) < most and EOS not in tokens:
        tokens.append(int(np.argmax(slow_logprobs(parameters, source, tokens))))
    return tuple(tokens)


def test_greedy_is_the_likeliest_token_after_each(table):
    some = sources()
    found = run(table, some)
    assert [one.tokens for one in found] == [
        slow_greedy(table, source, min(M, 2 * len(source) + 10)) for source in some
    ]
    assert {one.finish for one in found} == {"stop", "length"}
    for source, one in zip(some, found, strict=True):
        assert (one.finish == "stop") == (one.tokens[-1] == EOS)
        slow = [slow_logprobs(table, source, one.tokens[:i])[token] for i, token in enumerate(one.tokens)]
        np.testing.assert_allclose(one.logprobs, slow, **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_its_sources_one_by_one(table, beams):
    some = sources(9)
    together, alone = run(table, some, beams=beams), [run(table, [one], beams=beams)[0] for one in some]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert together == run(table, some, beams=beams)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, **CLOSE)


def program(beams: int) -> Program:
    return Program(FIXED, mesh_of(ONE), AxisRules(), M, beams, BOS, EOS)


@pytest.mark.parametrize("beam", [BeamConfig(early_stopping=True), BeamConfig(length_penalty=0.0)])
def test_a_search_with_one_beam_is_greedy(table, beam):
    for batch in batches(sources(), rows=8, longest=M, most=M):
        greedy = greedy_answers(program(1), table, batch)
        found = searched_answers(program(1), table, batch, beam=beam)
        assert [one.tokens for one in found] == [one.tokens for one in greedy]
        np.testing.assert_allclose([one.total for one in found], [one.total for one in greedy], **CLOSE)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_a_wide_search_finds_the_best_of_all_answers(table, penalty):
    """Where eos and two other tokens can come, there are 1 + 2 + 12 answers of three tokens at most."""
    words = (3, 4)
    closed = np.full((V,), -np.inf)
    closed[[*words, EOS]] = 0
    parameters = {"table": table["table"] + jnp.asarray(closed, jnp.float32)[None, None, None]}
    some = sources(5)
    found = run(parameters, some, beams=10, max_tokens=3, length_penalty=penalty)
    for source, one in zip(some, found, strict=True):
        scores = {}
        for length in (1, 2, 3):
            for body in itertools.product(words, repeat=length - 1):
                for last in (EOS, *words) if length == 3 else (EOS,):
                    answer = (*body, last)
                    parts = [slow_logprobs(parameters, source, answer[:i])[token] for i, token in enumerate(answer)]
                    scores[answer] = sum(parts) / length**penalty
        assert one.tokens == max(scores, key=lambda answer: scores[answer])


def test_searches_of_many_lengths_end_apart(table):
    """Wider beams score no worse where nothing is normalised, and each translation keeps to its own limit."""
    some = sources()
    narrow, wide = run(table, some), run(table, some, beams=10, length_penalty=0.0)
    assert sum(one.total for one in wide) > sum(one.total for one in narrow)
    assert all(len(one.tokens) <= 5 for one in run(table, some, beams=4, max_tokens=5))
    assert all(len(one.tokens) == 5 or one.finish == "stop" for one in run(table, some, max_tokens=5))


def test_batches_hold_every_source_once_among_few_shapes():
    some = [[3] * n for n in (1, 16, 17, 40, 5, 50, 33, 2, 9)]
    found = list(batches(some, rows=3, longest=50, most=100))
    assert [batch.source.shape for batch in found] == [(2, 16), (2, 16), (2, 16), (1, 32), (2, 50), (2, 50)]
    assert [batch.places for batch in found] == [[0, 7], [4, 8], [1], [2], [6, 3], [5]]
    assert sorted(place for batch in found for place in batch.places) == list(range(len(some)))


def test_a_batch_is_laid_out_from_the_left():
    [batch] = batches([[3, 4], [5], [6, 6, 6]], rows=4, longest=4, most=15)
    assert batch.places == [1, 0, 2]
    np.testing.assert_array_equal(batch.source, [[5, 0, 0, 0], [3, 4, 0, 0], [6, 6, 6, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.mask, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.limits, [12, 14, 15, 0])


def test_what_cannot_be_translated_is_refused(table):
    with pytest.raises(ValueError, match="source 1 has 13 tokens but the model takes 1 to 12"):
        run(table, [[EOS], [3] * 13])
    with pytest.raises(ValueError, match="source 0 has 0 tokens"):
        run(table, [[]])
    for beams in (1, 2):
        with pytest.raises(ValueError, match="its weights are damaged"):
            run({"table": jnp.full_like(table["table"], jnp.nan)}, [[EOS]], beams=beams)
    assert run(table, []) == []


REAL = {
    "fixed": Seq2SeqConfig(kind="fixed", recurrent_dim=8, num_layers=2, **SHAPE),
    "attention": Seq2SeqConfig(kind="attention", recurrent_dim=8, **SHAPE),
    "fed": Seq2SeqConfig(kind="attention", score="general", input_feeding=True, recurrent_dim=8, cell="lstm", **SHAPE),
    "transformer": Seq2SeqConfig(kind="transformer", num_heads=2, head_dim=4, ffn_dim=16, num_layers=2, **SHAPE),
}


def weights(config, mesh=ONE):
    """Large ones, so that no two tokens are about as likely."""
    drawn = initialize(config, mesh_of(mesh), AxisRules(), key=jax.random.key(7))
    return jax.tree.map(lambda w: 4 * w if w.ndim > 1 else w, drawn)


def full_logprobs(config, parameters, source, tokens) -> np.ndarray:
    """log p of the next token by the whole forward pass of training."""
    read, mask = np.zeros((1, M), np.int32), np.zeros((1, M), np.float32)
    read[0, : len(source)], mask[0, : len(source)] = source, 1
    given = np.zeros((1, M), np.int32)
    given[0, : len(tokens) + 1] = [BOS, *tokens]
    return np.asarray(forward(parameters, read, mask, given, config=config))[0, len(tokens)]


@functools.partial(jax.jit, static_argnames="config")
def forward(parameters, source, mask, tokens, *, config):
    with use(mesh_of(ONE), AxisRules()):
        model = seq2seq(config, parameters)
        hidden = model.forward(source, mask, tokens, None)
        return jax.nn.log_softmax(model.logits(hidden))


@pytest.mark.parametrize("kind", REAL)
def test_every_kind_decodes_what_training_reads(kind):
    """Greedy and searched translations have the log-probabilities of the whole forward pass; rows do not mix."""
    config, some = REAL[kind], sources(5)
    parameters = weights(config)
    greedy = run(parameters, some, config)
    for source, one in zip(some, greedy, strict=True):
        told = [full_logprobs(config, parameters, source, one.tokens[:i]) for i in range(len(one.tokens))]
        assert one.tokens == tuple(int(np.argmax(logprobs)) for logprobs in told)
        np.testing.assert_allclose(
            one.logprobs, [row[token] for row, token in zip(told, one.tokens, strict=True)], **CLOSE
        )
    searched = run(parameters, some, config, beams=3)
    for source, one in zip(some, searched, strict=True):
        told = [full_logprobs(config, parameters, source, one.tokens[:i])[token] for i, token in enumerate(one.tokens)]
        np.testing.assert_allclose(one.logprobs, told, **CLOSE)
        assert one.tokens == run(parameters, [source], config, beams=3)[0].tokens


def test_a_mesh_translates_alike():
    config, some, mesh = (
        dataclasses.replace(REAL["transformer"], vocab_size=8),
        sources(9),
        MeshConfig(data=2, tensor=2),
    )
    for beams in (1, 3):
        one, other = (run(weights(config, where), some, config, mesh=where, beams=beams) for where in (ONE, mesh))
        assert [one.tokens for one in one] == [two.tokens for two in other]
