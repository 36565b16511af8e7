"""An answer of the planner as one page: words, tables and pictures in a single HTML file that needs no network.

Draws by perf/pictures.py and says what perf/explanation.py says; searches only for fewer and for more chips.
"""

import base64
import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from perf import explanation, machine, pictures
from perf.candidates import Check
from perf.columns import digits, seconds
from perf.pictures import Piece, Point
from perf.plan import Answer, Plan, search

HALVES, DOUBLES = 3, 3  # of the chips asked for, how far a scaling curve goes
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #666; --line: #ddd; --paper: #fff; --best: #eef5fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eee; --soft: #aaa; --line: #444; --paper: #1b1b1d; --best: #22313d; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p.soft, figcaption { color: var(--soft) } figure { margin: 1.4rem 0 } figcaption { font-size: .9rem; max-width: 60rem }
img { width: 100%; max-width: var(--wide); background: #fff; border-radius: 6px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { font-weight: 600; color: var(--soft) } .left { text-align: left } tr.best td { background: var(--best) }
dl { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem } dt { color: var(--soft); font-size: .85rem }
dd { margin: 0; font-size: 1.35rem } code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere }
pre { background: var(--best); padding: .7rem .9rem; border-radius: 6px; white-space: pre-wrap }
"""
LEFT = {"mesh", "remat", "numbers", "bound", "operation", "kind"}


def neighbours(answer: Answer, check: Check) -> list[Point]:
    """The best plan for the chips asked for, and for half and double as many, as far as they form slices and fit."""
    question, asked = answer.question, max(answer.question.chips)
    best = next((plan for plan in answer.plans if plan.chips == asked), None)
    found = [Point(asked, best)] if best else []
    for power in [*range(-HALVES, 0), *range(1, DOUBLES + 1)]:
        chips = int(asked * 2.0**power)
        if chips * 2.0**-power != asked:
            continue
        other = dataclasses.replace(question, chips=(chips,), slices=0, others=(), top=1)
        try:
            found.append(Point(chips, search(other, check).plans[0]))
        except ValueError:
            continue  # they form no slice, or leave no room
    return sorted(found)


def scored() -> list[Mapping[str, Any]]:
    """Rows of perf/score.py for what others measured, the table that comes with the project."""
    return []


def page(answer: Answer, name: str, config: str, points: Sequence[Point], rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole file; `rows` are what perf/score.py says of what others measured, or none."""
    heading = explanation.title(answer, name)
    body = [
        f"<h1>{_text(name)}</h1><p class=soft>{_text(heading)}</p>",
        *_best(answer, config),
        "<h2>The plans</h2>",
        _table(
            explanation.head(answer), [explanation.row(answer, at + 1, plan) for at, plan in enumerate(answer.plans)]
        ),
        f"<p class=soft>{answer.tried:,} meshes and batches divide the model, {answer.fitting:,} of them fit. The "
        "best of each mesh and batch is shown.</p>",
        "<h2>Why</h2>",
        *(f"<p>{_text(line)}</p>" for line in explanation.why(answer)),
        *_others(answer),
        "<h2>Pictures</h2>",
        *_figures(answer, points, rows),
        *_parts(answer),
        f"<p class=soft>{_text(answer.question.chip.name)}: {_text(answer.question.chip.citations)}. Everything here "
        "is predicted by arithmetic; nothing was run.</p>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(heading)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>{chr(10).join(body)}</body></html>\n"
    )


def _text(words: str) -> str:
    return html.escape(words)


def _best(answer: Answer, config: str) -> Iterator[str]:
    """The winner in large figures, and how to run it."""
    plan, question = answer.plans[0], answer.question
    unit = "a token" if question.step in ("decode", "serve") else "a step"
    figures = {
        "mesh": explanation.mesh_words(plan),
        unit: seconds(plan.seconds),
        "tokens/s/chip": digits(plan.tokens_per_second_per_chip),
        "MFU": f"{plan.prediction.mfu:.1%}",
        "GiB of a device": f"{plan.hbm_bytes / 2**30:.1f} of {machine.room(question.chip) / 2**30:.1f}",
        "bound by": plan.prediction.bound,
        explanation.price_head(question): explanation.money(plan.cost),
    }
    yield "<dl>" + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in figures.items()) + "</dl>"
    yield f"<pre>{_text(explanation.command(question, plan, config))}</pre>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first row marked."""
    left = [' class="left"' if name in LEFT else "" for name in head]
    lines = ["".join(f"<td{side}>{_text(cell)}</td>" for side, cell in zip(left, row, strict=True)) for row in rows]
    top = "".join(f"<th{side}>{_text(name)}</th>" for side, name in zip(left, head, strict=True))
    marked = [f"<tr{' class=best' if at == 0 else ''}>{line}</tr>" for at, line in enumerate(lines)]
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(marked)}</table></div>'


def _others(answer: Answer) -> Iterator[str]:
    """Other numbers."""
    if answer.others:
        yield "<h2>In other numbers, which change what is computed</h2>"
        yield "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in explanation.elsewhere(answer)) + "</ul>"


def _figures(answer: Answer, points: Sequence[Point], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every picture with what it shows."""
    best, question = answer.plans[0], answer.question
    yield _figure(
        pictures.timeline(best),
        "The best plan's step. Above, what it spends its time on, all layers and passes of an operation together; "
        "below, the network: pale what runs behind the step, full what the step waits for.",
    )
    yield _figure(
        pictures.roofline(best, question.chip),
        "Each operation by its FLOPs for a byte of memory. Under the slope memory bounds it, under the flat roof the "
        "multipliers do; how far below it lies is what shapes and overheads cost.",
    )
    yield _figure(pictures.memory(answer.plans, machine.room(question.chip)), "What one device holds, for each plan.")
    if len(answer.front) > 1:
        what = "a token" if question.step in ("decode", "serve") else "a prompt"
        yield _figure(
            pictures.front(answer.front, what=what),
            f"B is the batch over all chips; prices are {explanation.price_head(question)}.",
        )
    if len(points) > 1:
        yield _figure(
            pictures.scaling(points, max(question.chips), is_fixed=len(question.batches) == 1),
            "The best plan for each number of chips, with its mesh.",
        )
    if rows:
        yield _figure(
            pictures.measured(rows),
            "How far to trust this: the same model beside what others published, row by row (python -m perf score).",
        )


def _figure(figure: Figure, words: str) -> str:
    wide = round(figure.get_figwidth() * 96)
    data = base64.b64encode(pictures.png(figure)).decode()
    alt = _text(words)
    return (
        f'<figure><img style="--wide: {wide}px" alt="{alt}" src="data:image/png;base64,{data}">'
        f"<figcaption>{alt}</figcaption></figure>"
    )


def _parts(answer: Answer) -> Iterator[str]:
    """The best plan's step, operation by operation."""
    best = answer.plans[0]
    yield "<h2>The best plan's step in parts</h2>"
    yield _table(
        ["operation", "kind", "time", "share", "on the network"],
        [_part(piece, best) for piece in pictures.pieces(best.prediction.parts)],
    )


def _part(piece: Piece, plan: Plan) -> list[str]:
    wire = seconds(piece.wire, plan.seconds) if piece.wire else ""
    kind = explanation.WORDS.get(piece.kind, "network")
    return [piece.name, kind, seconds(piece.seconds, plan.seconds), f"{piece.seconds / plan.seconds:.1%}", wire]
