"""How many devices split what: the mesh's shape and the table from logical names to mesh axes. Imports no jax."""

import dataclasses
from typing import Literal

from parallel.records import require

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis. Every axis always exists; an unused one has size 1; one may be -1: all the rest."""

    pipe: int = 1  # layers split into stages, which work on different microbatches
    data: int = -1  # replicas of the parameters, each with its part of the batch; the axis that may span slices
    fsdp: int = 1  # parameters, moments and batch split; parameters gathered where used
    expert: int = 1  # experts split, and the batch; tokens travel to their experts
    context: int = 1  # sequences split; keys and values travel to the queries
    tensor: int = 1  # heads, FFN and vocabulary split; between blocks, the sequence

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}={size} must be at least 1, or -1 for all remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one mesh axis can be -1 (all remaining devices), not {sizes}")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of each axis on `num_devices` devices; raises ValueError where the product does not come out."""
        sizes = dataclasses.asdict(self)
        fixed = 1
        for size in sizes.values():
            fixed *= max(size, 1)
        if num_devices % fixed or (fixed != num_devices and -1 not in sizes.values()):
            shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
            raise ValueError(
                f"mesh {shape or 'of size 1'} asks for {fixed} devices but {num_devices} are here; "
                "the product must equal the devices: set one axis to -1 to take the rest"
            )
        return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Which mesh axes split each logical name; None keeps it whole. Activations have names of their own."""

    batch: MeshAxes = ("data", "fsdp", "expert")  # B
    seq: MeshAxes = "context"  # T where tokens meet: attention, loss
    residual_seq: MeshAxes = ("context", "tensor")  # T between blocks: norms and residuals (arXiv:2205.05198)
    act_embed: MeshAxes = None  # D of activations
    act_heads: MeshAxes = "tensor"  # N and K of activations
    act_ffn: MeshAxes = "tensor"  # F of activations
    act_vocab: MeshAxes = "tensor"  # V of logits
    layers: MeshAxes = "pipe"  # L
    embed: MeshAxes = ("fsdp", "expert", "context")  # D of parameters
    heads: MeshAxes = "tensor"  # N and K of parameters
    head: MeshAxes = None  # H
    rank: MeshAxes = None  # R of low-rank projections
    ffn: MeshAxes = "tensor"  # F of parameters
    vocab: MeshAxes = "tensor"  # V of the embedding tables
    experts: MeshAxes = "expert"  # E
    expert_embed: MeshAxes = ("fsdp", "context")  # D of the experts' parameters
    expert_ffn: MeshAxes = "tensor"  # F of the experts' parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a step runs on its mesh. It changes how sums are rounded, not what is computed."""

    context: Literal["ring", "gather"] = "ring"  # a split sequence: keys go around, or are gathered first
    pipeline: Literal["circular", "1f1b"] = "circular"  # schedule of the pipe axis: all forwards first, or in turns
    microbatches: int = 0  # M, parts of a device's batch that flow through the pipe; 0 is one for each stage
    repeats: int = 1  # times that a microbatch goes around the pipe, through as many chunks of layers a stage

    def __post_init__(self):
        require(self, "execution", "microbatches", low=0)
        require(self, "execution", "repeats", low=1)
        if self.pipeline == "1f1b" and self.repeats > 1:
            raise ValueError(
                f"execution.repeats={self.repeats} does not go with execution.pipeline=1f1b; take circular, or repeats=1"
            )
