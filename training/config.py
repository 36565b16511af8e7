"""How a run optimises and how long it runs: frozen records only. Imports no jax."""

import dataclasses
from typing import Literal

from parallel.records import require

Schedule = Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule, clipping, averaging."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"  # which optax rule
    peak_lr: float = 3e-4  # learning rate after warm-up
    schedule: Schedule = "cosine"  # after warm-up; wsd: flat, then linear decay; inverse_sqrt: peak_lr √(warmup / step)
    warmup_steps: int = 100  # steps from 0 to peak_lr
    decay_fraction: float = 0.2  # share of the steps that wsd decays over
    final_lr_ratio: float = 0.1  # learning rate at the last step / peak_lr
    weight_decay: float = 0.1  # on matrices only; norms, biases and embeddings are not decayed
    b1: float = 0.9  # first-moment decay
    b2: float = 0.95  # second-moment decay
    eps: float = 1e-8  # added to the second moment's root
    adam_lr_ratio: float = 0.1  # muon: learning rate of embeddings, norms and biases (by adamw) / peak_lr
    clip_norm: float = 1.0  # global gradient norm is clipped to this; 0 turns clipping off
    moments: Literal["float32", "bfloat16"] = "float32"  # of moments between steps; second ones only where b2 <= 0.984
    ema_decay: float = 0.0  # decay of an exponential moving average of the parameters; 0 keeps none

    def __post_init__(self):
        require(self, "optim", "peak_lr warmup_steps weight_decay eps adam_lr_ratio clip_norm", low=0)
        require(self, "optim", "decay_fraction final_lr_ratio", low=0, high=1)
        require(self, "optim", "b1 b2 ema_decay", low=0, high=0.999999)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and rhythm of a run."""

    steps: int  # optimizer steps
    batch_size: int  # B, sequences in one step over all devices
    seq_len: int  # T, tokens in one sequence
    accumulate: int = 1  # the batch is computed in this many parts, gradients summed
    loss: Literal["tokens", "vocabulary"] = "tokens"  # logits made in parts of T, or twice in parts of V (less memory)
    loss_chunk: int = 512  # logits of a part: of so many tokens of each row, or of so many entries of V
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps logits from drifting
    label_smoothing: float = 0.0  # share of a target's probability that is spread over all of V (arXiv:1512.00567)
    eval_every: int = 100  # steps between evaluations
    eval_batches: int = 0  # validation batches per evaluation; 0 is all of them
    save_every: int = 200  # steps between checkpoints
    keep: int = 3  # checkpoints kept
    patience: int = 0  # evaluations in a row without a better BLEU after which a translation run ends; 0 is none
    max_skipped: int = 10  # the run stops after this many non-finite steps in a row
    sample_prompt: str = "\n"  # text continued at each evaluation
    sample_tokens: int = 100  # tokens sampled at each evaluation; 0 samples none

    def __post_init__(self):
        counts = "steps batch_size seq_len accumulate loss_chunk eval_every save_every keep max_skipped"
        require(self, "train", counts, low=1)
        require(self, "train", "z_loss eval_batches sample_tokens patience", low=0)
        require(self, "train", "label_smoothing", low=0, high=0.9)
