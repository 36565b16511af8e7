"""Counts: parameters as eval_shape has them, FLOPs as a slow loop has them."""

import dataclasses
import itertools
import math

import jax
import pytest

from model import cost, families
from model.config import ModelConfig
from model.parameters import abstract, summed_dims
from model.weights import leaves
from tests.model.test_decoder import MIXTURE

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


@pytest.mark.parametrize("config", [TINY, MIXTURE], ids=["dense", "mixture"])
def test_a_token_multiplies_by_the_trees_matrices(config):
    """All whose names say that a product sums over them, of experts A of E, and routers."""
    _, shapes, names = abstract(config)
    count, named = 0, dict(leaves(names))
    for path, leaf in leaves(shapes):
        if summed_dims(named[path]) is not None or path.endswith("router"):
            share = config.experts_per_token / config.num_experts if "experts" in named[path] else 1
            count += math.prod(leaf.shape) * share
    assert cost.matmul_parameters(config) == count + (0 if config.tied else -config.vocab_size * config.embed_dim)


def test_latent_attention_pays_for_both_its_widths():
    pairs, N, H, W = 8 * 9 // 2, 4, 8, 6
    layers = 2 * 8 * (cost.matmul_parameters(MIXTURE) - 40 * 16) + 3 * 2 * pairs * N * (H + W)
    assert cost.forward_flops(MIXTURE, 8, logits=0) == layers


def test_a_decode_step_reads_the_experts_that_it_can_choose():
    read = [cost.decode_bytes(MIXTURE, 0, batch=batch, weight_bytes=1, cache_bytes=0) for batch in (1, 2, 3, 4)]
    expert, row = 2 * 3 * 16 * 12, 16  # of two layers, and of the embedding table
    assert [after - before for before, after in itertools.pairwise(read)] == [
        3 * expert + row, 2 * expert + row, row
    ]  # fmt: skip


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


def test_a_cache_may_roll_and_may_be_latent():
    ours = cost.cache_bytes(WINDOWED, 9, number_bytes=2, rolling=False, latent=False)
    assert ours == 9 * cost.cache_bytes_per_token(WINDOWED, cache_bytes=2)
    rolling = cost.cache_bytes(WINDOWED, 9, number_bytes=2, rolling=True, latent=False)
    assert rolling == 2 * 2 * 2 * 6 * (2 * 5 + 2 * 9)  # two layers of a window of 5, two that hold all 9
    latent = cost.cache_bytes(families.deepseek_v3(), 1, number_bytes=2, rolling=False, latent=True)
    assert latent == 2 * 61 * (512 + 64)  # arXiv:2412.19437, section 4.2: the latent, and keys that turn


def test_only_named_policies_are_counted():
    with pytest.raises(ValueError, match="remat=dots keeps results that have no name"):
        cost.kept_bytes(dataclasses.replace(TINY, remat="dots"), dense=True, number_bytes=2)
