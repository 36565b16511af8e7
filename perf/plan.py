"""The best ways to run a step on some chips: every mesh, batch, remat and precision that divides and fits, ranked.

    search(question, check)  ->  Answer(plans=[Plan(candidate=…, prediction=…, hbm_bytes=…, cost=…), …], …)

Arithmetic alone: no device is looked at and nothing is compiled. Which meshes divide a model is the caller's `check`.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from model import cost
from model.config import ModelConfig, RematKind
from parallel.chips import Chip
from parallel.config import MeshConfig
from perf import candidates, held, machine
from perf.candidates import REMATS, Candidate, Check, Meshes, Precision, Step
from perf.predict import Prediction, predict_all
from perf.work import BYTES
from training.config import OptimConfig, TrainConfig

MILLION = 1_000_000
RIVALS = 4  # that are told
ELSEWHERE = 24  # of the best plans, whose meshes are tried in other numbers, too
BATCH_TOKENS = 2**24  # of the largest batch that is tried unasked: arXiv:2407.21783, section 3.4.1, has 16M
DEVICE_TOKENS = 2**16  # of it on one device
HOPELESS = 1.6  # times the best: computing again takes a third, and coarser parts save less
ROWS = 1024  # sequences of a serving replica, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked."""

    step: Step
    model: ModelConfig  # with its vocabulary
    optim: OptimConfig = OptimConfig()
    train: TrainConfig  # how the loss is made; batch and length are below
    chip: Chip
    chips: tuple[int, ...]  # numbers of chips that are tried
    slices: int = 0  # that each number comes in; 0: as few as will do
    batches: tuple[int, ...] = ()  # B over all devices; () tries powers of two
    length: int  # T, tokens of a sequence (train), of a prompt (prefill, serve), in the cache (decode)
    output: int = 0  # tokens of an answer (serve)
    remats: tuple[RematKind, ...] = REMATS
    precisions: tuple[Precision, ...]  # that the plans are in
    others: tuple[Precision, ...] = ()  # told beside them
    tokens: float = 0.0  # of the whole run; 0: cost is of a million
    by: Literal["time", "cost"] = "time"
    top: int = 10


class Plan(NamedTuple):
    """One way that divides and fits. Bytes are of one device."""

    candidate: Candidate
    chips: int
    prediction: Prediction  # of the step; serve: of a token of every sequence, with its share of the prompts
    tokens: int  # that a step computes (train, prefill) or makes (decode, serve), over all devices
    memory: dict[str, int]  # by kind
    cost: float | None  # US$ of the run, else of a million tokens; None where the chip has no price
    first_token: float | None = None  # seconds that a prompt takes alone (serve)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.prediction.seconds

    @property
    def hbm_bytes(self) -> int:
        """At the peak."""
        return sum(self.memory.values())

    @property
    def tokens_per_second_per_chip(self) -> float:
        """Of a run that only does such steps."""
        return self.tokens / self.seconds / self.chips


class Answer(NamedTuple):
    """What a search found."""

    question: Question
    plans: list[Plan]  # the best of each mesh, batch and precision, the best first; at most `top`
    rivals: list[Plan]  # the best of each other way: other axes beside data in training, other meshes in serving
    front: list[Plan]  # serving: those that no other beats in latency, throughput and cost together, the quickest first
    others: list[Plan]  # the best in each other precision
    tried: int  # meshes and batches that the model divides
    fitting: int  # of them


# Searching ------------------------------------------------------------------------------------------------------------


def search(question: Question, check: Check) -> Answer:
    """The best plans; ValueError, with what would do, where there is none."""
    refused: list[str] = []
    tried, ways = 0, []
    for chips in question.chips:
        for meshes in _meshes(question, chips, check):
            refused += meshes.refused
            tried += len(meshes.allowed)
            ways += [(list(_fitting(question, mesh)), chips) for mesh in meshes.allowed]
    found = _promising(question, [(some, chips) for some, chips in ways if some])
    if not found:
        raise ValueError(_nothing(question, check, refused if not tried else []))
    ranked = list(_best_of(found, question))
    return Answer(
        question=question,
        plans=ranked[: question.top],
        rivals=_rivals(ranked, question),
        front=[] if question.step == "train" else pareto(ranked),
        others=_elsewhere(question, ranked[:ELSEWHERE]),
        tried=tried,
        fitting=sum(bool(some) for some, _ in ways),
    )


def _rivals(ranked: Sequence[Plan], question: Question) -> list[Plan]:
    """The best plan of each way that is not the best one's, the best first."""

    def way(plan: Plan) -> object:
        axes = plan.candidate.mesh.axes
        return (
            frozenset(axis for axis, size in axes.items() if size > 1 and axis != "data")
            if question.step == "train"
            else tuple(axes.values())
        )

    found: dict[object, Plan] = {}
    for plan in ranked:
        found.setdefault(way(plan), plan)
    return list(found.values())[1 : RIVALS + 1]


def _promising(question: Question, ways: Sequence[tuple[list[Candidate], int]]) -> list[Plan]:
    """What the ways of each mesh take: of each the first, and the others where that one is not hopeless."""
    first = _plans(question, [(some[0], chips) for some, chips in ways])
    best = min((_worth(plan, question) for plan in first), default=0.0)
    rest = [
        (one, chips)
        for (some, chips), plan in zip(ways, first, strict=True)
        if _worth(plan, question) <= HOPELESS * best
        for one in some[1:]
    ]
    return first + _plans(question, rest)


def _worth(plan: Plan, question: Question) -> float:
    """What a token takes: seconds, or seconds of chips; the less the better."""
    return plan.seconds / plan.tokens * (1 if question.by == "time" else plan.chips)


def _best_of(found: Iterable[Plan], question: Question) -> Iterator[Plan]:
    """The best of each mesh and precision, and of each batch that was asked for; the best first."""
    seen = set()
    for plan in sorted(found, key=lambda plan: _rank(plan, question)):
        one = plan.candidate
        is_open = question.step == "train" and not question.batches
        kind = (plan.chips, one.mesh, one.precision, 0 if is_open else one.batch)
        if kind not in seen:
            seen.add(kind)
            yield plan


def _rank(plan: Plan, question: Question) -> tuple:
    """The less the better; what is equal goes by simplicity, so that every process and every day agree."""
    sizes = plan.candidate.mesh.axes
    worth = float(f"{_worth(plan, question):.6g}")
    return worth, plan.chips, sum(size > 1 for size in sizes.values()), plan.hbm_bytes, tuple(sizes.values())


def _meshes(question: Question, chips: int, check: Check) -> Iterator[Meshes]:
    """Meshes that the model divides, with each batch."""
    devices = chips * question.chip.devices_per_chip
    num_slices = slices_of(question, chips)
    for precision in question.precisions:
        base = Candidate(mesh=MeshConfig(data=1), slices=num_slices, batch=1, precision=precision)
        if question.step == "train":
            for batch in question.batches or _training_batches(question, devices):
                sized = dataclasses.replace(base, batch=batch)
                yield candidates.training_meshes(question.model, sized, devices, check)
        else:
            meshes = candidates.serving_meshes(question.model, base, devices, check)
            sized = [one for mesh in meshes.allowed for one in _served_batches(question, mesh)]
            yield Meshes(sized, meshes.refused)


def slices_of(question: Question, chips: int) -> int:
    """Slices that so many chips come in; ValueError where they are none."""
    if not question.slices:
        return machine.fewest(question.chip, chips)
    machine.require(question.chip, chips, question.slices)
    return question.slices


def _training_batches(question: Question, devices: int) -> list[int]:
    """The largest usual batch, as a power of two and as a multiple of the devices: smaller ones gain nothing."""
    most = max(min(BATCH_TOKENS, DEVICE_TOKENS * devices) // question.length, 1)
    largest = 2 ** (most.bit_length() - 1)
    return sorted({largest, devices * 2 ** ((most // devices).bit_length() - 1) if most >= devices else largest})


def _served_batches(question: Question, mesh: Candidate) -> list[Candidate]:
    """The mesh with more and more sequences, at least one wherever they differ."""
    if question.batches:
        sizes = [batch for batch in question.batches if batch % mesh.replicas == 0]
    else:
        sizes = [mesh.mesh.data * 2**power for power in range(ROWS.bit_length()) if 2**power >= mesh.mesh.expert]
    return [dataclasses.replace(mesh, batch=batch) for batch in sizes]


# What fits ------------------------------------------------------------------------------------------------------------


def memory(question: Question, candidate: Candidate) -> dict[str, int]:
    """Bytes of a device at the peak, by kind."""
    model, length = question.model, question.length + question.output
    if question.step == "train":
        return held.train(model, candidate, length=length, optim=question.optim, loss=question.train)
    tokens = question.length if question.step == "prefill" else 1
    return held.serve(model, candidate, length=length, tokens=tokens)


def _fitting(question: Question, candidate: Candidate) -> Iterator[Candidate]:
    """A mesh and batch in the ways that fit and that no other is sure to beat.

    What is computed again is no gain by itself, and parts are none but in a pipe: a policy that keeps less is tried
    only for coarser parts than the one before allows.
    """
    if question.step != "train":
        if _fits(question, candidate):
            yield candidate
        return
    repeats = candidates.pipe_repeats(question.model, candidate.mesh.pipe)
    ladder = list(candidates.in_parts(candidate, repeats=repeats))
    if not ladder or not _fits(question, dataclasses.replace(ladder[-1], remat=question.remats[-1])):
        return
    if candidate.mesh.pipe > 1:
        for rung in reversed(ladder):  # the shortest waits first
            yield from next(([one] for one in _by_remat(question, rung) if _fits(question, one)), [])
        return
    end = len(ladder)
    for remat in question.remats:
        for place, rung in enumerate(ladder[:end]):
            one = dataclasses.replace(rung, remat=remat)
            if _fits(question, one):
                yield one
                end = place
                break


def _by_remat(question: Question, candidate: Candidate) -> Iterator[Candidate]:
    for remat in question.remats:
        yield dataclasses.replace(candidate, remat=remat)


def _fits(question: Question, candidate: Candidate) -> bool:
    return sum(memory(question, candidate).values()) <= machine.room(question.chip)


# What it takes --------------------------------------------------------------------------------------------------------


def _plans(question: Question, ways: Sequence[tuple[Candidate, int]]) -> list[Plan]:
    """Candidates on so many chips, predicted all at once, and priced."""
    if question.step == "serve":
        predicted = _served(question, [one for one, _ in ways])
    else:
        jobs = [candidates.job(one, question.model, question.step, question.length) for one, _ in ways]
        predicted = [(found, None) for found in predict_all(jobs, [question.chip] * len(jobs))]
    return [_priced(question, one, chips, *both) for (one, chips), both in zip(ways, predicted, strict=True)]


def _priced(question: Question, candidate: Candidate, chips: int, predicted: Prediction, first: float | None) -> Plan:
    tokens = candidate.batch * (question.length if question.step in ("train", "prefill") else 1)
    price = None
    if question.chip.price is not None:
        hours = predicted.seconds / tokens * (question.tokens or MILLION) * chips / 3600
        price = hours * question.chip.price
    return Plan(candidate, chips, predicted, tokens, memory(question, candidate), price, first)


def _served(question: Question, ways: Sequence[Candidate]) -> list[tuple[Prediction, float]]:
    """A token of every sequence, with the prompts that are read meanwhile; and seconds of one prompt alone.

    While every sequence makes its `output` tokens, as many prompts are read, each by its replica alone.
    """
    model, T, O = question.model, question.length, question.output
    ones = [dataclasses.replace(one, batch=one.replicas) for one in ways]
    jobs = [candidates.job(one, model, "decode", T + O // 2) for one in ways]
    jobs += [candidates.job(one, model, "prefill", T) for one in ones]
    found = predict_all(jobs, [question.chip] * len(jobs))
    pairs = zip(ways, found[: len(ways)], found[len(ways) :], strict=True)
    return [(_mixed(token, prompt, one.batch / one.replicas / O), prompt.seconds) for one, token, prompt in pairs]


def _mixed(token: Prediction, prompt: Prediction, share: float) -> Prediction:
    """A token with a share of a prompt."""
    scaled = ("seconds", "compute", "memory", "wire", "flops", "bytes", "count")
    read = [
        part._replace(name=f"prompt: {part.name}", **{field: getattr(part, field) * share for field in scaled})
        for part in prompt.parts
    ]
    seconds, flops = token.seconds + share * prompt.seconds, token.flops + share * prompt.flops
    mfu = (token.mfu * token.seconds + prompt.mfu * share * prompt.seconds) / seconds
    bound = max((token.seconds, token.bound), (share * prompt.seconds, prompt.bound))[1]
    return Prediction(seconds, (*token.parts, *read), bound, flops, mfu)


def _elsewhere(question: Question, best: Sequence[Plan]) -> list[Plan]:
    """The best of the same meshes and batches in each other precision."""
    found = []
    for precision in question.others:
        ways = [
            (one, plan.chips)
            for plan in best
            for one in _fitting(question, dataclasses.replace(_whole(plan.candidate), precision=precision))
        ]
        plans = _plans(question, ways)
        found += sorted(plans, key=lambda plan: _rank(plan, question))[:1]
    return found


def _whole(candidate: Candidate) -> Candidate:
    """The candidate before its batch was cut in parts."""
    return dataclasses.replace(candidate, accumulate=1, microbatches=0, repeats=1, remat="none")


def pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Those that no other beats in latency, throughput and cost together, the quickest first."""

    def worth(plan: Plan) -> tuple[float, float, float]:
        return plan.seconds, -plan.tokens_per_second_per_chip, plan.cost or 0.0

    front: list[Plan] = []
    for plan in sorted(plans, key=worth):
        mine = worth(plan)
        if not any(all(a <= b for a, b in zip(worth(other), mine, strict=True)) for other in front):
            front.append(plan)
    return front


# mesh=auto ------------------------------------------------------------------------------------------------------------


def quickest(question: Question, ways: Sequence[Candidate]) -> Candidate:
    """Of some ways to run the same step the one that takes the least time, of those that fit; else the smallest one."""
    chips = question.chips[0]
    fitting = [one for one in ways if _fits(question, one)]
    if not fitting:
        return min(ways, key=lambda one: sum(memory(question, one).values()))
    plans = _plans(question, [(one, chips) for one in fitting])
    return min(plans, key=lambda plan: _rank(plan, question)).candidate


# Where nothing fits ---------------------------------------------------------------------------------------------------


def _nothing(question: Question, check: Check, refused: Sequence[str]) -> str:
    """Why there is no plan, and what would do."""
    chip, chips = question.chip, max(question.chips)
    if refused:
        return f"no mesh of {chips * chip.devices_per_chip} devices divides this run; of the simplest: {refused[0]}"
    need, room = narrowest(question, check), machine.room(chip)
    least = fewest_chips(question, check)
    ways = [f"take {least:,} {chip.name}, the fewest that do"] if least else []
    for kind in _narrower(question):
        ways += next(([words] for words, other in kind if (narrowest(other, check) or room + 1) <= room), [])
    return (
        f"the {question.step} step fits on no mesh of {chips:,} {chip.name}: the least that any needs is "
        f"{(need or 0) / 2**30:.2f} GiB of a device's {room / 2**30:.2f}; "
        f"{', or '.join(ways) or 'take a smaller model'}"
    )


def narrowest(question: Question, check: Check) -> int | None:
    """Bytes of a device that the most frugal way needs; None where no mesh divides."""
    most_again, found = question.remats[-1], []
    for chips in question.chips:
        for meshes in _meshes(question, chips, check):
            for mesh in meshes.allowed:
                ladder = [mesh] if question.step != "train" else list(candidates.in_parts(mesh, repeats=[1]))
                found += [
                    sum(memory(question, dataclasses.replace(one, remat=most_again)).values()) for one in ladder[-1:]
                ]
    return min(found, default=None)


def fewest_chips(question: Question, check: Check) -> int | None:
    """The least number of chips, more than were asked for, that leaves room; None where none does."""
    chip, asked = question.chip, max(question.chips)
    for chips in machine.more(chip, asked):
        if _kept(question) > chips * chip.devices_per_chip * machine.room(chip):
            continue  # not even if every byte lay on one device alone
        bytes_ = narrowest(dataclasses.replace(question, chips=(chips,), slices=0), check)
        if bytes_ is not None and bytes_ <= machine.room(chip):
            return chips
    return None


def _kept(question: Question) -> float:
    """Bytes that lie somewhere between steps, at least."""
    weights = "fp32" if question.step == "train" else question.precisions[0].weights
    return BYTES[weights] * cost.num_parameters(question.model)


def _narrower(question: Question) -> Iterator[Iterator[tuple[str, Question]]]:
    """Kinds of settings that take less room, the mildest of each first."""
    lengths = [question.length // part for part in (2, 4, 8) if question.length // part]
    yield ((f"give --length {length}", dataclasses.replace(question, length=length)) for length in lengths)
    if question.step == "train":
        if question.optim.moments == "float32" and question.optim.name != "adafactor":
            optim = dataclasses.replace(question.optim, moments="bfloat16")
            yield iter([("set optim.moments=bfloat16", dataclasses.replace(question, optim=optim))])
        return
    if question.batches:
        fewer = [max(question.batches) // part for part in (2, 4, 8, 16) if max(question.batches) // part]
        yield ((f"give --batch {batch}", dataclasses.replace(question, batches=(batch,))) for batch in fewer)
    yield (
        (
            f"give --precision {candidates.number_words(one, question.step)}",
            dataclasses.replace(question, precisions=(one,)),
        )
        for one in question.others
    )
