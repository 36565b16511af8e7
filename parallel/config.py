"""How many devices split what, and which processes hold them: mesh, axis rules, hosts. Imports no jax."""

import dataclasses
from collections.abc import Mapping
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
    auto: bool = False  # pick the sizes for the devices that are there; mesh=auto says the same

    @property
    def axes(self) -> dict[str, int]:
        """The size of each axis, as given."""
        return {name: size for name, size in dataclasses.asdict(self).items() if name != "auto"}

    def __post_init__(self):
        sizes = self.axes
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}={size} must be at least 1, or -1 for all remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one mesh axis can be -1 (all remaining devices), not {sizes}")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of each axis on `num_devices` devices; raises ValueError where the product does not come out."""
        sizes = self.axes
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
    embed: MeshAxes = ("fsdp", "expert", "context")  # D of parameters, and U where a product takes a state in
    heads: MeshAxes = "tensor"  # N and K of parameters
    head: MeshAxes = None  # H
    rank: MeshAxes = None  # R of low-rank projections
    ffn: MeshAxes = "tensor"  # F of parameters
    vocab: MeshAxes = "tensor"  # V of the embedding tables
    recurrent: MeshAxes = "tensor"  # U of a cell's gates
    act_recurrent: MeshAxes = "tensor"  # U of a state where its gates are computed
    gates: MeshAxes = None  # J of a cell
    experts: MeshAxes = "expert"  # E
    expert_embed: MeshAxes = ("fsdp", "context")  # D of the experts' parameters
    expert_ffn: MeshAxes = "tensor"  # F of the experts' parameters

    def with_whole_rows(self) -> "AxisRules":
        """The rules for rows that are not split further between blocks: of pairs, whose lengths change by the batch."""
        return dataclasses.replace(self, residual_seq=self.seq)


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
                f"execution.repeats={self.repeats} does not go with execution.pipeline=1f1b; "
                "take circular, or repeats=1"
            )


# What launchers set, by the names that JAX's own documentation uses.
ENVIRONMENT = {"coordinator": "JAX_COORDINATOR_ADDRESS", "count": "JAX_NUM_PROCESSES", "index": "JAX_PROCESS_ID"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """Processes that run as one. Nothing set: all that Cloud TPU knows of, elsewhere this one alone (docs/hosts.md)."""

    coordinator: str = ""  # HOST:PORT where process 0 listens ($JAX_COORDINATOR_ADDRESS); auto: as Slurm, MPI, TPU say
    count: int = 0  # processes ($JAX_NUM_PROCESSES); 1: this one alone, also on a TPU
    index: int = -1  # this process's number, from 0 ($JAX_PROCESS_ID)
    devices: int = 0  # virtual CPU devices of this process, to try meshes out; 0: as jax decides
    wait: int = 300  # seconds to wait for the others at the start
    timeout: int = 60  # seconds without a sign of life after which a process counts as gone

    def __post_init__(self):
        for name, low in (("count", 0), ("index", -1), ("devices", 0), ("wait", 1), ("timeout", 2)):
            if getattr(self, name) < low:
                raise ValueError(f"hosts.{name}={getattr(self, name)} must be at least {low}")
        host, colon, port = self.coordinator.rpartition(":")
        if self.coordinator not in ("", "auto") and not (host and colon and port.isdecimal() and int(port) < 65536):
            raise ValueError(
                f"hosts.coordinator={self.coordinator} must be HOST:PORT of process 0, as 10.0.0.2:8476, or auto"
            )
        if self.count and self.index >= self.count:
            raise ValueError(
                f"hosts.index={self.index} must be below hosts.count={self.count}: processes are numbered from 0"
            )

    def with_environment(self, environment: Mapping[str, str]) -> "HostsConfig":
        """What is not set taken from a launcher's variables, and checked as a whole. ValueError where both differ."""
        unset, given = HostsConfig(), {}
        for name, variable in ENVIRONMENT.items():
            text, value = environment.get(variable, "").strip(), getattr(self, name)
            if not text:
                continue
            if name != "coordinator" and not text.isdecimal():
                raise ValueError(f"{variable}={text} must be a whole number; it stands for hosts.{name}")
            found = text if name == "coordinator" else int(text)
            if value not in (getattr(unset, name), found):
                raise ValueError(f"hosts.{name}={value} but {variable}={text}; say one of them, or both alike")
            given[name] = found
        whole = dataclasses.replace(self, **given)
        if whole.count == 1 or whole.coordinator == "auto":
            return whole
        if any(getattr(whole, name) != getattr(unset, name) for name in ENVIRONMENT):
            for name in ENVIRONMENT:
                if getattr(whole, name) == getattr(unset, name):
                    raise ValueError(
                        f"hosts.{name} is missing: several processes need all of hosts.coordinator, hosts.count and "
                        f"hosts.index (or {', '.join(ENVIRONMENT.values())}); hosts.count=1 runs one alone"
                    )
        return whole
