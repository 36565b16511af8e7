"""Every family at full size has the published number of parameters, counted under eval_shape."""

import math

import jax
import pytest

from model import families
from model.parameters import abstract

# The hub's "safetensors.total" of the checkpoint named, unless another source stands beside it.
PUBLISHED = {
    "llama2_7b": 6_738_415_616,  # meta-llama/Llama-2-7b-hf
    "llama3_8b": 8_030_261_248,  # meta-llama/Meta-Llama-3-8B
    "llama3_70b": 70_553_706_496,  # meta-llama/Meta-Llama-3-70B
    "llama3_1_8b": 8_030_261_248,  # meta-llama/Llama-3.1-8B
    "llama3_1_70b": 70_553_706_496,  # meta-llama/Llama-3.1-70B
    "llama3_1_405b": 405_853_388_800,  # meta-llama/Llama-3.1-405B
    "llama3_2_1b": 1_235_814_400,  # meta-llama/Llama-3.2-1B
    "smollm2_135m": 134_515_008,  # HuggingFaceTB/SmolLM2-135M
    "smollm2_360m": 361_821_120,  # HuggingFaceTB/SmolLM2-360M
    "smollm2_1_7b": 1_711_376_384,  # HuggingFaceTB/SmolLM2-1.7B
    "mistral_7b": 7_241_732_096,  # mistralai/Mistral-7B-v0.1
    "qwen2_0_5b": 494_032_768,  # Qwen/Qwen2-0.5B
    "qwen2_7b": 7_615_616_512,  # Qwen/Qwen2-7B
    "qwen2_5_0_5b": 494_032_768,  # Qwen/Qwen2.5-0.5B
    "qwen2_5_7b": 7_615_616_512,  # Qwen/Qwen2.5-7B
    "qwen3_0_6b": 751_632_384 - 151_936 * 1024,  # Qwen/Qwen3-0.6B, which stores its one table twice
    "qwen3_8b": 8_190_735_360,  # Qwen/Qwen3-8B
    "mixtral_8x7b": 46_702_792_704,  # mistralai/Mixtral-8x7B-v0.1
    "mixtral_8x22b": 140_620_634_112,  # mistral-community/Mixtral-8x22B-v0.1
    "qwen3_30b_a3b": 30_532_122_624,  # Qwen/Qwen3-30B-A3B
    "qwen3_235b_a22b": 235_093_634_560,  # Qwen/Qwen3-235B-A22B
    "deepseek_v2_lite": 15_706_484_224,  # deepseek-ai/DeepSeek-V2-Lite
    # deepseek-ai/DeepSeek-V3, its "Main Model" of 671B: less the layer that predicts a second token and fp8's scales
    "deepseek_v3": 671_026_419_200,
    "gemma_2b": 2_506_172_416,  # google/gemma-2b
    "gemma_7b": 8_537_680_896,  # google/gemma-7b
    "gemma2_2b": 2_614_341_888,  # google/gemma-2-2b
    "gemma2_9b": 9_241_705_984,  # google/gemma-2-9b
    "gemma3_270m": 268_098_176,  # google/gemma-3-270m
    "gemma3_1b": 999_885_952,  # google/gemma-3-1b-pt
    # google/gemma-3-4b-pt, less its image tower and the projection from it
    "gemma3_4b": 4_300_079_472 - 416_866_032 - (1152 * 2560 + 1152),
    # "number of trainable parameters" of transformers' GPT2LMHeadModel; OpenAI's card rounds them
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}

# "Non-embedding parameters", Table 2 of arXiv:2403.08295. Its embedding parameters count 128 rows of padding, which
# the released checkpoints do not have: 256,128 * 2048 = 524,550,144.
NON_EMBEDDING = {"gemma_2b": 1_981_884_416, "gemma_7b": 7_751_248_896}


def test_every_family_has_a_published_count():
    assert PUBLISHED.keys() == families.PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    config = families.PUBLISHED[name]()
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config).shapes))
    assert count == PUBLISHED[name]
    if name in NON_EMBEDDING:
        assert count - config.vocab_size * config.embed_dim == NON_EMBEDDING[name]
