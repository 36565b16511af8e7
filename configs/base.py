"""A run is a value: RunConfig joins the records of every room and checks what only their sum shows. Imports no jax.

Overrides are in configs/overrides.py; JSON, back and comparison in parallel/records.py, which knows every record.
"""

import dataclasses
import math
import re

from data.config import DataConfig
from model.config import ModelConfig
from parallel.config import AxisRules, HostsConfig, MeshConfig
from parallel.records import nearest
from parallel.topology import find
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
    hosts: HostsConfig = HostsConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    topologies: tuple[str, ...] = ()  # TPU slices that this run is meant for, e.g. v5e:16x16; *2 is two of them

    def __post_init__(self):
        check_name(self.name)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be between 0 and {2**32 - 1}; it seeds 32-bit generators")
        for name in self.topologies:
            find(name)
        check_lengths(self.model, self.optim, self.train)
        check_rules(self.rules, self.mesh)
        check_splits(self, {axis: max(size, 1) for axis, size in dataclasses.asdict(self.mesh).items()})

    def check_devices(self, num_devices: int) -> None:
        """Raise ValueError where the mesh does not come out on so many devices, or splits a dimension unevenly."""
        check_splits(self, self.mesh.sizes(num_devices))


def check_name(name: str) -> None:
    """A run's name is one folder's name."""
    if not re.fullmatch(r"[\w][\w.+=-]*", name):
        raise ValueError(
            f"name={name!r} must be one folder's name (letters, digits and . + = - _); out=DIR moves the runs folder"
        )


def check_lengths(model: ModelConfig, optim: OptimConfig, train: TrainConfig) -> None:
    """Sequences fit the model, micro-batches the batch, warm-up the run."""
    if train.seq_len > model.max_length:
        raise ValueError(
            f"train.seq_len={train.seq_len} is longer than model.max_length={model.max_length}; "
            "shorten the sequences or raise model.max_length"
        )
    if train.batch_size % train.accumulate:
        raise ValueError(
            f"train.batch_size={train.batch_size} is not a multiple of train.accumulate={train.accumulate}; "
            "the batch is computed in that many equal parts"
        )
    if optim.warmup_steps > train.steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} is more than train.steps={train.steps}; "
            f"lower it to at most {train.steps} or train longer"
        )


def check_rules(rules: AxisRules, mesh: MeshConfig) -> None:
    """Every rule names axes of the mesh, each once."""
    axes = dataclasses.asdict(mesh)
    for name, rule in dataclasses.asdict(rules).items():
        split = axes_of(rule)
        for axis in split:
            if axis not in axes:
                raise ValueError(
                    f"rules.{name}={axis} is no mesh axis; they are {', '.join(axes)}{nearest(axis, axes)}"
                )
        if len(set(split)) < len(split):
            raise ValueError(f"rules.{name}={','.join(split)} names a mesh axis twice; an axis splits a dimension once")


def axes_of(rule) -> tuple[str, ...]:
    """A rule's mesh axes: `None` is (), `"tensor"` is ("tensor",)."""
    return (rule,) if isinstance(rule, str) else tuple(rule or ())


def check_splits(run: RunConfig, sizes: dict[str, int]) -> None:
    """Every dimension is a multiple of the product of the mesh axes that split it (an unknown axis has size 1)."""
    for name, rule in dataclasses.asdict(run.rules).items():
        parts = math.prod(sizes[axis] for axis in axes_of(rule))
        for dim, size in split_dims(run.model, run.train).get(name.removeprefix("act_"), {}).items():
            if size % parts:
                shape = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes_of(rule))
                raise ValueError(
                    f"{dim}={size} does not divide over {shape} (rules.{name}): {size} is not a multiple of {parts}; "
                    "change one of them so that every device has an equal part"
                )


def split_dims(model: ModelConfig, train: TrainConfig) -> dict[str, dict[str, int]]:
    """The sizes behind each logical name. A vocabulary of 0 is not known yet, and a multiple of anything."""
    return {
        "batch": {"train.batch_size / train.accumulate": train.batch_size // train.accumulate},
        "seq": {"train.seq_len": train.seq_len},
        "embed": {"model.embed_dim": model.embed_dim},
        "heads": {"model.num_heads": model.num_heads, "model.num_kv_heads": model.num_kv_heads},
        "head": {"model.head_dim": model.head_dim},
        "rank": {"model.kv_rank": model.kv_rank, "model.q_rank": model.q_rank},
        "ffn": {"model.ffn_dim": model.ffn_dim},
        "vocab": {"model.vocab_size": model.vocab_size},
        "layers": {"model.num_layers": model.num_layers},
        "experts": {"model.num_experts": model.num_experts},
        "expert_embed": {"model.embed_dim": model.embed_dim},
        "expert_ffn": {"model.expert_ffn_dim": model.expert_ffn_dim},
    }
