"""Characters of Shakespeare, as fast as a CPU learns them: the first 90 % of the text trains, the last 10 % judges.

uv run train.py configs/shakespeare.py data.path=input.txt
"""

from configs.base import RunConfig
from data.config import DataConfig
from model.config import ModelConfig
from training.config import OptimConfig, TrainConfig

run = RunConfig(
    name="shakespeare",
    model=ModelConfig(
        embed_dim=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        ffn_dim=384,
        max_length=128,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        gated=False,
        activation="relu_squared",
        embed_scale=True,
        tied=False,
    ),
    data=DataConfig(tokenizer="char", valid_fraction=0.1, split="tail", dedup="none", packing="stream"),
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
        steps=250,
        batch_size=8,
        seq_len=128,
        loss_chunk=128,
        eval_every=250,
        save_every=250,
        sample_tokens=0,
    ),
    topologies=("v5e:1x1",),
)
