"""English captions become German ones through one vector: a GRU reads, another writes (arXiv:1406.1078).

    uv run train.py configs/multi30k_rnn.py data.path=FOLDER

FOLDER holds train.en and train.de (.gz too) as github.com/multi30k/dataset has them in data/task1/raw. Those
of val choose the parameters; 1,000 pairs of train are kept apart for a test (docs/lineage.md).
"""

from configs.base import RunConfig
from data.config import PairsConfig
from model.seq2seq_config import Seq2SeqConfig
from training.config import OptimConfig, TrainConfig

run = RunConfig(
    name="multi30k_rnn",
    model=Seq2SeqConfig(
        kind="fixed",
        embed_dim=256,
        recurrent_dim=512,
        bidirectional=False,
        reversed_source=True,
        max_length=64,
        dropout=0.2,
    ),
    data=PairsConfig(path="data/multi30k", bpe_vocab=5000, buckets=(10, 12, 14, 16, 18, 21, 25, 32), test_pairs=1000),
    optim=OptimConfig(
        name="muon",
        peak_lr=0.007,
        schedule="linear",
        warmup_steps=100,
        final_lr_ratio=0.0,
        weight_decay=0.2,
        adam_lr_ratio=0.3,
        b2=0.95,
        ema_decay=0.99,
    ),
    train=TrainConfig(
        steps=1100, batch_size=64, seq_len=64, label_smoothing=0.1, eval_every=110, save_every=110, patience=4
    ),
)
