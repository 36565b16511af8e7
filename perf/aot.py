"""The real train, prefill and decode steps, compiled for TPU slices that are not here. Knows no command line.

    compiled(work, find("v5e:16x16"))  ->  Report(fits=True, peak_bytes=…, collectives=…)

The compiler is the chips' own, so memory and the list of collectives are its word, not an estimate.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data import packing
from data.config import DataConfig
from data.tokenizer import ByteTokenizer
from inference import steps as serving
from inference.config import EngineConfig
from inference.room import TILE, kinds_of
from inference.sampling import empty_slots
from inference.steps import Batch, Program, Shape, power_of_two
from model.config import ModelConfig, with_kernels
from model.parameters import abstract, shardings, summed_dims
from parallel.compilation import TPU_OPTIONS
from parallel.config import AxisRules, ExecutionConfig, MeshConfig
from parallel.mesh import called, make_mesh, mesh_sizes
from parallel.sharding import located
from parallel.topology import Topology, topology_devices
from perf import hlo, memory
from perf.hlo import Collective
from training.config import OptimConfig, TrainConfig
from training.feed import Feed
from training.state import TrainState, abstract_state
from training.step import make_steps
from training.subject import with_vocabulary

Step = Literal["train", "prefill", "decode"]
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
FULL, LOW = 0.0, -1.0  # the compiler's effort: what runs are compiled with, and what a quick answer is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is compiled."""

    step: Step = "train"
    model: ModelConfig  # with its vocabulary
    mesh: MeshConfig
    rules: AxisRules
    optim: OptimConfig
    train: TrainConfig  # batch and length of a train step
    execution: ExecutionConfig = ExecutionConfig()  # how a train step runs on its mesh
    batch: int = 1  # B, sequences (prefill, decode)
    length: int = 1  # T, tokens of a prompt (prefill) or in the cache (decode)


class Lowered(NamedTuple):
    """A step before the compiler has seen it."""

    program: jax.stages.Lowered
    sizes: dict[str, int]  # bytes a device by kind
    argument_bytes: int  # a device
    mesh: Mesh
    cpu_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler made of a step. Bytes are of one device, and of one step where they move."""

    work: Work
    topology: Topology
    mesh: dict[str, int]  # sizes of the axes
    fits: bool
    peak_bytes: int  # where it does not fit: what it would need
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the output, that take the place of arguments
    temp_bytes: int
    breakdown: dict[str, int]  # the peak by kind
    collectives: list[Collective]
    kernels: dict[str, int]  # Pallas calls by name
    lower_cpu_seconds: float
    compile_cpu_seconds: float  # both together
    text: str  # scheduled HLO; "" where it does not fit

    @property
    def wire_bytes(self) -> int:
        """Bytes that a device sends."""
        return round(sum(row.wire_bytes for row in self.collectives))


def with_assumed_vocabulary(model: ModelConfig, data: DataConfig) -> ModelConfig:
    """The model with a vocabulary as its tokenizer will have it; no text is read for it."""
    if model.vocab_size:
        return model
    sizes = {"byte": ByteTokenizer.vocab_size, "bpe": data.bpe_vocab, "char": 128}
    if data.tokenizer not in sizes:
        raise ValueError(
            f"model.vocab_size=0 is the size of the tokenizer {data.tokenizer}, which is not opened to compile a step; "
            "give model.vocab_size=NUMBER"
        )
    return with_vocabulary(model, sizes[data.tokenizer])


# Lowering -------------------------------------------------------------------------------------------------------------


def lowered(work: Work, topology: Topology) -> Lowered:
    """The step for these devices; ValueError where the mesh does not come out on them."""
    mesh = make_mesh(work.mesh, topology_devices(topology.name))
    start = time.process_time()
    with relative_sources():
        program, sizes, argument_bytes = LOWER[work.step](work, mesh)
    return Lowered(program, sizes, argument_bytes, mesh, time.process_time() - start)


@contextlib.contextmanager
def relative_sources() -> Iterator[None]:
    """Inside, programs name this project's files from its root, wherever it lies."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = jax.config.values[name]
    jax.config.update(name, f"^{re.escape(str(hlo.ROOT))}/")
    try:
        yield
    finally:
        jax.config.update(name, before)


def train_state(work: Work, mesh: Mesh) -> tuple[Any, TrainState]:
    """The steps of a run and the shapes of its state."""
    steps = make_steps(work.model, work.optim, work.train, mesh, work.rules, work.execution)
    return steps, abstract_state(work.model, steps.optimizer, ema=work.optim.ema_decay > 0)


def train_sizes(work: Work, mesh: Mesh) -> dict[str, int]:
    """Bytes a device by kind of a train step, lowered or not."""
    steps, shapes = train_state(work, mesh)
    return memory.training(work.model, work.train, mesh, work.rules, shapes, steps.state)


def _train(work: Work, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, int], int]:
    steps, shapes = train_state(work, mesh)
    feed = Feed(steps.batch, packing.Batch, ((work.train.batch_size, work.train.seq_len),))
    batch = next(feed.abstract())
    held = memory.training(work.model, work.train, mesh, work.rules, shapes, steps.state)
    arguments = memory.device_bytes(shapes, steps.state) + sum(memory.leaf_bytes(x, x.sharding) for x in batch)
    return steps.train.lower(located(shapes, steps.state), batch), held, arguments


def _prefill(work: Work, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, int], int]:
    """The largest piece of prompts that the engine reads in a step, whatever came before it stands in the cache."""
    tiles = power_of_two(max(1, EngineConfig().chunk // TILE))
    return _serve(work, mesh, Shape(rows=0, width=1, tiles=tiles))


def _decode(work: Work, mesh: Mesh) -> tuple[jax.stages.Lowered, dict[str, int], int]:
    """A token of every sequence."""
    return _serve(work, mesh, Shape(rows=power_of_two(work.batch), width=1, tiles=0))


def _serve(work: Work, mesh: Mesh, shape: Shape) -> tuple[jax.stages.Lowered, dict[str, int], int]:
    """The engine's step with a cache for all sequences of that length."""
    served = served_arrays(work, mesh, shape)
    arguments = (served.parameters, served.slots, served.pools, served.batch)
    held = lambda tree: sum(memory.leaf_bytes(leaf, leaf.sharding) for leaf in jax.tree.leaves(tree))  # noqa: E731
    chosen = len(shape.chosen_by)
    sizes = memory.serving(
        work.model,
        mesh,
        work.rules,
        weights=held(served.parameters),
        cache=held(served.pools),
        rows=chosen,
        tokens=len(shape.owners) // chosen,
    )
    return serving.step.lower(*arguments, program=served.program, shape=shape), sizes, held(arguments)


LOWER: dict[Step, Callable[[Work, Mesh], tuple[jax.stages.Lowered, dict[str, int], int]]] = {
    "train": _train,
    "prefill": _prefill,
    "decode": _decode,
}


class Served(NamedTuple):
    """What the engine gives its step, without the numbers."""

    program: Program
    parameters: Any
    slots: Any
    pools: Any
    batch: Batch


def served_arrays(work: Work, mesh: Mesh, shape: Shape) -> Served:
    """Of an engine whose cache is as large as the sequences need; ValueError for kernels that its devices don't run."""
    platform = mesh.devices.flat[0].platform
    model = with_kernels(dataclasses.replace(work.model, scan_layers=False, remat="none"), platform)
    program, options = Program(model, mesh, work.rules, model.vocab_size), EngineConfig()
    blocks = -(-work.length // options.block_size)  # of a sequence
    options = dataclasses.replace(
        options, max_rows=power_of_two(work.batch), cache_tokens=work.batch * blocks * options.block_size
    )
    kinds = kinds_of(model, options)
    num_blocks = {kind.name: kind.num_blocks for kind in kinds}
    pools = jax.eval_shape(lambda: serving.new_pools(model, num_blocks, options.block_size, int8=False))
    slots = jax.eval_shape(lambda: empty_slots(options.max_rows, model.vocab_size))
    num = shape.rows + shape.tiles
    numbers = lambda *shape: everywhere(mesh, shape, jnp.int32)  # noqa: E731
    batch = Batch(
        tokens=numbers(len(shape.owners)),
        slots=numbers(num),
        positions=numbers(num),
        lengths=numbers(num),
        index=numbers(num),
        chooses=everywhere(mesh, (num,), jnp.bool_),
        tables={kind.name: numbers(num, blocks) for kind in kinds},
    )
    return Served(
        program=program,
        parameters=served_parameters(model, mesh, work.rules),
        slots=jax.tree.map(lambda x: everywhere(mesh, x.shape, x.dtype), slots),
        pools=located(pools, serving.pool_shardings(program, pools)),
        batch=batch,
    )


def served_parameters(model: ModelConfig, mesh: Mesh, rules: AxisRules) -> Any:
    """Matrices in the type that they multiply in."""
    _, shapes, names = abstract(model)
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    dtypes = jax.tree.map(
        lambda names, leaf: leaf.dtype if summed_dims(names) is None else model.compute_dtype,
        names,
        shapes,
        is_leaf=is_names,
    )
    return jax.tree.map(
        lambda leaf, where, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where),
        shapes,
        shardings(model, mesh, rules),
        dtypes,
    )


def everywhere(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array that every device has whole."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))


# Compiling ------------------------------------------------------------------------------------------------------------


def compiled(work: Work, topology: Topology, *, effort: float = FULL) -> Report:
    """Lower and compile a step for a topology; one that does not fit is a report, too."""
    return compile_lowered(work, topology, lowered(work, topology), effort=effort)


def compile_lowered(work: Work, topology: Topology, step: Lowered, *, effort: float) -> Report:
    """Compile what `lowered` made."""
    options: dict[str, Any] = {**TPU_OPTIONS, **({"exec_time_optimization_effort": float(effort)} if effort else {})}
    shared = {"work": work, "topology": topology, "mesh": mesh_sizes(step.mesh), "lower_cpu_seconds": step.cpu_seconds}
    start = time.process_time()
    try:
        program = step.program.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error), topology.hbm_bytes)
        if needed is None:
            said = f"the compiler refuses the {work.step} step for {topology.name}: {first_line(error)}"
            raise ValueError(said) from error
        return Report(
            **shared,
            fits=False,
            peak_bytes=needed,
            argument_bytes=step.argument_bytes,
            output_bytes=0,
            alias_bytes=0,
            temp_bytes=max(needed - step.argument_bytes, 0),
            breakdown=memory.breakdown(needed, step.sizes),
            collectives=[],
            kernels={},
            compile_cpu_seconds=step.cpu_seconds + time.process_time() - start,
            text="",
        )
    seconds = step.cpu_seconds + time.process_time() - start
    found, text = program.memory_analysis(), program.as_text()
    assert found is not None, "libtpu tells no memory"
    assert text is not None, "libtpu tells no program"
    module, names = hlo.parse(text), {axis: called(axis) for axis in step.mesh.axis_names}
    peak = int(found.peak_memory_in_bytes)
    return Report(
        **shared,
        fits=peak <= topology.hbm_bytes,
        peak_bytes=peak,
        argument_bytes=int(found.argument_size_in_bytes),
        output_bytes=int(found.output_size_in_bytes),
        alias_bytes=int(found.alias_size_in_bytes),
        temp_bytes=int(found.temp_size_in_bytes),
        breakdown=memory.breakdown(peak, step.sizes),
        collectives=hlo.collectives(
            module, dict(step.mesh.shape), slice_axes=slice_axes(step.mesh, topology), names=names
        ),
        kernels=hlo.kernels(module),
        compile_cpu_seconds=seconds,
        text=text,
    )


def needed_bytes(message: str, room: int) -> int | None:
    """Bytes that the compiler asked for in vain, more than `room` however it rounded; None for another error."""
    found = re.search(r"total memory required[^(]*\(([\d.]+)([KMGT]?)i?B?\)", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return max(round(float(found[1]) * UNITS[found[2]]), room + 1)


def first_line(error: Exception) -> str:
    """What an error says first."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def slice_axes(mesh: Mesh, topology: Topology) -> tuple[str, ...]:
    """Axes along which one goes from slice to slice."""
    if topology.slices == 1:
        return ()
    slices = np.vectorize(lambda device: device.slice_index, otypes=[int])(mesh.devices)
    return tuple(axis for dim, axis in enumerate(mesh.axis_names) if (np.diff(slices, axis=dim) != 0).any())


# How much fits --------------------------------------------------------------------------------------------------------


def batch_parts(work: Work, topology: Topology) -> int:
    """In how many parts the devices cut a batch."""
    return memory.parts("batch", make_mesh(work.mesh, topology_devices(topology.name)), work.rules)


def largest_batch(work: Work, topology: Topology, say: Callable[[str], None], *, effort: float = LOW) -> int:
    """Sequences a device of the largest train batch that fits; 0 where one is too many. Compiles about six times."""
    num_parts = batch_parts(work, topology) * work.train.accumulate

    def peak(batch: int) -> int:
        train = dataclasses.replace(work.train, batch_size=batch * num_parts)
        report = compiled(dataclasses.replace(work, train=train), topology, effort=effort)
        say(f"{batch} a device: {report.peak_bytes / 2**30:.2f} GiB{'' if report.fits else ', too much'}")
        return report.peak_bytes

    return largest(peak, topology.hbm_bytes, begin=max(work.train.batch_size // num_parts, 1))


def largest(peak: Callable[[int], int], room: int, *, begin: int = 1) -> int:
    """The largest number whose peak is within `room`, where the peak grows about evenly; 0 where 1 is too many.

    Exact up to 200, to half a percent above. Each guess is on the line through two measurements, and between what fits
    and what does not.
    """
    known = {0: 0, begin: peak(begin)}
    while True:
        low = max(n for n, bytes_ in known.items() if bytes_ <= room)
        high = min((n for n, bytes_ in known.items() if bytes_ > room), default=None)
        if high is not None and high - low <= max(1, low // 200):
            return low
        (a, at_a), (b, at_b) = sorted(known.items())[-2:] if high is None else [(low, known[low]), (high, known[high])]
        line = a + (room - at_a) * (b - a) // (at_b - at_a) if at_b > at_a else 2 * b
        guess = max(line, low + 1)
        guess = min(guess, 4 * max(low, 1)) if high is None else min(guess, high - 1)
        known[guess] = peak(guess)
