"""A small decoder learns to write Python from the standard library's own sources, on a laptop.

    uv run train.py

The text is on every machine that has Python, so nothing is downloaded. Another text: `data.path=FILE_OR_FOLDER`.
"""

from configs.base import RunConfig
from data.config import DataConfig
from model.config import ModelConfig
from training.config import OptimConfig, TrainConfig

run = RunConfig(
    name="quickstart",
    model=ModelConfig(
        embed_dim=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=6,
        head_dim=32,
        ffn_dim=576,
        max_length=256,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        gated=False,
        activation="relu_squared",
        embed_scale=True,
        tied=False,
    ),
    data=DataConfig(tokenizer="bpe", bpe_vocab=4096),
    optim=OptimConfig(
        name="muon",
        peak_lr=0.02,
        schedule="linear",
        warmup_steps=10,
        final_lr_ratio=0.0,
        weight_decay=0.0,
        adam_lr_ratio=1.0,
    ),
    train=TrainConfig(
        steps=200,
        batch_size=8,
        seq_len=256,
        eval_every=50,
        eval_batches=8,
        save_every=100,
        sample_prompt="def ",
    ),
    topologies=("v5e:1x1",),
)
