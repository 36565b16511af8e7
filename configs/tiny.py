"""The smallest run that still does everything a run does: for tests and for trying a change. It learns next to nothing.

uv run train.py configs/tiny.py
"""

from configs.base import RunConfig
from data.config import DataConfig
from model.config import ModelConfig
from training.config import OptimConfig, TrainConfig

run = RunConfig(
    name="tiny",
    model=ModelConfig(
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        ffn_dim=64,
        max_length=64,
        rope_theta=10_000.0,
        norm_eps=1e-6,
    ),
    data=DataConfig(tokenizer="byte"),
    optim=OptimConfig(peak_lr=3e-3, warmup_steps=2),
    train=TrainConfig(
        steps=10,
        batch_size=8,
        seq_len=32,
        loss_chunk=16,
        eval_every=5,
        eval_batches=2,
        save_every=5,
        sample_tokens=8,
    ),
    topologies=("v5e:1x1",),
)
