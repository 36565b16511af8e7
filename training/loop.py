"""The train loop: batches in, steps, evaluations, checkpoints, one line a step. Knows no configs/ and no inference/."""

import pathlib
from collections.abc import Callable
from typing import Any

from data.config import DataConfig
from model.config import ModelConfig
from parallel.config import AxisRules, MeshConfig
from training.config import OptimConfig, TrainConfig

# sample(model, parameters, tokenizer, prompt=…, num_tokens=…, seed=…) -> text; `model.vocab_size` is resolved.
SampleFn = Callable[..., str]


def train(
    folder: pathlib.Path,
    *,
    config: dict[str, Any],
    seed: int,
    model: ModelConfig,
    mesh: MeshConfig,
    rules: AxisRules,
    data: DataConfig,
    optim: OptimConfig,
    schedule: TrainConfig,
    sample: SampleFn | None,
) -> int:
    """Train until done, interrupted or hopeless; -> exit status (0 done or interrupted and saved).

    `folder` is runs/<name>. It will hold config.json (`config` with model.vocab_size resolved), tokenizer files,
    metrics.jsonl, samples.txt, loss.png, TensorBoard events (events/) and checkpoints/.
    """
    raise NotImplementedError
