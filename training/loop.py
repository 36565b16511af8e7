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
from data.config import DataConfig, PairsConfig
from model.parameters import Shape, abstract, num_parameters
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
from training.step import BATCHES, Steps, make_steps
from training.subject import Pairs, Subject, Text, prepare

# sample(model, parameters, tokenizer, prompt=…, num_tokens=…, seed=…) -> text; `model.vocab_size` is resolved.
SampleFn = Callable[..., str]
# score(model, parameters, corpus) -> BLEU of the validation pairs, and the translations it is of.
ScoreFn = Callable[..., tuple[float, list[str]]]
SHOWN = 3  # translations in a sample
ROUTED = ("max_load", "unused")  # how evenly experts are used, where the model has some


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run computes, wherever it stands."""

    folder: pathlib.Path
    config: dict[str, Any]  # the run as plain data
    seed: int
    model: Shape  # with its vocabulary
    schedule: TrainConfig
    mesh: Mesh
    steps: Steps
    subject: Subject
    sample: SampleFn | None
    score: ScoreFn | None

    @functools.cached_property
    def feed(self) -> Feed:
        """How its batches lie on the devices."""
        return Feed(self.steps.batch, BATCHES[type(self.model)], self.subject.shapes(self.schedule))

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Of the model, forward and backward."""
        return self.subject.train_flops(self.model, self.schedule)

    def write_text(self, parameters: Any) -> str | None:
        """What a model of these parameters writes, where the run wants to see some."""
        if self.sample is None or self.schedule.sample_tokens == 0 or not isinstance(self.subject, Text):
            return None
        prompt, num_tokens = self.schedule.sample_prompt, self.schedule.sample_tokens
        tokenizer = self.subject.corpus.tokenizer
        text = self.sample(self.model, parameters, tokenizer, prompt=prompt, num_tokens=num_tokens, seed=self.seed)
        return prompt + text

    def judge(self, parameters: Any) -> tuple[float, str] | None:
        """BLEU of the validation pairs, and some of its translations, where the run learns to translate."""
        if self.score is None or not isinstance(self.subject, Pairs) or not self.subject.corpus.valid_texts:
            return None
        bleu, found = self.score(self.model, parameters, self.subject.corpus)
        pairs = zip(self.subject.corpus.valid_texts[:SHOWN], found, strict=False)
        return bleu, "\n".join(f"{source}\n    {target}\n    {answer}" for (source, target), answer in pairs)


class Best(NamedTuple):
    """The best evaluation of a translation run so far."""

    bleu: float = -1.0
    step: int = 0
    since: int = 0  # evaluations after it


class Start(NamedTuple):
    """Where a run begins, or goes on."""

    step: int  # steps done
    state: TrainState
    loader: Any
    first: Loaded
    best: Best


class Running(NamedTuple):
    """A step that the devices may not have finished."""

    step: int
    metrics: dict[str, jax.Array]
    data_wait: float  # seconds


class Loop:
    """A run under way: its state on the devices, its place in the data, its files."""

    def __init__(self, task: Task, start: Start):
        self.task = task
        self.step, self.state, self.loader, self._next, self.best = start
        self.journal = Journal(task.folder, start=start.step, steps=task.schedule.steps) if hosts.is_first() else None
        self.checkpoints = Checkpoints(task.folder / "checkpoints", keep=task.schedule.keep)
        self.best_kept = Checkpoints(task.folder / "best", keep=1) if task.score else None  # parameters alone
        self.stop_reason: str | None = None  # the signal that ended it before its last step
        self._saved, self._cursor = self.step, {}
        self._running: Running | None = None
        self._began = 0.0  # when the devices began the step that runs

    def run(self, interruption: Interruption, *, once_started: Callable[[], object]) -> None:
        """Step, evaluate and save as scheduled until the last step, or until interrupted; then save."""
        schedule, first = self.task.schedule, self.step + 1
        while self.step < schedule.steps and not is_settled(self.best, schedule):
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
        if self.best_kept:
            self.best_kept.wait()

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
        """Measure the loss of the validation text and let the model write some; averaged parameters where kept.

        A model that translates is measured by its translations, too, and its best parameters are kept.
        """
        self.settle()
        task = self.task
        parameters = self.state.parameters if self.state.ema is None else self.state.ema
        parts = jax.device_get([task.steps.evaluate(parameters, task.feed.place(batch)) for batch in self.valid])
        nll, tokens = (math.fsum(float(part[name]) for part in parts) for name in ("nll", "tokens"))
        if tokens and self.journal:
            self.journal.evaluated(self.step, nll / tokens)
        text = task.write_text(parameters)  # by all devices together
        if text is not None and self.journal:
            self.journal.wrote(self.step, text)
        judged = task.judge(parameters)
        if judged is not None:
            self._judged(*judged, parameters)

    def _judged(self, bleu: float, text: str, parameters: Any) -> None:
        """Note a score; keep the parameters where it is the best."""
        if self.journal:
            self.journal.scored(self.step, bleu)
            self.journal.wrote(self.step, text)
        is_best = bleu > self.best.bleu
        self.best = Best(bleu, self.step) if is_best else self.best._replace(since=self.best.since + 1)
        if is_best and self.best_kept:
            self.best_kept.save(self.step, {"parameters": parameters}, {"bleu": bleu})

    def save(self) -> None:
        """Write a checkpoint of this step in the background, where there is none yet."""
        self.settle()
        if self.step != self._saved:
            note = {"config": self.task.config, "cursor": self._cursor, "best": self.best._asdict()}
            self.checkpoints.save(self.step, self.state, note)
            self._saved = self.step

    def close(self) -> None:
        """Let go of the files and the loader."""
        if self.journal:
            self.journal.close()
        self.loader.close()

    @functools.cached_property
    def valid(self) -> list[Any]:
        """The validation text, this process's rows of it."""
        return self.task.subject.valid(self.task.schedule, self.task.feed.rows)

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
    model: Shape,
    mesh: MeshConfig,
    rules: AxisRules,
    execution: ExecutionConfig,
    data: DataConfig | PairsConfig,
    optim: OptimConfig,
    schedule: TrainConfig,
    sample: SampleFn | None,
    score: ScoreFn | None = None,
) -> int:
    """Train until done or interrupted; -> exit status 0. Whatever else ends a run is a ValueError or an OSError.

    `folder` is runs/<name>; training/folder.py says what it holds. `config` is the run as plain data: written there
    with the vocabulary's sizes resolved, and what is there already is only continued with the same.
    """
    cache_compilations()
    run_folder.check_same(config)
    pipeline.import_grain()
    with run_folder.held(folder), noted() as interruption, ThreadPoolExecutor(2) as pool:
        moved = run_folder.check_config(folder, config) if hosts.is_first() else {}
        preparing = pool.submit(prepare, data, seed=seed)
        found = checkpoint.newest(folder / "checkpoints", lambda line: say(line, file=sys.stderr))
        if found is not None and found.step == schedule.steps:
            say(f"{folder} is finished: all {found.step} steps are done; give name=NAME for a new run")
            return 0
        if found is not None and is_settled(Best(**found.note.get("best", {})), schedule):
            say(f"{folder} is finished: BLEU has not risen for train.patience={schedule.patience} evaluations")
            return 0
        grid, subject = make_mesh(mesh), preparing.result()
        check_corpus(subject.corpus.key)
        model = subject.resolved(model)
        if sample is not None and schedule.sample_tokens and isinstance(subject, Text):
            check_prompt(schedule.sample_prompt, subject.corpus, model)
        config = {**config, "model": {**config["model"], **sizes(model)}}
        steps = make_steps(model, optim, schedule, grid, rules, execution)
        task = Task(folder, config, seed, model, schedule, grid, steps, subject, sample, score)
        say(*opening(task, found, moved))
        start = made_start(task, found, rules, optim, pool)
        if hosts.is_first():
            subject.save(folder)
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


def is_settled(best: Best, schedule: TrainConfig) -> bool:
    """Whether no better score is to be expected."""
    return 0 < schedule.patience <= best.since


def sizes(model: Shape) -> dict[str, int]:
    """The vocabulary's, by the names of their fields."""
    return {name: getattr(model, name) for name in ("vocab_size", "source_vocab_size") if hasattr(model, name)}


def check_corpus(key: str) -> None:
    """Raise ValueError where this process has read another text than the first one."""
    if hosts.agreed("corpus", key) != key:
        raise ValueError(
            f"process {hosts.index()} reads another text than process 0 from data.path; "
            "give all hosts the same files, or a folder that they share"
        )


def check_prompt(prompt: str, corpus: pipeline.Corpus, model: Shape) -> None:
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
        f"{num_parameters(task.model):,} parameters, {task.flops_per_token:,.0f} FLOPs a token"
    )
    yield from task.subject.describe(task.schedule)
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
    compiling = [
        pool.submit(lambda batch=batch: steps.train.lower(shapes, batch).compile()) for batch in task.feed.abstract()
    ]
    loader = task.subject.loader(task.schedule, task.feed.rows)
    if found is not None:
        loader.restore(found.note["cursor"])
    loading = pool.submit(task.feed.load, loader)
    if found is None:
        state = create_state(task.model, steps.optimizer, task.mesh, rules, ema=ema, seed=task.seed)
    else:
        state = checkpoint.load(found, shapes)
    for program in compiling:
        program.result()
    first, best = loading.result()._replace(data_wait=0.0), Best(**found.note.get("best", {})) if found else Best()
    return Start(0 if found is None else found.step, state, loader, first, best)


def get_ready(loop: Loop) -> None:
    """What evaluations, checkpoints and plots will need, while the first steps run."""
    steps = loop.task.steps
    parameters = located(abstract(loop.task.model).shapes, steps.state.parameters)
    if loop.journal:
        metrics.prepare()
    checkpoint.prepare()
    for batch in loop.task.feed.abstract() if loop.valid else ():
        steps.evaluate.lower(parameters, batch).compile()


def ending(loop: Loop) -> str:
    """The last line: why the run ends here."""
    steps, folder = loop.task.schedule.steps, loop.task.folder
    if loop.step == steps:
        return f"done: {steps} steps; {folder}"
    if is_settled(loop.best, loop.task.schedule):
        return (
            f"done after {loop.step} of {steps} steps: BLEU has been highest, {loop.best.bleu:.2f}, at step "
            f"{loop.best.step}; {folder}"
        )
    saved = f"checkpoint saved in {folder}" if loop.step else "nothing to save yet"
    return f"interrupted by {loop.stop_reason} at step {loop.step} of {steps}, {saved}; the same command goes on"
