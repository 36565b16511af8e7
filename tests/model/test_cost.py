"""Counts: parameters as eval_shape has them, FLOPs as a slow loop has them."""

import dataclasses
import math

import jax
import pytest

from model import cost, families
from model.config import ModelConfig
from model.parameters import abstract

TINY = ModelConfig(
    vocab_size=50,
    embed_dim=12,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_dim=20,
    max_length=32,
    rope_theta=1e4,
    norm_eps=1e-6,
)
WINDOWED = dataclasses.replace(TINY, layers=("window", "global"), window=5)


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_parameters_equal_the_trees(name):
    config = families.PUBLISHED[name]()
    leaves = jax.tree.leaves(abstract(config).shapes)
    assert cost.num_parameters(config) == sum(math.prod(leaf.shape) for leaf in leaves)


# Billions that a token goes through, tables included: Mistral's announcements, arXiv:2505.09388 and arXiv:2412.19437.
ACTIVE = {"mixtral_8x7b": 12.9, "mixtral_8x22b": 39, "qwen3_30b_a3b": 3.3, "qwen3_235b_a22b": 22, "deepseek_v3": 37}


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_goes_through_the_published_number(name):
    config = families.PUBLISHED[name]()
    active = cost.matmul_parameters(config) + config.vocab_size * config.embed_dim
    assert active / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["global", "windowed"])
@pytest.mark.parametrize(("new", "past"), [(1, 0), (9, 0), (3, 2), (1, 12), (7, 3)])
def test_visible_keys_equal_a_loop(config, new, past):
    slow = 0
    for kind in config.layer_kinds:
        for position in range(past, past + new):
            slow += min(position + 1, config.window if kind == "window" else position + 1)
    assert cost.visible_keys(config, new, past) == slow


def test_forward_flops_are_two_a_multiply_add():
    T, (D, N, K, H, F, V) = 8, (12, 4, 2, 6, 20, 50)
    matrices = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F
    pairs = T * (T + 1) // 2  # half of the full square
    layer = 2 * T * matrices + 2 * pairs * N * H + 2 * pairs * N * H  # q·k, then weights · v
    assert cost.forward_flops(TINY, T, logits=T) == 4 * layer + 2 * T * D * V
    assert cost.train_flops(TINY, T) * T == 3 * cost.forward_flops(TINY, T, logits=T)


def test_prefill_then_decode_is_one_forward():
    whole = cost.forward_flops(WINDOWED, 12, logits=4)
    assert whole == cost.prefill_flops(WINDOWED, 9) + sum(cost.decode_flops(WINDOWED, past) for past in (9, 10, 11))


def test_train_flops_are_about_six_times_the_parameters():
    config = families.llama3_8b()
    assert cost.train_flops(config, 1) == pytest.approx(6 * cost.matmul_parameters(config), rel=1e-3)


def test_decode_bytes_are_the_weights_and_the_cache():
    D, V, L, K, H = 12, 50, 4, 2, 6
    tied = cost.decode_bytes(TINY, 9, batch=3, weight_bytes=4, cache_bytes=2)
    assert tied == 4 * (cost.num_parameters(TINY) + 3 * D) + 2 * 3 * L * 2 * K * H * (10 + 1)
    apart = dataclasses.replace(TINY, tied=False)
    untied = cost.decode_bytes(apart, 9, batch=3, weight_bytes=4, cache_bytes=2)
    assert untied == tied  # one table is read either way: of the other only rows
    longer = cost.decode_bytes(TINY, 10, batch=3, weight_bytes=4, cache_bytes=2)
    assert longer - tied == 3 * cost.cache_bytes_per_token(TINY, cache_bytes=2)
    assert V * D < cost.num_parameters(TINY)
