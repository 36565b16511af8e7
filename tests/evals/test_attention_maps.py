"""Maps are what the model itself computes with: same hidden states, causal, windows, caps, shared and latent keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizer import ByteTokenizer
from evals.attention_maps import (
    AttentionMap,
    Recorded,
    decoder_maps,
    first_share,
    mean_of_heads,
    recorded,
    without_first,
)
from evals.ties import ties
from inference.steps import Program, whole_rows
from inference.weights import Model
from model.config import ModelConfig
from model.memory import Memory, Packed, Rule
from model.parameters import decoder
from parallel.config import AxisRules
from tests.inference.small import GEMMA, LLAMA, MIXTURE, ONE, mesh_of, parameters

TEXT = "It was tired"


def model_of(config: ModelConfig) -> Model:
    """A tiny model of bytes."""
    config = dataclasses.replace(config, vocab_size=320)
    return Model("tiny", config, ByteTokenizer(), lambda mesh, rules: parameters(config))


def packed(model: Model, text: str) -> np.ndarray:
    """Hidden states by the usual way."""
    tokens = jnp.asarray([[256, *text.encode()]], jnp.int32)
    weights = model.load(mesh_of(ONE), AxisRules())
    hidden, _ = jax.jit(lambda weights: decoder(model.config, weights)(tokens, whole_rows(tokens), Packed()))(weights)
    return np.asarray(hidden)


@pytest.mark.parametrize("config", [LLAMA, GEMMA, MIXTURE], ids=["grouped", "window and cap", "latent"])
def test_a_recording_decoder_computes_what_the_decoder_computes(config):
    model = model_of(config)
    tokens = jnp.asarray([[256, *TEXT.encode()]], jnp.int32)
    program = Program(model.config, mesh_of(ONE), AxisRules(), 258)
    hidden, weights = recorded(model.load(mesh_of(ONE), AxisRules()), tokens, program=program)
    np.testing.assert_allclose(hidden, packed(model, TEXT), rtol=2e-5, atol=2e-5)
    L, N, T, S = weights.shape
    assert (L, N, T, S) == (config.num_layers, config.num_heads, 13, 13)
    np.testing.assert_allclose(np.sum(weights, axis=-1), 1, rtol=1e-5)
    distance = np.arange(T)[:, None] - np.arange(S)[None]
    for kind, layer in zip(config.layer_kinds, np.asarray(weights), strict=True):
        seen = (distance >= 0) & (distance < (config.window if kind == "window" else T))
        assert np.all(layer[:, ~seen] == 0)
        assert np.all(layer[:, seen] > 0)


def test_a_recorded_mix_of_values_is_its_weights_times_them():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, 7, 4, 8))
    k, v = (jax.random.normal(key, (1, 7, 2, 8)) for key in keys[1:])
    queries, rule = whole_rows(jnp.zeros((1, 7), jnp.int32)), Rule(0.5, 2.0, 3)
    out, after = Recorded().attend(q, k, v, queries, rule)
    assert isinstance(after, Memory)
    np.testing.assert_allclose(out, np.einsum("bnts,bsnh->btnh", after.weights, np.repeat(v, 2, axis=2)), atol=1e-6)
    expected, _ = Packed().attend(q, k, v, queries, rule)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_layers_in_a_loop_are_recorded_too():
    stacked = dataclasses.replace(LLAMA, scan_layers=True)
    tokens = jnp.asarray([[1, 2, 3]], jnp.int32)
    run = jax.jit(lambda weights: decoder(stacked, weights)(tokens, whole_rows(tokens), Recorded())[1].weights)
    assert run(parameters(stacked)).shape == (2, 1, 4, 3, 3)


def test_a_map_for_each_layer_with_the_tokens_as_labels():
    first, second = decoder_maps(model_of(LLAMA), "it is")
    assert (first.title, second.title) == ("layer 0", "layer 1")
    assert first.queries == first.keys == second.keys == ("⟨bos⟩", "i", "t", "␣", "i", "s")
    assert first.weights.shape == (4, 6, 6)
    assert not np.allclose(first.weights, second.weights)


def test_a_text_longer_than_the_context_is_refused():
    model = model_of(dataclasses.replace(LLAMA, max_length=4))
    with pytest.raises(ValueError, match="6 tokens long but the model's context is 4"):
        decoder_maps(model, "it is")


def test_labels_must_be_as_many_as_the_weights():
    with pytest.raises(ValueError, match="2 queries and 3 keys but 2 and 2 have labels"):
        AttentionMap(title="x", weights=np.ones((1, 2, 3)) / 3, queries=("a", "b"), keys=("c", "d"))


HAND = AttentionMap(
    title="layer 0",
    weights=np.array(
        [
            [[1.0, 0.0, 0.0], [0.8, 0.2, 0.0], [0.5, 0.4, 0.1]],
            [[1.0, 0.0, 0.0], [0.2, 0.8, 0.0], [0.1, 0.6, 0.3]],
        ]
    ),
    queries=("a", "b", "c"),
    keys=("a", "b", "c"),
)


def test_means_and_the_first_token():
    np.testing.assert_allclose(
        mean_of_heads([HAND, HAND], "mean").weights, [[[1, 0, 0], [0.5, 0.5, 0], [0.3, 0.5, 0.2]]]
    )
    with pytest.raises(ValueError, match="different labels"):
        mean_of_heads([HAND, dataclasses.replace(HAND, keys=("x", "y", "z"))], "mean")
    rest = without_first(HAND)
    assert (rest.queries, rest.keys) == (("b", "c"), ("b", "c"))
    np.testing.assert_allclose(rest.weights, [[[1, 0], [0.8, 0.2]], [[1, 0], [2 / 3, 1 / 3]]])
    np.testing.assert_allclose(first_share(HAND), [0.65, 0.15])


def test_a_crossing_map_keeps_its_first_query():
    crossing = dataclasses.replace(HAND, keys=("x", "y", "z"))
    rest = without_first(crossing)
    assert (rest.queries, rest.keys) == (("a", "b", "c"), ("y", "z"))
    np.testing.assert_allclose(rest.weights[0], [[0, 0], [1, 0], [0.8, 0.2]])


def test_ties_sum_over_keys_and_average_over_queries():
    best, other = ties([HAND], (1, 2), (1, 2))
    assert (best.layer, best.head, best.most) == (0, 1, "b")
    assert best.weight == pytest.approx((0.8 + 0.9) / 2)
    assert (other.head, other.most) == (0, "a")
    assert (other.weight, other.first, other.most_weight) == pytest.approx((0.35, 0.65, 0.65))
    assert other.without_first == pytest.approx(1.0)
    assert ties([HAND], (2,), (0, 1))[0].weight == pytest.approx(0.9)
    assert ties([HAND], (0,), (0,))[0].without_first == 0
