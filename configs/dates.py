"""Dates as people write them become ISO dates: the smallest translation, by an RNN with attention. No download.

uv run train.py configs/dates.py
"""

from configs.base import RunConfig
from data.config import PairsConfig
from model.seq2seq_config import Seq2SeqConfig
from training.config import OptimConfig, TrainConfig

run = RunConfig(
    name="dates",
    model=Seq2SeqConfig(kind="attention", embed_dim=64, recurrent_dim=128, max_length=40),
    data=PairsConfig(path="dates", tokenizer="char", buckets=(16, 24), valid_pairs=500, test_pairs=500),
    optim=OptimConfig(
        name="muon",
        peak_lr=0.01,
        schedule="linear",
        warmup_steps=20,
        final_lr_ratio=0.0,
        weight_decay=0.0,
        adam_lr_ratio=0.5,
    ),
    train=TrainConfig(steps=300, batch_size=64, seq_len=40, eval_every=100, save_every=300),
)
