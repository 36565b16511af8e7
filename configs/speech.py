"""Sound as text: a decoder tells what is said. Its own clips are made vowels; a folder of WAV files is better.

Measured on the vowels, on two busy CPU cores: 43 s, then 93.4 % of the clips kept apart are told apart.

uv run train.py configs/speech.py
uv run train.py configs/speech.py data.path=speech:free-spoken-digit-dataset/recordings
uv run python -m evals speech runs/speech
"""

from configs.base import RunConfig
from data.config import DataConfig
from model.config import ModelConfig
from training.config import OptimConfig, TrainConfig

run = RunConfig(
    name="speech",
    model=ModelConfig(
        embed_dim=64,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        ffn_dim=192,
        max_length=256,
        rope_theta=1_000.0,
        norm_eps=1e-6,
        qk_norm=True,
    ),
    data=DataConfig(path="speech:vowels", tokenizer="words"),
    optim=OptimConfig(name="muon", peak_lr=0.01, warmup_steps=50, schedule="linear", final_lr_ratio=0.0),
    train=TrainConfig(
        steps=200,
        batch_size=8,
        seq_len=128,
        loss_chunk=128,
        eval_every=50,
        save_every=200,
        sample_tokens=0,
    ),
    topologies=("v5e:1x1",),
)
