"""A run is a value: RunConfig joins the records of every room. Imports no jax, so that a wrong key is refused at once."""

import dataclasses

from data.config import DataConfig
from model.config import ModelConfig
from parallel.config import AxisRules, MeshConfig
from training.config import OptimConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    name: str  # the run's folder is out/name
    out: str = "runs"  # folder of runs
    seed: int = 0  # initial weights, order of examples, sampling
    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
