"""A run, or a published model's name, as a question to the planner (perf/plan.py). Knows no answer, imports no jax.

asked(*run_of(["configs/case_c.py"], DEFAULT), wishes)   the run's own batch, length and numbers
asked(*run_of(["llama3_1_405b"], DEFAULT), wishes)       a model of model/families.py, its batch left open
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Literal

from configs.base import RunConfig, applied, decoder_of, own_precision, with_usual_vocabulary
from configs.commandline import resolve
from configs.overrides import override
from model.families import PUBLISHED
from parallel import chips, topology
from parallel.chips import Chip
from parallel.config import MeshConfig
from parallel.records import nearest
from parallel.topology import Topology
from perf import candidates, machine
from perf.candidates import Candidate, Check, Precision, Step
from perf.plan import Plan, Question
from training.config import TrainConfig

LENGTH = 8192  # tokens of a sequence where only a model is named
ANSWER = 256  # tokens of an answer where nothing is said
TRAINED = ("fp32", "bf16", "int8", "fp8")  # numbers of products in training: model.compute_dtype, model.matmul
SERVED = ("fp32", "bf16", "int8", "fp8", "int4")  # numbers of weights in serving: infer.py --weights
CACHES = ("bf16", "int8")  # of keys and values: infer.py --kv-dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked beside the run."""

    step: Step = "train"
    chip: str = ""
    chips: int = 0
    topology: str = ""  # instead of both, as v5p:4x4x8
    slices: int = 0  # 0: as few as will do
    batches: tuple[int, ...] = ()  # over all devices; () is the run's own, or of a bare model all that are usual
    length: int = 0  # 0 is the run's
    output: int = 0  # tokens of an answer (serve)
    precisions: tuple[str, ...] = ()  # as bf16, int8 or, with the cache's, int4/int8; () is the run's own
    tokens: float = 0.0  # of the whole run
    by: Literal["time", "cost"] = "time"
    top: int = 10


# What a command line names --------------------------------------------------------------------------------------------


def run_of(words: Sequence[str], default: pathlib.Path) -> tuple[RunConfig, bool]:
    """The run, and whether it is a model alone, whose batch and length nobody chose."""
    names = [word for word in words if "=" not in word and not word.startswith("-")]
    if len(names) != 1 or names[0].endswith(".py") or pathlib.Path(names[0]).exists():
        return resolve(words, default), False
    known = {_bare(name): name for name in PUBLISHED}
    if _bare(names[0]) not in known:
        near = nearest(_bare(names[0]), known)
        hint = re.sub(r"\w+(?=( or |\?))", lambda found: known.get(found[0], found[0]), near)
        hint = hint or f"; such as {', '.join(list(PUBLISHED)[:4])}"
        raise ValueError(f"{names[0]} is no config file and no published model{hint}")
    run = of_model(known[_bare(names[0])])
    return override(run, [word for word in words if "=" in word]), True


def _bare(name: str) -> str:
    """Llama-3.1-405B, llama3_1_405b -> llama31405b"""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def of_model(name: str) -> RunConfig:
    """A published model with products in bfloat16; what a run decides beside it is as usual."""
    model = dataclasses.replace(PUBLISHED[name](), compute_dtype="bfloat16", remat="full")
    length = min(model.max_length, LENGTH)
    return RunConfig(
        name=name, model=model, mesh=MeshConfig(auto=True), train=TrainConfig(steps=1000, batch_size=1, seq_len=length)
    )


# The question ---------------------------------------------------------------------------------------------------------


def asked(run: RunConfig, is_bare: bool, wishes: Wishes) -> tuple[Question, Check]:
    """What the planner is asked, and what it may not do to the run."""
    chip, numbers, num_slices = _machine(run, wishes)
    model = with_usual_vocabulary(*decoder_of(run))
    length = wishes.length or run.train.seq_len
    if length > model.max_length:
        raise ValueError(
            f"--length {length} is more than model.max_length={model.max_length}; shorten it or raise model.max_length"
        )
    own = own_precision(run, wishes.step)
    wanted = tuple(_precision(text, own, wishes.step) for text in wishes.precisions) or (own,)
    batches = wishes.batches
    if not batches and wishes.step == "train" and not is_bare:
        batches = (run.train.batch_size,)
    question = Question(
        step=wishes.step,
        model=model,
        optim=run.optim,
        train=run.train,
        chip=chip,
        chips=numbers,
        slices=num_slices,
        batches=batches,
        length=length,
        output=(wishes.output or ANSWER) if wishes.step == "serve" else 0,
        precisions=wanted,
        others=tuple(_others(chip, own, wishes.step, wanted)),
        tokens=wishes.tokens,
        by=wishes.by,
        top=wishes.top,
    )
    train = dataclasses.replace(run.train, seq_len=length, accumulate=1)
    return question, check_of(dataclasses.replace(run, train=train, mesh=MeshConfig(data=1)), wishes.step)


def _machine(run: RunConfig, wishes: Wishes) -> tuple[Chip, tuple[int, ...], int]:
    """The chip, how many of it are tried, and in how many slices (0: as few as will do)."""
    name = wishes.topology or ("" if wishes.chip else next(iter(run.topologies), ""))
    if name and (wishes.chip or wishes.chips):
        raise ValueError(f"--topology {name} says chip and number; leave out --chip and --chips, or give them alone")
    if name:
        found = topology.find(name, max(wishes.slices, 1))
        chip = chips.find(found.generation.name)
        count = found.num_devices // found.generation.devices_per_chip
        return chip, (count,), found.slices
    if not wishes.chip:
        raise ValueError(f"{run.name} names no topologies; give --chip C --chips N, such as --chip v5p --chips 128")
    if not wishes.chips:
        raise ValueError(f"--chip {wishes.chip} of how many? give --chips N, such as --chips 128")
    chip = chips.find(wishes.chip)
    if wishes.slices:
        machine.require(chip, wishes.chips, wishes.slices)
    else:
        machine.fewest(chip, wishes.chips)
    return chip, _numbers(chip, wishes), wishes.slices


def _numbers(chip: Chip, wishes: Wishes) -> tuple[int, ...]:
    """By time all chips; by cost also fewer of them, by halves, as they may be cheaper."""
    if wishes.by == "time":
        return (wishes.chips,)
    halves = [wishes.chips >> down for down in range(7)]
    return tuple(n for n in halves if n and (n == wishes.chips or (machine.forms(chip, n) and not wishes.slices)))


def _precision(text: str, own: Precision, step: Step) -> Precision:
    """bf16 -> weights and products; int4/int8 -> weights and cache."""
    number, slash, cache = text.partition("/")
    numbers = TRAINED if step == "train" else SERVED
    if number not in numbers:
        raise ValueError(f"--precision {text}: {number} is none of {', '.join(numbers)}{nearest(number, numbers)}")
    if slash and (step == "train" or cache not in CACHES):
        raise ValueError(f"--precision {text}: after / stands a number of the cache, {' or '.join(CACHES)}, in serving")
    if step == "train":
        return Precision("fp32", number)
    wide = "fp32" if number == "fp32" else "bf16"
    return Precision(number, wide, cache or (wide if number in ("fp32", "bf16") else own.cache))


def _others(chip: Chip, own: Precision, step: Step, wanted: Sequence[Precision]) -> list[Precision]:
    """Numbers that the chip has a unit for (train), or that weights and cache may be kept in (serving)."""
    if step == "train":
        units = {"bf16": True, "int8": chip.int8_flops, "fp8": chip.fp8_flops}
        found = [Precision("fp32", number) for number, unit in units.items() if unit]
    else:
        found = [Precision(weights, "bf16", cache) for weights in SERVED[1:] for cache in CACHES]
    return [precision for precision in found if precision not in wanted]


def as_planned(run: RunConfig, question: Question, plan: Plan) -> tuple[RunConfig, Topology]:
    """What is compiled to prove a plan: the run in its way, and its slices; of serving, one replica.

    ValueError where there is no compiler for the chip, or none of our steps computes so.
    """
    chip, one = question.chip, plan.candidate
    if question.step == "train":
        topology_ = machine.topology(chip, plan.chips, one.slices)
        planned = applied(run, one)
        planned = dataclasses.replace(planned, train=dataclasses.replace(planned.train, seq_len=question.length))
    else:
        if {one.precision.weights, one.precision.cache} != {one.precision.compute}:
            words = candidates.number_words(one.precision, question.step)
            raise ValueError(f"--compile has steps of bf16 and fp32 weights and caches, not of {words}; leave it out")
        mesh = dataclasses.replace(one.mesh, data=1)
        topology_ = machine.topology(chip, max(math.prod(mesh.axes.values()) // chip.devices_per_chip, 1), 1)
        dtype = "float32" if one.precision.compute == "fp32" else "bfloat16"
        planned = dataclasses.replace(
            run, mesh=mesh, model=dataclasses.replace(decoder_of(run)[0], compute_dtype=dtype)
        )
    if topology_ is None:
        raise ValueError(f"--compile asks the TPU compiler, which knows no {chip.name}; leave it out")
    return planned, topology_


def check_of(run: RunConfig, step: Step) -> Check:
    """ValueError for a candidate that the run cannot take, by the checks of configs/base.py."""
    if step != "train":  # a served sequence is not split between blocks
        rules = dataclasses.replace(run.rules, residual_seq=run.rules.seq)
        run = dataclasses.replace(run, rules=rules)

    def check(candidate: Candidate) -> None:
        applied(run, candidate).check_devices(candidate.devices)

    return check
