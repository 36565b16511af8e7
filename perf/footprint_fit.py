"""The constants of perf/footprint.py fitted to a table of what the compiler said, and how far off they leave it.

    python -m perf.footprint_fit [perf/compiled_memory.csv]    errors as they are, fitted anew, and cross-validated

Every second row is left out of a fit and predicted by it, then the other half.
"""

import pathlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from perf.footprint import CONSTANTS, KINDS, Constants, Footprint, serve_footprint, train_footprint
from perf.footprint_truth import TABLE, Case, read
from perf.tables import aligned, gib

STEPS = (0.7, 0.85, 0.95, 1.05, 1.15, 1.4)  # times which a constant is tried
ROUNDS = 2  # through all constants
BOUND = 0.5  # of what a constant was read off to be: how far a fit may go from it either way


class Score(NamedTuple):
    """Of predictions."""

    rows: int
    median: float  # absolute error relative to the compiler's peak
    worst: float


def predicted(case: Case, constants: Constants = CONSTANTS) -> Footprint:
    """What perf/footprint.py says of a row."""
    sizes, hbm = case.mesh.sizes(case.topology.num_devices), case.topology.hbm_bytes
    if case.step != "train":
        return serve_footprint(case.model, sizes, step=case.step, batch=case.batch, length=case.length, hbm=hbm)
    how = {"train": case.train, "execution": case.execution, "optim": case.optim}
    return train_footprint(case.model, sizes, hbm=hbm, constants=constants, **how)


def error(case: Case, constants: Constants = CONSTANTS) -> float:
    """Relative to the compiler's peak; above 0 where too much is predicted."""
    return predicted(case, constants).total / case.peak_bytes - 1


def score(errors: Sequence[float]) -> Score:
    """Of errors with their signs."""
    sizes = [abs(e) for e in errors]
    return Score(len(sizes), statistics.median(sizes), max(sizes))


def loss(cases: Sequence[Case], constants: Constants) -> float:
    """What a fit makes small: the mean of squares, so that no row is far off."""
    return statistics.fmean(error(case, constants) ** 2 for case in cases)


def scored(cases: Sequence[Case]) -> list[Case]:
    """Each step once: at full effort where it was compiled at both. One that is refused says what it would need."""
    full = {case.name for case in cases if case.effort == 0}
    return [case for case in cases if case.effort == 0 or case.name not in full]


def fit(cases: Sequence[Case], start: Constants = CONSTANTS) -> Constants:
    """Constants one at a time, each to the best of a few factors."""
    cases = [case for case in cases if case.step == "train"]
    best, least = start, loss(cases, start)
    for _ in range(ROUNDS):
        for name in Constants._fields:
            middle = getattr(CONSTANTS, name)
            for factor in STEPS:
                value = getattr(best, name) * factor
                if not BOUND * middle <= value <= middle / BOUND:
                    continue
                tried = best._replace(**{name: value})
                if (now := loss(cases, tried)) < least:
                    best, least = tried, now
    return best


def cross_validated(cases: Sequence[Case]) -> list[float]:
    """Errors of each half of the rows by constants fitted to the other half."""
    halves = cases[::2], cases[1::2]
    return [
        error(case, constants) for mine, other in (halves, halves[::-1]) for constants in (fit(other),) for case in mine
    ]


def lines(cases: Sequence[Case]) -> Iterator[str]:
    """A row for each case as a Markdown table."""
    yield "| step | compiled | predicted | error | at | fits: compiler, here |"
    yield "|---|---|---|---|---|---|"
    for case in cases:
        found = predicted(case)
        here, there = ("yes" if fits else "no" for fits in (found.fits, case.fits))
        sizes = f"{gib(case.peak_bytes)} | {gib(found.total)}"
        name = case.name.replace("|", "\\|")
        yield f"| {name} | {sizes} | {error(case):+.1%} | {found.moment} | {there}, {here} |"


def groups(cases: Sequence[Case]) -> Iterator[tuple[str, ...]]:
    """Errors by generation, by step, by what is at the peak."""
    kinds = {
        "generation": lambda case: case.topology.generation.name,
        "step": lambda case: case.step,
        "moment": lambda case: predicted(case).moment,
        "largest part": lambda case: max(KINDS, key=lambda kind: predicted(case).parts.get(kind, 0)),
    }
    yield ("by", "", "rows", "median", "worst")
    for by, name in kinds.items():
        for value in sorted({name(case) for case in cases}):
            found = score([error(case) for case in cases if name(case) == value])
            yield (by, value, str(found.rows), f"{found.median:.1%}", f"{found.worst:.1%}")


def main(path: pathlib.Path) -> int:
    """Print all of it."""
    cases = [case for case in read(path) if case.fits is not None]
    steps = scored(cases)
    fitting = [case for case in steps if case.fits]
    print("\n".join(lines(cases)))
    print("\n".join(aligned(list(groups(steps)), right=(2, 3, 4))))
    print("as they are:", score([error(case) for case in steps]))
    print("cross-validated:", score(cross_validated(steps)))
    fitted = fit(steps)
    print("fitted anew:", fitted, score([error(case, fitted) for case in steps]))
    wrong = [case.name for case in cases if predicted(case).fits and not case.fits]
    refused = [case.name for case in fitting if not predicted(case).fits]
    print(f"said to fit but do not: {wrong}; refused though they fit: {len(refused)} of {len(fitting)}: {refused}")
    return 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE))
