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
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        ffn_dim=344,
        max_length=128,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        qk_norm=True,
    ),
    data=DataConfig(
        path="input.txt", tokenizer="char", valid_fraction=0.1, split="tail", dedup="none", packing="stream"
    ),
    optim=OptimConfig(name="muon", peak_lr=0.02, schedule="wsd", warmup_steps=20, weight_decay=0.0),
    train=TrainConfig(
        steps=400,
        batch_size=16,
        seq_len=128,
        loss_chunk=128,
        eval_every=100,
        save_every=400,
        sample_prompt="\n",
    ),
)
