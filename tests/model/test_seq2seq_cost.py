"""Counts of encoder–decoders are those of the programs that compute them."""

import jax
import jax.numpy as jnp
import pytest

from model import parameters, seq2seq_cost
from tests.model.counting import product_flops
from tests.model.seq2seq_cases import V, config_of

B, S, T = 2, 6, 5


@pytest.mark.parametrize("kind", ["fixed", "additive", "general-fed", "dot", "transformer"])
def test_flops_are_those_of_the_products(kind):
    config = config_of(kind)
    weights = parameters.abstract(config).shapes

    def forward(weights, source, tokens):
        model = parameters.seq2seq(config, weights)
        return model.logits(model.forward(source, jnp.ones(source.shape), tokens, None))

    ints = [jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (S, T)]
    counted = product_flops(jax.make_jaxpr(forward)(weights, *ints))
    told = seq2seq_cost.source_flops(config, S) * S + seq2seq_cost.target_flops(config, T, S) * T
    if not config.is_recurrent:  # what causality hides is computed, but not counted
        told += 4 * config.num_layers * config.num_heads * config.head_dim * T * (T - 1) / 2
    else:  # the first state is a product a sentence, not one a token
        told += 2 * config.recurrent_dim**2 * config.num_layers
    if config.kind == "fixed":
        told += 2 * 3 * config.recurrent_dim**2  # so is what the gates get of the context
    if config.kind == "attention" and config.score == "additive":
        told -= 2 * S * T * config.recurrent_dim  # a sum with one vector is no product by the counter's rule
    assert counted == pytest.approx(B * told, rel=1e-6)


def test_a_step_reads_the_decoders_matrices_and_the_output_table():
    config = config_of("transformer")
    D, L, F = config.embed_dim, config.num_layers, config.ffn_dim
    cross = 2 * D * D  # keys and values of the source were made before
    assert seq2seq_cost.step_weights(config) == L * (8 * D * D - cross + 2 * D * F) + V * D


def test_batching_makes_a_step_denser():
    config = config_of("additive")
    one, many = (seq2seq_cost.step_intensity(config, 8, 8, batch=batch) for batch in (1, 64))
    assert one < 0.6
    assert many > 5 * one
