"""What the TPU compiler says a step needs, a row for each step: the table that perf/footprint.py is held against.

    python -m perf.footprint_truth [perf/compiled_memory.csv]    compile the rows that have no peak yet, one at a time

A row says what is compiled in words of the config records; the compiler's answer is written back at once, so that the
command may be stopped and started again. A row is added by writing one with the answer's columns empty.
"""

import csv
import dataclasses
import importlib.metadata
import pathlib
import sys
from typing import Any, NamedTuple

from model.config import ModelConfig
from model.families import PUBLISHED
from parallel.config import AxisRules, ExecutionConfig, MeshConfig
from parallel.topology import Topology, find
from training.config import OptimConfig, TrainConfig

TABLE = pathlib.Path(__file__).with_name("compiled_memory.csv")
ASKED = ("model", "topology", "step", "mesh", "batch", "length", "settings", "effort")
ANSWER = ("fits", "peak_bytes", "argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "cpu_seconds", "libtpu")

DEEP = ModelConfig(  # small and deep, its dims whole tiles
    vocab_size=32_000,
    embed_dim=1024,
    num_layers=64,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=2816,
    max_length=32_768,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tied=False,
)


class Case(NamedTuple):
    """A row: what is compiled, and the answer where there is one."""

    name: str
    step: str
    model: ModelConfig
    mesh: MeshConfig
    optim: OptimConfig
    train: TrainConfig
    execution: ExecutionConfig
    batch: int  # sequences of a serving step
    length: int  # tokens of its prompt, or in its cache
    topology: Topology
    effort: float
    fits: bool | None  # None: not compiled yet
    peak_bytes: int  # where it does not fit: what the compiler asked for


def read(path: pathlib.Path = TABLE) -> list[Case]:
    """All rows of a table."""
    return [case_of(row) for row in rows_of(path)]


def case_of(row: dict[str, str]) -> Case:
    """A row of text as the records that it names."""
    given = dict(word.split("=", 1) for word in row["settings"].split())
    batch, length = int(row["batch"]), int(row["length"])
    base = DEEP if row["model"] == "deep" else PUBLISHED[row["model"]]()
    base = dataclasses.replace(base, compute_dtype="bfloat16", max_length=max(base.max_length, length))
    records = [base, OptimConfig(), TrainConfig(steps=1000, batch_size=batch, seq_len=length), ExecutionConfig()]
    model, optim, train, execution = (changed(record, given) for record in records)
    if given:
        raise ValueError(f"settings {given} of {row['model']} on {row['topology']} are no fields of the config records")
    return Case(
        name=" ".join(row[name] for name in ("model", "topology", "step", "mesh", "batch", "length", "settings")),
        step=row["step"],
        model=model,
        mesh=MeshConfig(**{"data": 1} | {axis: int(size) for axis, size in map(pair, row["mesh"].split())}),
        optim=optim,
        train=train,
        execution=execution,
        batch=batch,
        length=length,
        topology=find(row["topology"]),
        effort=float(row["effort"]),
        fits={"": None, "yes": True, "no": False}[row["fits"]],
        peak_bytes=int(row["peak_bytes"] or 0),
    )


def pair(word: str) -> tuple[str, str]:
    """fsdp=4 -> fsdp, 4"""
    name, _, value = word.partition("=")
    return name, value


def changed(record: Any, given: dict[str, str]) -> Any:
    """A record with the settings that are its fields, which are taken out of `given`."""
    found = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    mine = {name: parsed(given.pop(name), found[name]) for name in found if name in given}
    return dataclasses.replace(record, **mine)


def parsed(text: str, like: Any) -> Any:
    """A value in the type of the one that it takes the place of; a tuple's words stand between bars."""
    if isinstance(like, tuple):
        return tuple(text.split("|"))
    return text == "true" if isinstance(like, bool) else type(like)(text)


def answer(case: Case) -> dict[str, str]:
    """Compile it."""
    from perf.aot import Work, compiled

    work = Work(
        step=case.step,  # pyright: ignore[reportArgumentType]
        model=case.model,
        mesh=case.mesh,
        rules=AxisRules(),
        optim=case.optim,
        train=case.train,
        execution=case.execution,
        batch=case.batch,
        length=case.length,
    )
    report = compiled(work, case.topology, effort=case.effort)
    names = ("peak_bytes", "argument_bytes", "output_bytes", "alias_bytes", "temp_bytes")
    return {
        "fits": "yes" if report.fits else "no",
        **{name: str(getattr(report, name)) for name in names},
        "cpu_seconds": f"{report.compile_cpu_seconds:.0f}",
        "libtpu": importlib.metadata.version("libtpu"),
    }


def main(path: pathlib.Path) -> int:
    """Compile the first row without an answer, then the next; -> how many the compiler refused to compile."""
    refused = set()
    while True:
        rows = rows_of(path)
        todo = [row for row in rows if not row["peak_bytes"] and asked(row) not in refused]
        if not todo:
            return len(refused)
        row = todo[0]
        print(*asked(row), file=sys.stderr, flush=True)
        try:
            found = answer(case_of(row))
        except ValueError as error:
            print(f"  {error}", file=sys.stderr, flush=True)
            refused.add(asked(row))
            continue
        print(f"  {int(found['peak_bytes']) / 2**30:.3f} GiB, fits: {found['fits']}", file=sys.stderr, flush=True)
        write(path, [each | found if asked(each) == asked(row) else each for each in rows_of(path)])


def asked(row: dict[str, str]) -> tuple[str, ...]:
    """What makes a row another one."""
    return tuple(row[name] for name in ASKED)


def rows_of(path: pathlib.Path) -> list[dict[str, str]]:
    """As text; read again for each row, for some may be added meanwhile."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
    """In place of what is there, never half of it."""
    part = path.with_suffix(".partial")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*ASKED, *ANSWER], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(1 if main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE) else 0)
