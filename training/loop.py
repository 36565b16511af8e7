"""The train loop: one run from its first step, or its newest checkpoint, to its last. Knows no configs/, no inference/.

The device is not kept waiting for the host: a step is started before the one before it is looked at, and the batch of
the next one is loaded while it runs.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from data import pipeline
from data.config import DataConfig
from data.packing import Batch
from model import cost
from model.config import ModelConfig
from model.parameters import abstract
from parallel import checkpoint, hosts
from parallel.checkpoint import Checkpoint, Checkpoints
from parallel.compilation import cache_compilations
from parallel.config import AxisRules, ExecutionConfig, MeshConfig
from parallel.mesh import make_mesh, mesh_sizes
from parallel.peak import peak_flops
from parallel.sharding import located
from training import folder as run_folder
from training import metrics
from training.config import OptimConfig, TrainConfig
from training.feed import Feed, Loaded
from training.interruption import Interruption, noted
from training.journal import Journal
from training.state import TrainState, abstract_state, create_state
from training.step import Steps, make_steps

# sample(model, parameters, tokenizer, prompt=…, num_tokens=…, seed=…) -> text; `model.vocab_size` is resolved.
SampleFn = Callable[..., str]
ROUTED = ("max_load", "unused")  # how evenly experts are used, where the model has some


class Task(NamedTuple):
    """What a run computes, wherever it stands."""

    folder: pathlib.Path
    config: dict[str, Any]  # the run as plain data
    seed: int
    model: ModelConfig  # with its vocabulary
    schedule: TrainConfig
    mesh: Mesh
    steps: Steps
    corpus: pipeline.Corpus
    sample: SampleFn | None

    @property
    def feed(self) -> Feed:
        """How its batches lie on the devices."""
        return Feed(self.steps.batch, (self.schedule.batch_size, self.schedule.seq_len))

    @property
    def flops_per_token(self) -> float:
        """Of the model, forward and backward."""
        return cost.train_flops(self.model, self.schedule.seq_len)

    def write_text(self, parameters: Any) -> str | None:
        """What a model of these parameters writes, where the run wants to see some."""
        if self.sample is None or self.schedule.sample_tokens == 0:
            return None
        prompt, num_tokens = self.schedule.sample_prompt, self.schedule.sample_tokens
        return self.sample(
            self.model, parameters, self.corpus.tokenizer, prompt=prompt, num_tokens=num_tokens, seed=self.seed
        )


class Start(NamedTuple):
    """Where a run begins, or goes on."""

    step: int  # steps done
    state: TrainState
    loader: pipeline.TrainLoader
    first: Loaded


class Running(NamedTuple):
    """A step that the devices may not have finished."""

    step: int
    metrics: dict[str, jax.Array]
    data_wait: float  # seconds


class Loop:
    """A run under way: its state on the devices, its place in the data, its files."""

    def __init__(self, task: Task, start: Start):
        self.task = task
        self.step, self.state, self.loader, self._next = start
        self.journal = Journal(task.folder, start=start.step, steps=task.schedule.steps) if hosts.is_first() else None
        self.checkpoints = Checkpoints(task.folder / "checkpoints", keep=task.schedule.keep)
        self.stop_reason: str | None = None  # the signal that ended it before its last step
        self._saved, self._cursor = self.step, {}
        self._running: Running | None = None
        self._began = 0.0  # when the devices began the step that runs

    def run(self, interruption: Interruption, *, once_started: Callable[[], object]) -> None:
        """Step, evaluate and save as scheduled until the last step, or until interrupted; then save."""
        schedule, first = self.task.schedule, self.step + 1
        while self.step < schedule.steps:
            self.stop_reason = hosts.stop_reason(self.step, lambda: interruption.name)
            if self.stop_reason:
                break
            self.advance()
            if self.step == first:
                self.settle()  # the devices are idle once, so that peak_flops can measure them
                once_started()
            if self.step % schedule.eval_every == 0 or self.step == schedule.steps:
                self.evaluate()
            if self.step % schedule.save_every == 0:
                self.save()
        self.save()
        self.checkpoints.wait()

    def advance(self) -> None:
        """Start the next step, load the batch after it, and only then look at the step before it."""
        before, loaded = self._running, self._next
        if before is None:
            self._began = time.perf_counter()
        with jax.transfer_guard("disallow"):  # nothing goes to or from the devices unasked
            self.state, values = self.task.steps.train(self.state, loaded.batch)
        self.step += 1
        self._running, self._cursor = Running(self.step, values, loaded.data_wait), loaded.cursor
        self._next = self.task.feed.load(self.loader)
        if before is not None:
            self._report(before)

    def settle(self) -> None:
        """Wait for the step that runs and report it."""
        running, self._running = self._running, None
        if running is not None:
            self._report(running)

    def evaluate(self) -> None:
        """Measure the loss of the validation text and let the model write some; averaged parameters where kept."""
        self.settle()
        task = self.task
        parameters = self.state.parameters if self.state.ema is None else self.state.ema
        parts = jax.device_get([task.steps.evaluate(parameters, task.feed.place(batch)) for batch in self.valid])
        nll, tokens = (math.fsum(float(part[name]) for part in parts) for name in ("nll", "tokens"))
        if tokens and self.journal:
            self.journal.evaluated(self.step, nll / tokens)
        text = task.write_text(parameters)  # by all devices together
        if text is not None and self.journal:
            self.journal.wrote(self.step, task.schedule.sample_prompt + text)

    def save(self) -> None:
        """Write a checkpoint of this step in the background, where there is none yet."""
        self.settle()
        if self.step != self._saved:
            note = {"config": self.task.config, "cursor": self._cursor}
            self.checkpoints.save(self.step, self.state, note)
            self._saved = self.step

    def close(self) -> None:
        """Let go of the files and the loader."""
        if self.journal:
            self.journal.close()
        self.loader.close()

    @functools.cached_property
    def valid(self) -> list[Batch]:
        """The validation text, this process's rows of it."""
        (batch_size, seq_len), part = self.task.feed.shape, self.task.feed.rows()
        return pipeline.valid_batches(self.task.corpus, batch_size, seq_len, self.task.schedule.eval_batches, part)

    @functools.cached_property
    def _peak(self) -> float:
        """FLOP/s of all devices at best: they are alike, and one of them is asked."""
        return self.task.mesh.size * peak_flops(self.task.mesh.local_devices[0])

    def _report(self, running: Running) -> None:
        """Wait for a step, then tell of it. Raises ValueError where too many in a row were not finite."""
        values = {name: float(value) for name, value in jax.device_get(running.metrics).items()}
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        rate, skipped = values["tokens"] / seconds, int(values["skipped"])
        record: metrics.Record = {
            "step": running.step,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens_per_second": rate,
            "mfu": rate * self.task.flops_per_token / self._peak,
            "data_wait": running.data_wait,
            "tokens": int(values["tokens"]),
            "skipped": skipped,
            **{name: values[name] for name in ROUTED if name in values},
        }
        if self.journal:
            self.journal.step(record, seconds)
        if skipped >= self.task.schedule.max_skipped:
            raise ValueError(
                f"loss or gradients were not finite in {skipped} steps in a row, {running.step - skipped + 1} to "
                f"{running.step} (train.max_skipped={self.task.schedule.max_skipped}); none of them changed the "
                "parameters: look at the text, or give a lower optim.peak_lr and another name=NAME"
            )


def train(
    folder: pathlib.Path,
    *,
    config: dict[str, Any],
    seed: int,
    model: ModelConfig,
    mesh: MeshConfig,
    rules: AxisRules,
    execution: ExecutionConfig,
    data: DataConfig,
    optim: OptimConfig,
    schedule: TrainConfig,
    sample: SampleFn | None,
) -> int:
    """Train until done or interrupted; -> exit status 0. Whatever else ends a run is a ValueError or an OSError.

    `folder` is runs/<name>; training/folder.py says what it holds. `config` is the run as plain data: written there
    with model.vocab_size resolved, and what is there already is only continued with the same.
    """
    cache_compilations()
    run_folder.check_same(config)
    pipeline.import_grain()
    with run_folder.held(folder), noted() as interruption, ThreadPoolExecutor(2) as pool:
        moved = run_folder.check_config(folder, config) if hosts.is_first() else {}
        preparing = pool.submit(pipeline.prepare, data, seed=seed)
        found = checkpoint.newest(folder / "checkpoints", lambda line: say(line, file=sys.stderr))
        if found is not None and found.step == schedule.steps:
            say(f"{folder} is finished: all {found.step} steps are done; give name=NAME for a new run")
            return 0
        grid, corpus = make_mesh(mesh), preparing.result()
        check_corpus(corpus)
        model = with_vocabulary(model, corpus.tokenizer.vocab_size)
        if sample is not None and schedule.sample_tokens:
            check_prompt(schedule.sample_prompt, corpus, model)
        config = {**config, "model": {**config["model"], "vocab_size": model.vocab_size}}
        steps = make_steps(model, optim, schedule, grid, rules, execution)
        task = Task(folder, config, seed, model, schedule, grid, steps, corpus, sample)
        say(*opening(task, found, moved))
        start = made_start(task, found, rules, optim, pool)
        if hosts.is_first():
            corpus.tokenizer.save(folder / "tokenizer")
            run_folder.write(folder / "config.json", json.dumps(config, indent=2))
        with contextlib.closing(Loop(task, start)) as loop:
            loop.run(interruption, once_started=lambda: pool.submit(get_ready, loop))
        if hosts.is_first():
            metrics.plot(folder)
        say(ending(loop))
    return 0


def say(*lines: str, file: Any = None) -> None:
    """Print lines, in the first of the processes alone."""
    if hosts.is_first():
        print(*lines, sep="\n", file=file, flush=True)


def check_corpus(corpus: pipeline.Corpus) -> None:
    """Raise ValueError where this process has read another text than the first one."""
    if hosts.agreed("corpus", corpus.key) != corpus.key:
        raise ValueError(
            f"process {hosts.index()} reads another text than process 0 from data.path; "
            "give all hosts the same files, or a folder that they share"
        )


def with_vocabulary(model: ModelConfig, num_tokens: int) -> ModelConfig:
    """The model with a vocabulary: the tokenizer's, rounded up, where none is set; ValueError where it is too small."""
    if model.vocab_size == 0:
        return dataclasses.replace(model, vocab_size=num_tokens + -num_tokens % 64)
    if model.vocab_size < num_tokens:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {num_tokens} tokens; "
            f"raise it to at least {num_tokens}, or give 0 to take the tokenizer's"
        )
    return model


def check_prompt(prompt: str, corpus: pipeline.Corpus, model: ModelConfig) -> None:
    """Raise ValueError now for a sample_prompt that no evaluation could continue."""
    try:
        length = len(corpus.tokenizer.encode(prompt)) + corpus.tokenizer.adds_bos
    except ValueError as error:
        raise ValueError(f"train.sample_prompt={prompt!r}: {error}") from error
    if not 0 < length < model.max_length:
        raise ValueError(
            f"train.sample_prompt={prompt!r} is {length} tokens long and model.max_length={model.max_length} has room "
            f"for 1 to {model.max_length - 1}; change the prompt, or give train.sample_tokens=0 to sample nothing"
        )


def opening(task: Task, found: Checkpoint | None, moved: dict[str, tuple[Any, Any]]) -> Iterator[str]:
    """The first lines: what computes what, on which text, from where."""
    kind = task.mesh.devices.flat[0].device_kind
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh_sizes(task.mesh).items() if size > 1)
    yield (
        f"{task.mesh.size} {kind} device{'s' * (task.mesh.size > 1)}"
        f"{f' of {hosts.count()} processes' * (hosts.count() > 1)}, {f'mesh {shape}, ' * bool(shape)}"
        f"{cost.num_parameters(task.model):,} parameters, {task.flops_per_token:,.0f} FLOPs a token"
    )
    yield from task.corpus.describe()
    if found is not None:
        yield f"going on after step {found.step} of {task.schedule.steps}, from {found.path}"
    told = {key: pair for key, pair in moved.items() if key not in ("name", "out") and key[:6] != "hosts."}
    changes = [f"{key} was {old} and is {new}" for key, (old, new) in told.items()]
    if changes:
        yield f"{', '.join(changes)}: the batches stay the same, sums may be rounded differently"


def made_start(
    task: Task, found: Checkpoint | None, rules: AxisRules, optim: OptimConfig, pool: ThreadPoolExecutor
) -> Start:
    """The state made or restored, while the step compiles and the first batch is loaded."""
    steps, ema = task.steps, optim.ema_decay > 0
    shapes = located(abstract_state(task.model, steps.optimizer, ema=ema), steps.state)
    compiling = pool.submit(lambda: steps.train.lower(shapes, task.feed.abstract()).compile())
    loader = pipeline.TrainLoader(
        task.corpus,
        batch_size=task.schedule.batch_size,
        seq_len=task.schedule.seq_len,
        part=task.feed.rows(),
    )
    if found is not None:
        loader.restore(found.note["cursor"])
    loading = pool.submit(task.feed.load, loader)
    if found is None:
        state = create_state(task.model, steps.optimizer, task.mesh, rules, ema=ema, seed=task.seed)
    else:
        state = checkpoint.load(found, shapes)
    compiling.result()
    return Start(0 if found is None else found.step, state, loader, loading.result()._replace(data_wait=0.0))


def get_ready(loop: Loop) -> None:
    """What evaluations, checkpoints and plots will need, while the first steps run."""
    steps = loop.task.steps
    parameters = located(abstract(loop.task.model).shapes, steps.state.parameters)
    if loop.journal:
        metrics.prepare()
    checkpoint.prepare()
    if loop.valid:
        steps.evaluate.lower(parameters, loop.task.feed.abstract()).compile()


def ending(loop: Loop) -> str:
    """The last line: why the run ends here."""
    steps, folder = loop.task.schedule.steps, loop.task.folder
    if loop.step == steps:
        return f"done: {steps} steps; {folder}"
    saved = f"checkpoint saved in {folder}" if loop.step else "nothing to save yet"
    return f"interrupted by {loop.stop_reason} at step {loop.step} of {steps}, {saved}; the same command goes on"
