"""A search's answer in words and columns: what bounds the best plan, why others lose. Searches and draws nothing."""

from collections.abc import Iterator, Sequence
from typing import Any

from parallel.config import MeshConfig
from perf import candidates, machine
from perf.columns import aligned, digits, gib, seconds, unit_of
from perf.plan import Answer, Plan, Question, slices_of

AXES = tuple(MeshConfig(data=1).axes)
WORDS: dict[str, str] = {
    "matmul": "products",
    "attention": "attention",
    "vector": "passes over memory",
    "bubble": "waiting in the pipe",
    "overhead": "overhead",
}
TELLING, NOTED = 0.02, 0.003  # of a step: less on the network, or of a difference, is not worth a word


# Columns --------------------------------------------------------------------------------------------------------------


def mesh_words(plan: Plan) -> str:
    """fsdp 64 · tensor 2; serving: 4 replicas of tensor 8."""
    return " · ".join(f"{axis} {size}" for axis, size in plan.candidate.mesh.axes.items() if size > 1) or "1 device"


def title(answer: Answer, name: str) -> str:
    """What was asked, in one line."""
    question, chips = answer.question, max(answer.question.chips)
    place = machine.named(question.chip, chips, slices_of(question, chips))
    most = "up to " if len(question.chips) > 1 else ""
    work = {
        "train": f"training on sequences of {question.length:,} tokens",
        "prefill": f"reading prompts of {question.length:,} tokens",
        "decode": f"a token after {question.length:,}",
        "serve": f"answers of {question.output:,} tokens to prompts of {question.length:,}",
    }[question.step]
    return f"{name}: {work}, on {most}{place}"


def table(answer: Answer, plans: Sequence[Plan]) -> Iterator[str]:
    """The plans in columns."""
    yield from aligned(
        [head(answer), *(row(answer, at + 1, plan) for at, plan in enumerate(plans))], right=_right(answer)
    )


def head(answer: Answer) -> list[str]:
    """Names of the columns."""
    question = answer.question
    _, unit = unit_of(answer.plans[0].seconds)
    batch = ["batch", "parts", "remat"] if question.step == "train" else ["batch"]
    first = ["prompt"] if question.step == "serve" else []
    step = f"{'token' if question.step in ('decode', 'serve') else 'step'} {unit}"
    return [
        "#", *(["chips"] if len(question.chips) > 1 else []), "mesh", *batch, "numbers", step, *first, "tok/s/chip",
        "MFU", "HBM GiB", "bound", price_head(question),
    ]  # fmt: skip


def price_head(question: Question) -> str:
    """What the last column is."""
    return "US$ the run" if question.tokens else "US$/M tokens"


def _right(answer: Answer) -> list[int]:
    left = {"mesh", "remat", "numbers", "bound"}
    return [at for at, name in enumerate(head(answer)) if name not in left]


def row(answer: Answer, rank: int, plan: Plan) -> list[str]:
    """One plan."""
    question, one = answer.question, plan.candidate
    scale, _ = unit_of(answer.plans[0].seconds)
    parts = f"{one.accumulate}" if one.mesh.pipe == 1 else f"{one.microbatches} in pipe"
    batch = [f"{one.batch:,}", parts, one.remat] if question.step == "train" else [f"{one.batch:,}"]
    first = [seconds(plan.first_token or 0.0)] if question.step == "serve" else []
    return [
        f"{rank}", *([f"{plan.chips:,}"] if len(question.chips) > 1 else []), mesh_words(plan), *batch,
        candidates.number_words(one.precision, question.step), digits(plan.seconds * scale), *first,
        digits(plan.tokens_per_second_per_chip), f"{plan.prediction.mfu:.1%}",
        f"{digits(plan.hbm_bytes / 2**30)} of {digits(machine.room(question.chip) / 2**30)}", plan.prediction.bound,
        money(plan.cost),
    ]  # fmt: skip


def money(cost: float | None) -> str:
    """1,234 or 0.0123; - where there is no price."""
    return "-" if cost is None else f"{cost:,.0f}" if cost >= 1000 else f"{cost:.3g}"


# Words ----------------------------------------------------------------------------------------------------------------


def groups(plan: Plan) -> dict[str, float]:
    """Seconds of a step by what they go to: products, attention, …, and each collective by its name. They sum to it."""
    found: dict[str, float] = {}
    for part in plan.prediction.parts:
        name = WORDS.get(part.kind) or part.name.removeprefix("prompt: ")
        found[name] = found.get(name, 0.0) + part.seconds
    return found


def why(answer: Answer) -> Iterator[str]:
    """What bounds the best plan, how near the next ones are, and what other ways lose."""
    question, best = answer.question, answer.plans[0]
    yield f"The first: {bound_words(question, best)}"
    if len(answer.plans) > 1:
        least, most = behind(answer.plans[1], best), behind(answer.plans[-1], best)
        yield f"The next {len(answer.plans) - 1} are {least} to {most} behind."
    yield from (f"{mesh_words(rival)}: {against(question, rival, best)}" for rival in answer.rivals)


def behind(plan: Plan, best: Plan) -> str:
    """How much longer a token takes: 2.1%."""
    return f"{(plan.seconds / plan.tokens) / (best.seconds / best.tokens) - 1:.1%}"


def bound_words(question: Question, plan: Plan) -> str:
    """tensor=8 is ICI-bound: 2.1 ms of 3.0 ms go to sums over tensor."""
    bound, whole, sizes, shares = plan.prediction.bound, plan.seconds, plan.candidate.mesh.axes, groups(plan)
    if bound in AXES:
        spent = {name: value for name, value in shares.items() if name.endswith(bound)} or shares
        most = max(spent, key=lambda name: spent[name])
        link = question.chip.link or "network"
        return (
            f"{bound}={sizes[bound]} is {link}-bound: {seconds(spent[most], whole)} of {seconds(whole)} go to {most}."
        )
    most = max(shares, key=lambda name: shares[name])
    network = [part for part in plan.prediction.parts if part.kind == "collective"]
    exposed = sum(part.seconds for part in network)
    hidden = sum(max(part.wire - part.seconds, 0.0) for part in network)
    said = f"bound by {bound}, {seconds(shares[most], whole)} of {seconds(whole)} go to {most}"
    if exposed + hidden > TELLING * whole:
        said += f"; of {seconds(exposed + hidden, whole)} on the network {seconds(hidden, whole)} are hidden"
    return said + "."


def against(question: Question, plan: Plan, best: Plan) -> str:
    """Why a plan is behind the best one, for as many tokens: 4.2% behind, 2.1 s more for sums over tensor."""
    scale = best.tokens / plan.tokens
    mine, its = groups(plan), groups(best)
    change = {name: mine.get(name, 0.0) * scale - its.get(name, 0.0) for name in {**mine, **its}}
    rows = sorted(change.items(), key=lambda item: (-abs(item[1]), item[0]))
    telling = [row for row in rows if abs(row[1]) > max(NOTED * best.seconds, 0.2 * abs(rows[0][1]))][:3]
    more = [f"{seconds(value, best.seconds)} more for {name}" for name, value in telling if value > 0]
    less = [f"{seconds(-value, best.seconds)} less for {name}" for name, value in telling if value < 0]
    said = ", ".join([f"{behind(plan, best)} behind", *more, *less])
    if plan.tokens != best.tokens:
        said += f" (batch {plan.candidate.batch:,}, for as many tokens)"
    return f"{said}." + (f" {bound_words(question, plan)}" if plan.prediction.bound in AXES else "")


def elsewhere(answer: Answer) -> Iterator[str]:
    """What other numbers would give."""
    best = answer.plans[0]
    for plan in answer.others:
        words = candidates.number_words(plan.candidate.precision, answer.question.step)
        gain = plan.tokens_per_second_per_chip / best.tokens_per_second_per_chip
        yield f"{words}: {gain:.2f} times the tokens a second, {mesh_words(plan)}, batch {plan.candidate.batch:,}"


def front_lines(answer: Answer) -> Iterator[str]:
    """Serving: from the quickest answers to the most of them."""
    yield "None is better in latency, throughput and cost together than these:"
    yield from table(answer, answer.front)


def command(question: Question, plan: Plan, config: str) -> str:
    """How a plan is run; of a model without a config file or weights its settings alone."""
    settings = candidates.settings(plan.candidate, question.step)
    if question.step != "train":
        return f"uv run infer.py serve MODEL {settings}"
    return f"uv run train.py {config} {settings}" if config.endswith(".py") else settings


def lines(answer: Answer, name: str, config: str, took: float) -> Iterator[str]:
    """What `python -m perf plan` prints."""
    question = answer.question
    yield title(answer, name)
    yield from table(answer, answer.plans)
    yield from why(answer)
    if len(answer.front) > 1:
        yield from front_lines(answer)
    if answer.others:
        yield "In other numbers, which change what is computed:"
        yield from (f"  {line}" for line in elsewhere(answer))
    yield f"to run the first: {command(question, answer.plans[0], config)}"
    yield f"{answer.tried:,} meshes and batches divide the model, {answer.fitting:,} of them fit; {took:.1f} s"


def compiled_line(row: dict[str, Any]) -> str:
    """fsdp=64 tensor=2: predicted 61.20 GiB, compiled 59.80 GiB (+2.3 %), fits."""
    predicted, found = row["hbm_bytes"], row["compiled"]
    mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "1 device"
    return (
        f"{mesh} on {found['topology']}: predicted {gib(predicted)}, compiled {gib(found['peak_bytes'])} "
        f"({predicted / found['peak_bytes'] - 1:+.1%}), {'fits' if found['fits'] else 'DOES NOT FIT'}; "
        f"{found['compile_cpu_seconds']:.0f} CPU seconds"
    )


# Plain data -----------------------------------------------------------------------------------------------------------


def plain(answer: Answer, name: str) -> dict[str, Any]:
    """The answer as what JSON can hold."""
    question, chips = answer.question, max(answer.question.chips)
    num_slices = slices_of(question, chips)
    found = machine.topology(question.chip, chips, num_slices)
    return {
        "model": name,
        "step": question.step,
        "chip": question.chip.name,
        "chips": chips,
        "slices": num_slices,
        "topology": found.name if found else None,
        "length": question.length,
        "output": question.output,
        "by": question.by,
        "cost_of": question.tokens or 1e6,
        "hbm_room_bytes": machine.room(question.chip),
        "tried": answer.tried,
        "fitting": answer.fitting,
        "plans": [plain_plan(question, plan) for plan in answer.plans],
        "rivals": [plain_plan(question, plan) for plan in answer.rivals],
        "front": [plain_plan(question, plan) for plan in answer.front],
        "other_precisions": [plain_plan(question, plan) for plan in answer.others],
        "why": list(why(answer)),
    }


def plain_plan(question: Question, plan: Plan) -> dict[str, Any]:
    """One plan; seconds are of a step, bytes of a device."""
    one = plan.candidate
    return {
        "chips": plan.chips,
        "slices": one.slices,
        "mesh": one.mesh.axes,
        "replicas": one.replicas,
        "batch": one.batch,
        "accumulate": one.accumulate,
        "microbatch": one.microbatch,
        "microbatches": one.microbatches,
        "repeats": one.repeats,
        "remat": one.remat,
        "precision": one.precision._asdict(),
        "step_seconds": plan.seconds,
        "first_token_seconds": plan.first_token,
        "tokens_per_step": plan.tokens,
        "tokens_per_second": plan.tokens / plan.seconds,
        "tokens_per_second_per_chip": plan.tokens_per_second_per_chip,
        "mfu": plan.prediction.mfu,
        "hbm_bytes": plan.hbm_bytes,
        "memory": plan.memory,
        "bound": plan.prediction.bound,
        "cost": plan.cost,
        "settings": candidates.settings(one, question.step),
        "parts": [part._asdict() for part in plan.prediction.parts],
    }
