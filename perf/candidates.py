"""Ways to lay a step over devices: mesh, batch, its parts, remat, numbers. Knows what may be tried, not what it costs.

What a model divides is not known here: `check` says it, a function that raises ValueError (configs/base.py has one).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from model.config import ModelConfig, RematKind
from parallel.config import ExecutionConfig, MeshConfig
from perf.work import Job, Layout

Step = Literal["train", "prefill", "decode", "serve"]
REMATS: tuple[RematKind, ...] = ("none", "dots", "minimal", "attention", "full")  # the least computed again first
FINEST = 64  # parts of a device's batch that are tried at most, one after the other
LONGEST_RING = 64  # devices that share a sequence, at most


class Precision(NamedTuple):
    """In which numbers a step is kept and computed, as perf/work.py names them."""

    weights: str  # in HBM
    compute: str  # of products
    cache: str = "bf16"  # of keys and values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way."""

    mesh: MeshConfig  # sizes of all axes, none of them -1; serving: `data` counts replicas
    slices: int = 1  # that the axis `data` spans
    batch: int  # B, over all devices
    accumulate: int = 1  # parts of the batch, one after the other
    microbatches: int = 0  # M, of a device's batch in a pipe; 0 where there is none
    repeats: int = 1  # of a pipe
    remat: RematKind = "none"
    precision: Precision

    @property
    def devices(self) -> int:
        """jax devices that the mesh takes."""
        return math.prod(self.mesh.axes.values())

    @property
    def replicas(self) -> int:
        """Groups of devices that see different sequences."""
        return self.mesh.data * self.mesh.fsdp * self.mesh.expert

    @property
    def microbatch(self) -> int:
        """Sequences that a replica computes at once."""
        return self.batch // self.replicas // self.accumulate // max(self.microbatches, 1)

    @property
    def execution(self) -> ExecutionConfig:
        """How the pipe is run."""
        return ExecutionConfig(microbatches=self.microbatches, repeats=self.repeats)


Check = Callable[[Candidate], None]


def number_words(precision: Precision, step: Step) -> str:
    """As --precision takes it: training in bf16; serving from int8, or with int8 keys and values from int4/int8."""
    if step == "train":
        return precision.compute
    same = precision.cache == precision.compute
    return precision.weights if same else f"{precision.weights}/{precision.cache}"


def settings(candidate: Candidate, step: Step) -> str:
    """As the command line takes it: `mesh.data=1 mesh.fsdp=64 …` of train.py, `--mesh tensor=8 …` of infer.py."""
    return _training_settings(candidate) if step == "train" else _serving_settings(candidate)


def _training_settings(candidate: Candidate) -> str:
    compute, mesh = candidate.precision.compute, candidate.mesh
    words = {f"mesh.{axis}": size for axis, size in mesh.axes.items() if size > 1 or axis == "data"}
    words |= {"train.batch_size": candidate.batch, "train.accumulate": candidate.accumulate}
    if mesh.pipe > 1:
        words |= {"execution.microbatches": candidate.microbatches, "execution.repeats": candidate.repeats}
    words |= {"model.remat": candidate.remat, "model.compute_dtype": "float32" if compute == "fp32" else "bfloat16"}
    words |= {"model.matmul": compute} if compute in ("int8", "fp8") else {}
    return " ".join(f"{key}={value}" for key, value in words.items())


def _serving_settings(candidate: Candidate) -> str:
    """Of one replica's server."""
    precision, mesh = candidate.precision, candidate.mesh
    words = [f"--mesh {axis}={size}" for axis, size in mesh.axes.items() if size > 1 and axis != "data"]
    words.append(f"--dtype {'float32' if precision.compute == 'fp32' else 'bfloat16'}")
    words += [f"--weights {precision.weights}"] * (precision.weights != precision.compute)
    words += ["--kv-dtype int8"] * (precision.cache == "int8")
    return " ".join([*words, f"--max-rows {candidate.batch // mesh.data}"])


def divisors(number: int) -> list[int]:
    """Every divisor, smallest first; of 0, which means none of them, only 1."""
    return [size for size in range(1, max(number, 1) + 1) if max(number, 1) % size == 0]


# Meshes ---------------------------------------------------------------------------------------------------------------


class Meshes(NamedTuple):
    """What a model divides, and why it does not divide more."""

    allowed: list[Candidate]
    refused: list[str]  # reasons, of the simplest meshes first


def training_meshes(model: ModelConfig, base: Candidate, devices: int, check: Check) -> Meshes:
    """Every mesh of so many devices that the model divides, in its coarsest parts; the simplest first."""
    found = Meshes([], [])
    sizes = {
        axis: _alone(axis, most, base, devices, check, found)
        for axis, most in {
            "tensor": model.num_heads, "context": LONGEST_RING, "pipe": model.num_layers, "expert": model.num_experts
        }.items()
    }  # fmt: skip
    for pipe in sizes["pipe"]:
        for context in sizes["context"]:
            for tensor in sizes["tensor"]:
                for expert in sizes["expert"]:
                    rest, left = divmod(devices, pipe * context * tensor * expert)
                    for data in [] if left else divisors(rest):
                        if data % base.slices:
                            continue
                        mesh = MeshConfig(
                            pipe=pipe, data=data, fsdp=rest // data, expert=expert, context=context, tensor=tensor
                        )
                        _try(dataclasses.replace(base, mesh=mesh, microbatches=pipe if pipe > 1 else 0), check, found)
    return found


def serving_meshes(model: ModelConfig, base: Candidate, devices: int, check: Check) -> Meshes:
    """Replicas of `tensor` x `expert` devices each, every one with its own sequences."""
    found = Meshes([], [])
    tensors = _alone("tensor", model.num_heads, base, devices, check, found)
    experts = _alone("expert", model.num_experts, base, devices, check, found)
    for tensor in tensors:
        for expert in experts:
            data, left = divmod(devices, tensor * expert)
            if not left and data % base.slices == 0:
                mesh = MeshConfig(data=data, expert=expert, tensor=tensor)
                _try(dataclasses.replace(base, mesh=mesh, batch=data * expert), check, found)
    return found


def _alone(axis: str, most: int, base: Candidate, devices: int, check: Check, found: Meshes) -> list[int]:
    """Sizes that one axis may have at all: what does not divide alone does not divide together."""
    sizes = []
    for size in divisors(devices):
        if size > max(most, 1):
            break
        mesh = dataclasses.replace(MeshConfig(data=1), **{axis: size})
        try:
            check(dataclasses.replace(base, mesh=mesh, microbatches=size if axis == "pipe" and size > 1 else 0))
        except ValueError as error:
            if size == 1:
                raise
            found.refused.append(str(error))
        else:
            sizes.append(size)
    return sizes


def _try(candidate: Candidate, check: Check, found: Meshes) -> None:
    try:
        check(candidate)
    except ValueError as error:
        found.refused.append(str(error))
    else:
        found.allowed.append(candidate)


# Parts ----------------------------------------------------------------------------------------------------------------


def in_parts(candidate: Candidate, *, repeats: Sequence[int]) -> Iterator[Candidate]:
    """The same mesh with its batch in more and more parts: of a device's batch, or microbatches of its pipe."""
    rows = candidate.batch // candidate.replicas
    for parts in divisors(rows):
        if parts > FINEST:
            return
        if candidate.mesh.pipe == 1:
            yield dataclasses.replace(candidate, accumulate=parts)
        elif parts % candidate.mesh.pipe == 0:
            for times in repeats:
                yield dataclasses.replace(candidate, microbatches=parts, repeats=times)


def pipe_repeats(model: ModelConfig, pipe: int) -> list[int]:
    """How often a microbatch may go around a pipe."""
    return [times for times in (1, 2, 4) if model.num_layers % (pipe * times) == 0] if pipe > 1 else [1]


# What is predicted ----------------------------------------------------------------------------------------------------


def layout(candidate: Candidate) -> Layout:
    """The mesh as perf/work.py has it: devices of `expert` see different sequences, too."""
    mesh = candidate.mesh
    return Layout(
        data=mesh.data,
        fsdp=mesh.fsdp * mesh.expert,
        tensor=mesh.tensor,
        pipe=mesh.pipe,
        context=mesh.context,
        expert=mesh.expert,
        virtual=candidate.repeats,
        slices=candidate.slices,
    )


def job(candidate: Candidate, model: ModelConfig, kind: Literal["train", "prefill", "decode"], length: int) -> Job:
    """One step of a candidate."""
    return Job(
        kind=kind,
        model=model,
        layout=layout(candidate),
        batch=candidate.batch,
        length=length,
        microbatch=candidate.microbatch if kind == "train" else 0,
        weights=candidate.precision.weights,
        compute=candidate.precision.compute,
        cache=candidate.precision.cache,
        remat=candidate.remat,
    )
