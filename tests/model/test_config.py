"""A model that cannot be is refused with the rule and both numbers."""

import dataclasses

import pytest

from model.config import RopeScaling
from tests.model.test_decoder import MIXTURE, PLAIN


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_kv_heads": 3}, r"num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, r"head_dim=7 is odd"),
        ({"layers": ("window", "global")}, r"window is not set"),
        ({"window": 5}, r"window=5 is set but layers=\('global',\) has no"),
        ({"num_layers": 0}, r"num_layers=0 must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_experts": 0}, r"experts_per_token=3 is set but num_experts=0 is dense"),
        ({"experts_per_token": 9}, r"experts_per_token=9 must be between 1 and num_experts=8"),
        ({"expert_ffn_dim": 0}, r"expert_ffn_dim=0 must be at least 1"),
        ({"num_dense_layers": 3}, r"num_dense_layers=3 leaves no layer of num_layers=3"),
        ({"router_groups": 3}, r"num_experts=8 is not a multiple of router_groups=3"),
        ({"router_top_groups": 5}, r"router_top_groups=5 must be between 1 and router_groups=4"),
        ({"router_top_groups": 1}, r"experts_per_token=3 is more than the 2 experts of router_top_groups=1"),
        ({"router": "softmax", "router_bias_rate": 0.1}, r'router_bias_rate=0.1 is set but router="softmax" has no'),
        ({"gated": False}, r"gated=False, ffn_bias=False do not go with num_experts=8"),
        ({"kv_rank": 0}, r"q_rank=12 is set but kv_rank=0 is plain attention"),
        ({"q_rank": -1}, r"q_rank=-1 must be at least 0"),
        ({"rope_dim": 8}, r"rope_dim=8 must be even, above 0 and below head_dim=8"),
        ({"value_dim": 9}, r"value_dim=9 is more than head_dim=8"),
        ({"num_kv_heads": 2}, r"num_kv_heads=2 differs from num_heads=4"),
        ({"qk_norm": True}, r"qk_norm=True does not go with kv_rank=10; False does"),
    ],
)
def test_impossible_mixtures_and_latents_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(MIXTURE, **changes)


def test_only_latent_attention_scales_its_logits_by_the_rotary_factor():
    scaling = RopeScaling(kind="yarn", factor=4.0, logit_mscale=1.0)
    with pytest.raises(ValueError, match=r"logit_mscale=1.0 is set but kv_rank=0"):
        dataclasses.replace(PLAIN, rope_scaling=scaling)


def test_kinds_are_tiled_over_the_layers():
    config = dataclasses.replace(PLAIN, num_layers=5, layers=("window", "window", "global"), window=4)
    assert config.layer_kinds == ("window", "window", "global", "window", "window")
